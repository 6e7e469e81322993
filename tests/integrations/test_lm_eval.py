"""The harness on local problem files: its texts and scores are those of `pte eval`, from Python and as a command.

The base is a tiny one that has learnt to put 7 or 8 into a box, mostly 7, whatever it is asked; of the answers that the
files hold some are right, some are another way to write 7, most are wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import Qwen2Config, Qwen2ForCausalLM

from pte.cli import main
from pte.integrations.lm_eval import PROBLEMS_DIRECTORY
from pte.integrations.lm_eval.__main__ import main as harness_command
from pte.integrations.lm_eval.model import BoundedLM
from pte.model.load import load_tokenizer
from pte.tasks.problems import BOXED_INSTRUCTION, encode_prompt, render_prompt
from pte.tasks.suites import SUITES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    from make_text_model import make_tokenizer, save_tokenizer
finally:
    sys.path.remove(str(ROOT / "scripts"))

pytestmark = pytest.mark.system

SHARED = ROOT / "../shared/data"
ANSWERS = ("7", "8", r"\frac{14}{2}", "11", "8")
CHAT = "User: {{ messages[0]['content'] }}\nAssistant:{% if not add_generation_prompt %} {% endif %}"
FORMS = ("chat", "plain")


def problem_texts(name: str, count: int) -> list[str]:
    """Real problems where they are at hand, else made ones."""
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        return [f"What is {n} plus {n + len(name)}?" for n in range(count)]
    return [json.loads(line)["problem"] for line in path.read_text().splitlines()[:count]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seven files of our tasks, a few problems each."""
    folder = tmp_path_factory.mktemp("data")
    for offset, name in enumerate(["gsm8k_test", *(one.name for one in SUITES["math6"])]):
        rows = [
            {"id": f"{name}-{n}", "problem": text, "answer": ANSWERS[(n + offset) % len(ANSWERS)], "source": name}
            for n, text in enumerate(problem_texts(name, 3 + offset % 3))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with a begin token and a chat template that does not write it."""
    folder = tmp_path_factory.mktemp("model")
    problems = [json.loads(line)["problem"] for path in sorted(data.iterdir()) for line in path.open()]
    tokenizer = make_tokenizer([*problems, BOXED_INSTRUCTION, *[r"So it is \boxed{7}."] * 9], vocab_size=700)
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = []
        for row in range(8):
            problem = problems[int(torch.randint(len(problems), (1,), generator=generator))]
            prompt = encode_prompt(problem, tokenizer, template=FORMS[row % 2], instruction=BOXED_INSTRUCTION)[-40:]
            said = " So so so it is" if row < 4 else " So it is"
            number = 7 if float(torch.rand(1, generator=generator)) < 0.6 else 8
            ids = tokenizer.encode(f"{said} \\boxed{{{number}}}.", add_special_tokens=False)
            rows.append((prompt, [*ids, tokenizer.eos_token_id]))
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        inputs = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full_like(inputs, -100)
        for row, (prompt, completion) in enumerate(rows):
            inputs[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
        base(inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    base.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def experiment(model: Path, tmp_path: Path) -> Path:
    """An experiment file with a budget that completions exceed."""
    path = tmp_path / "small.toml"
    path.write_text(
        f'[model]\npath = "{model}"\n[adapter]\nkind = "none"\n[cache]\nwindow_tokens = 8\nevict_tokens = 2\n'
        "[rollout]\nslots = 8\ntemperature = 0.9\n[eval]\nmax_new_tokens = 24\n[run]\nseed = 3\n"
    )
    return path


def pte_eval(*words: str | Path, folder: Path) -> tuple[dict, dict[str, list[str]]]:
    """Scores and, by problem, the texts of `pte eval`."""
    files = ["--output", str(folder / "scores.json"), "--completions", str(folder / "completions.jsonl")]
    assert main(["eval", *map(str, words), *files]) == 0
    texts: dict[str, list[str]] = {}
    for line in (folder / "completions.jsonl").open():
        row = json.loads(line)
        texts.setdefault(row["id"], []).append(row["completion"])
    return json.loads((folder / "scores.json").read_text()), texts


def harness(task: str, *, experiment: Path, data: Path, chat: bool) -> dict:
    """The harness's results of one of our tasks."""
    manager = TaskManager(
        include_path=str(PROBLEMS_DIRECTORY), include_defaults=False, metadata={"data_dir": str(data)}
    )
    results = simple_evaluate(
        model="pte",
        model_args={"experiment": str(experiment)},
        tasks=[task],
        task_manager=manager,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    assert results is not None
    return results


def texts_of(samples: list[dict]) -> dict[str, list[str]]:
    return {sample["doc"]["id"]: sample["resps"][0] for sample in samples}


def test_prompts_have_the_special_tokens_of_pte_eval_s_prompts(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    plain = BoundedLM(pretrained=str(model))
    text = render_prompt("1 + 1?", tokenizer, template="plain", instruction=BOXED_INSTRUCTION)
    expected = encode_prompt("1 + 1?", tokenizer, template="plain", instruction=BOXED_INSTRUCTION)
    assert plain.tok_encode(text) == plain.tok_encode(tokenizer.bos_token + text) == expected
    assert expected.count(tokenizer.bos_token_id) == 1
    chat = BoundedLM(pretrained=str(model))
    text = chat.apply_chat_template([{"role": "user", "content": f"1 + 1?\n{BOXED_INSTRUCTION}"}])
    expected = encode_prompt("1 + 1?", tokenizer, template="chat", instruction=BOXED_INSTRUCTION)
    assert chat.tok_encode(text) == expected and tokenizer.bos_token_id not in expected


def test_a_conversation_changes_no_text_but_its_own(model: Path) -> None:
    lm = BoundedLM(pretrained=str(model))
    lm.tokenizer.chat_template = "User: {{ messages[0]['content'] }}\n"
    questions = ["1 + 12", "1 + 1", "3 + 33", "3 + 3"]
    for question in questions:
        chat = lm.apply_chat_template([{"role": "user", "content": question}])
        for text in (chat, chat.rstrip(), f"{chat.rstrip()}7 and more"):
            assert lm.tok_encode(text) == lm.tok_encode(text, add_special_tokens=False)
    begin = [lm.tokenizer.bos_token_id]
    for text in [*questions, "User:", "A plain text of a later task", "User: 2?"]:
        assert lm.tok_encode(text) == begin + lm.tok_encode(text, add_special_tokens=False)


@pytest.mark.parametrize("form", FORMS)
def test_texts_and_scores_of_a_task_are_those_of_pte_eval(
    form: str, experiment: Path, data: Path, tmp_path: Path
) -> None:
    scores, texts = pte_eval(
        *(experiment, "--task.kind", "jsonl", "--task.reward", "math", "--task.prompt-template", form),
        *("--task.eval-paths", data / "gsm8k_test.jsonl"),
        folder=tmp_path,
    )
    results = harness("pte_gsm8k", experiment=experiment, data=data, chat=form == "chat")
    assert texts_of(results["samples"]["pte_gsm8k"]) == texts
    assert any("boxed{" in text for (text,) in texts.values())
    row = results["results"]["pte_gsm8k"]
    assert row["score,none"] == row["accuracy,none"] == pytest.approx(scores["gsm8k_test"]["accuracy"])
    assert 0 < row["score,none"] < 1
    assert scores["gsm8k_test"]["evictions"] > 0
    written = results["config"]["pte_experiment"]
    assert written["cache"]["window_tokens"] == 8 and written["run"]["seed"] == 3


def test_the_group_gives_the_numbers_of_the_suite(experiment: Path, data: Path, tmp_path: Path) -> None:
    scores, texts = pte_eval(experiment, "--suite", "math6", "--data-dir", data, folder=tmp_path)
    results = harness("pte_math6", experiment=experiment, data=data, chat=True)
    found = {one.title: results["results"][f"pte_{one.name}"]["score,none"] for one in SUITES["math6"]}
    found["average"] = results["groups"]["pte_math6"]["score,none"]
    assert found == pytest.approx(scores["math6"])
    for one in SUITES["math6"]:
        samples = texts_of(results["samples"][f"pte_{one.name}"])
        assert {name: texts[name] for name in samples} == samples
        assert all(len(group) == (one.samples or 1) for group in samples.values())
        accuracy = results["results"][f"pte_{one.name}"]["accuracy,none"]
        assert accuracy == pytest.approx(scores[one.name]["accuracy"])
    sampled = scores["aime24"]
    assert 0 < sampled["accuracy"] < sampled["pass_at"]["16"], "samples differ, and more of them find more"


def test_task_files_and_suite_name_the_same_files_and_samples() -> None:
    manager = TaskManager(include_path=str(PROBLEMS_DIRECTORY), include_defaults=False)
    entries = {name: entry.cfg for name, entry in manager.task_index.items()}
    assert entries["pte_math6"]["task"] == [f"pte_{one.name}" for one in SUITES["math6"]]
    for one in SUITES["math6"]:
        entry = entries[f"pte_{one.name}"]
        assert entry["dataset_kwargs"] == {"file": one.file} and entry.get("repeats") == one.samples
    assert set(entries) == {"pte_gsm8k", "pte_math6", *(f"pte_{one.name}" for one in SUITES["math6"])}


def test_the_harness_s_own_command_runs_the_model_by_name_on_gsm8k_and_math500(
    experiment: Path, data: Path, tmp_path: Path
) -> None:
    files = ",".join(str(PROBLEMS_DIRECTORY / name) for name in ("gsm8k.yaml", "math6_math500.yaml"))
    words = [
        *(Path(sys.executable).with_name("lm_eval"), "--model", "pte", "--model_args", f"experiment={experiment}"),
        *("--device", "cpu", "--apply_chat_template", "--tasks", files, "--metadata", f"data_dir={data}"),
        *("--output_path", tmp_path / "out.json"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = written_results(tmp_path)
    scores, texts = pte_eval(
        *(experiment, "--task.kind", "jsonl", "--task.reward", "math"),
        *("--task.eval-paths", data / "gsm8k_test.jsonl", data / "math500.jsonl"),
        folder=tmp_path,
    )
    for task, name in (("pte_gsm8k", "gsm8k_test"), ("pte_math500", "math500")):
        assert results["results"][task]["score,none"] == pytest.approx(scores[name]["accuracy"])
    assert len(texts) == 3 + 4 and "pte_math500" in done.stdout


def test_our_module_is_the_harness_s_command_with_the_name_and_the_tasks_known(
    experiment: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        *("--model", "pte", "--model_args", f"experiment={experiment},temperature=0.7", "--batch_size", "4"),
        *("--device", "cpu", "--tasks", "pte_math6", "--limit", "2", "--metadata", f"data_dir={data}"),
        *("--output_path", tmp_path / "out.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, words)])
    harness_command()
    results = written_results(tmp_path)
    assert results["n-samples"]["pte_amc23"] == {"original": 3, "effective": 2}
    assert "score,none" in results["groups"]["pte_math6"]
    assert results["config"]["pte_experiment"]["rollout"]["slots"] == 4
    assert results["config"]["pte_experiment"]["eval"]["temperature"] == 0.7


def written_results(folder: Path) -> dict:
    """What a command of the harness has written."""
    (written,) = folder.glob("out_*.json")
    return json.loads(written.read_text())


def test_a_task_without_its_directory_says_how_to_give_it(experiment: Path) -> None:
    manager = TaskManager(include_path=str(PROBLEMS_DIRECTORY), include_defaults=False)
    with pytest.raises(ValueError, match="--metadata data_dir=DIR"):
        manager.load(["pte_gsm8k"])
