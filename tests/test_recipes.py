"""The recipes of the paper: its values stand in them, and every command of docs/reproduce.md runs on a stand-in."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoConfig

from pte.cli import main, parse
from pte.model.load import load_tokenizer
from pte.tasks.problems import BOXED_INSTRUCTION, render_prompt
from pte.tasks.suites import SUITES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    from make_stand_in import ORIGINALS, make_stand_in
finally:
    sys.path.remove(str(ROOT / "scripts"))

pytestmark = pytest.mark.system

RECIPES = sorted((ROOT / "configs").glob("paper-*.toml"))
SMALL = [
    *("--model.device", "cpu", "--cache.window-tokens", "16", "--cache.evict-tokens", "4"),
    *("--rollout.max-new-tokens", "26", "--rollout.slots", "4", "--train.prompts-per-step", "2"),
    *("--train.group-size", "2", "--train.micro-batch-size", "2", "--eval.max-new-tokens", "20"),
]


def documented(command: str) -> list[list[str]]:
    """Words of the lines in docs/reproduce.md that start with a command."""
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    return [shlex.split(line)[2:] for line in re.findall(rf"^pte {command} .*$", text, re.MULTILINE)]


def base_of(words: list[str]) -> str:
    return Path(words[0]).stem.removeprefix("paper-")


def problem_file(path: Path, count: int) -> Path:
    rows = [
        {"id": f"{path.stem}-{n}", "problem": f"What is {n} + {n * n}?", "answer": str(n + n * n), "source": "made up"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training file, and three problems for each set of the suite."""
    folder = tmp_path_factory.mktemp("data")
    problem_file(folder / "train.jsonl", 12)
    for one in SUITES["math6"]:
        problem_file(folder / one.file, 3)
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("models")
    texts = [f"What is {n} + {n * n}? The answer is {n + n * n}, and put it into a box." for n in range(40)]

    @cache
    def made(name: str) -> str:
        make_stand_in(name, texts, folder / name, vocab_size=300)
        return str(folder / name)

    return made


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_paper_s_values_stand_in_every_recipe(path: Path) -> None:
    config = parse("train", [str(path)]).experiment
    assert (config.adapter.kind, config.adapter.rank, config.adapter.global_tokens) == ("thought", 32, 32)
    assert (config.adapter.update_rule, config.cache.policy) == ("paper", "window")
    assert config.cache.evict_tokens / config.cache.window_tokens == 0.25
    assert (config.train.learning_rate, config.train.max_grad_norm) == (1e-5, 1.0)
    assert config.train.prompts_per_step * config.train.group_size == 512
    assert config.rollout.max_new_tokens == config.eval.max_new_tokens == 3072
    assert config.distill.steps == 0 and config.eval.problems == max(one.problems for one in SUITES["math6"])
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if " = " in line]
    unmarked = [line for line in lines if "#" not in line]
    # What needs no source: names, and the arm itself.
    assert {line.split(" = ")[0] for line in unmarked} == {"path", "kind", "name"}


def test_the_recipes_differ_in_their_base_alone() -> None:
    texts = []
    for path in RECIPES:
        config = parse("train", [str(path)]).experiment
        text = path.read_text(encoding="utf-8").replace(config.model.path.partition("/")[2], "BASE")
        texts.append(text.replace(config.model.path.partition("/")[0], "OWNER").replace(path.stem, "NAME"))
    assert len(texts) == 3 and len(set(texts)) == 1


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_stand_in_has_the_layout_and_the_chat_format_of_its_family(name: str, stand_in) -> None:
    path, original = stand_in(name), ORIGINALS[name]
    config, tokenizer = AutoConfig.from_pretrained(path), load_tokenizer(path)
    assert (config.model_type, config.num_attention_heads) == (original.architecture, original.heads)
    assert (config.num_key_value_heads, config.tie_word_embeddings) == (original.kv_heads, original.tied)
    prompt = render_prompt("1 + 1?", tokenizer, instruction=BOXED_INSTRUCTION)
    expected = {
        "qwen2": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n1 + 1?\n{BOXED_INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
        "llama": f"<｜begin▁of▁sentence｜><｜User｜>1 + 1?\n{BOXED_INSTRUCTION}<｜Assistant｜><think>\n",
    }
    assert prompt == expected[original.architecture]
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    specials = [token for token in original.special if token in prompt]
    assert all(ids.count(tokenizer.convert_tokens_to_ids(token)) == prompt.count(token) for token in specials)
    assert len(specials) >= 2


def test_every_arm_of_every_base_is_documented_under_a_name_of_its_own() -> None:
    found = {}
    for words in documented("train"):
        config = parse("train", [str(ROOT / words[0]), *words[1:]]).experiment
        found[config.run.name] = (base_of(words), config.adapter.kind, config.cache.policy)
    arms = [("thought", "window"), ("lora", "none"), ("lora", "window")]
    assert sorted(found.values()) == sorted((base, *arm) for base in ORIGINALS for arm in arms)
    assert len(found) == 9


@pytest.mark.parametrize(
    "words", documented("train"), ids=lambda words: words[-1] if len(words) > 1 else base_of(words)
)
def test_every_training_fits_together_on_a_stand_in(
    words: list[str], stand_in, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--task.train-path", str(data / "train.jsonl"), "--task.eval-paths", str(data / "math500.jsonl")]
    command = [str(ROOT / words[0]), *words[1:], "--model.path", stand_in(base_of(words)), *SMALL, *files, "--dry-run"]
    assert main(["train", *command]) == 0, capsys.readouterr().err
    shown = " ".join(capsys.readouterr().out.split())
    assert "completion 26 tokens, 4 sequences at once" in shown and "grpo: one update on 2 sequences" in shown


def test_the_suite_gives_six_scores_and_their_average(
    stand_in, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = documented("eval")[0]
    files = {"--data-dir": str(data), "--output": str(tmp_path / "scores.json")}
    words = [files.get(words[index - 1], word) for index, word in enumerate(words)]
    more = [
        "--eval.problems",
        "2",
        "--completions",
        str(tmp_path / "all.jsonl"),
        "--rollouts",
        str(tmp_path / "rollouts.json"),
    ]
    command = [str(ROOT / words[0]), *words[1:], "--model.path", stand_in(base_of(words)), *SMALL, *more]
    assert main(["eval", *command, "--train-path", str(data / "train.jsonl")]) == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "scores.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    scores = written.pop("math6")
    assert list(written) == [one.name for one in SUITES["math6"]]
    for one in SUITES["math6"]:
        samples = one.samples or 1
        mine = [row for row in rows if row["id"].startswith(one.name)]
        assert len(mine) == 2 * samples and (samples == 16) == one.title.startswith("AIME")
        by_problem = [[row["right"] for row in mine if row["id"] == f"{one.name}-{n}"] for n in range(2)]
        assert scores[one.title] == pytest.approx(statistics.fmean(any(rights) for rights in by_problem))
        texts = [row["completion"] for row in mine if row["id"] == f"{one.name}-1"]
        assert len(set(texts)) > 1 or samples == 1, "sixteen samples, not one sixteen times"
    assert scores["average"] == pytest.approx(statistics.fmean(list(scores.values())[:-1]))
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"MATH-500 .* OlympiadBench .* AMC23 .* AIME24 .* AIME25 .* Minerva .* average", shown)
    assert "MATH-500 was scored on 2 problems, the set has 500" in shown
    # The viewer's completions are greedy, of the four sets that are not sampled.
    kept = [row["id"].rpartition("-")[0] for row in json.loads((tmp_path / "rollouts.json").read_text())]
    assert kept == [one.name for one in SUITES["math6"] if one.samples is None for _ in range(2)]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--suite", "math6"], "--suite and --data-dir must be given together, got 'math6' and None"),
        (["--data-dir", "x"], "--suite and --data-dir must be given together, got None and 'x'"),
        (["--suite", "math6", "--data-dir", "x"], "must hold math500.jsonl, .* got x without math500.jsonl, olympiad"),
    ],
)
def test_a_suite_without_its_files_is_refused(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words]) == 2
    assert re.search(error, capsys.readouterr().err)
