"""The command `pte`: help, one configuration from file and flags, and every bad input answered before any work.

A refusal is one line on stderr, or a box where the parser itself refuses (a flag's name, type or rule); its text is
compared without the box.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, Qwen2Config, Qwen3Config

from pte.arguments import ARGUMENTS, EXAMPLES
from pte.checkpoint import save_adapter
from pte.cli import main, parse
from short_runs import open_short, short_flags, text_model, write_problems, write_traces

pytestmark = pytest.mark.system


def flat(text: str) -> str:
    """Text without the parser's box, colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|-{9,}", " ", text).split())


def status_of(words: Sequence[str]) -> tuple[int, bool]:
    """Exit status of the command, as the shell would see it, and whether the parser ended it."""
    try:
        return main(words), False
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code, True


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail with status 2, without a run directory, and returns what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        capsys.readouterr()
        status, by_parser = status_of([str(word) for word in words])
        assert status == 2
        assert not (tmp_path / "runs").exists(), "a refused run leaves no directory behind"
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        if not by_parser:
            assert err.startswith(f"pte {words[0]}: ") and err.count("\n") == 1, f"one line, got {err!r}"
        return flat(err)

    return run


def test_the_overview_names_every_command_and_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from pte.cli import main; code = main(['--help']);"
        "print(code, sorted({'torch', 'transformers', 'matplotlib', 'pte.commands'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.splitlines()[-1] == "0 []"
    assert all(re.search(rf"^  {command} ", shown.stdout, re.MULTILINE) for command in ARGUMENTS)
    assert "examples:" in shown.stdout


def test_help_of_a_command_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\nfrom pte.cli import main\ntry: main(['train', '--help'])\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("command", ARGUMENTS)
def test_the_help_of_a_command_shows_its_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = flat(capsys.readouterr().out)
    assert shown.startswith(f"usage: pte {command}")
    for example in EXAMPLES[command].splitlines():
        assert flat(example) in shown


def test_without_a_command_there_is_the_overview_and_a_status_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: pte COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "answer"), [("trian", "did you mean 'train'?"), ("evaluate", "did you mean 'eval'?"), ("q", "--help")]
)
def test_a_misspelt_command_suggests_another(command: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"pte: unknown command {command!r}; ") and answer in err


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "e.toml"
    path.write_text("[train]\nsteps = 5\ngroup_size = 4\n[run]\nresume = true\n")
    config = parse("train", [str(path), "--train.steps", "7", "--run.no-resume"]).experiment
    assert (config.train.steps, config.train.group_size, config.run.resume) == (7, 4, False)
    assert config.adapter.rank == 32


# What the parser refuses: a box on stderr, status 2 by SystemExit.
BAD_FLAGS = {
    "window not a multiple": (
        ["--cache.window-tokens", "10", "--cache.evict-tokens", "4"],
        "window_tokens must be a multiple of evict_tokens (4), got 10; use 12",
    ),
    "block of zero": (["--cache.evict-tokens", "0"], "evict_tokens must be at least 1 token, got 0; use for example"),
    "window of zero": (["--cache.window-tokens", "0"], "window_tokens must be at least 1 token, got 0"),
    "negative window": (["--cache.window-tokens", "-8"], "window_tokens must be at least 1 token, got -8"),
    "negative block": (["--cache.evict-tokens=-4"], "evict_tokens must be at least 1 token, got -4"),
    "negative budget of tokens": (["--rollout.max-new-tokens", "-1"], "max_new_tokens must be at least 1, got -1"),
    "fractional window": (["--cache.window-tokens", "0.5"], "--cache.window-tokens: invalid literal for int()"),
    "fractional block": (["--cache.evict-tokens", "2.5"], "--cache.evict-tokens INT Reasoning tokens evicted at once"),
    "group of one": (
        ["--train.group-size", "1"],
        "group_size must be at least 2, got 1; use for example 8 (a group of",
    ),
    "temperature 0": (["--rollout.temperature", "0"], "temperature must be above 0, got 0.0; use 1.0 (greedy rollouts"),
    "unknown flag": (["--train.stepz", "3"], "Unrecognized options: --train.stepz, 3 Perhaps you meant: --train.steps"),
    "wrong type": (
        ["--train.learning-rate", "fast"],
        "--train.learning-rate: could not convert string to float: 'fast'",
    ),
    "unknown choice": (
        ["--train.loss", "ppo"],
        "'--train.loss'. Expected one of ('grpo', 'dr_grpo', 'dapo', 'gspo')",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_refused_with_its_rule(case: str, refused: Callable[..., str]) -> None:
    flags, message = BAD_FLAGS[case]
    said = refused("train", *flags)
    assert message in said
    assert "see pte train --help" in said or "run pte train --help" in said


@pytest.mark.parametrize("command", ["train", "eval", "generate", "compare"])
@pytest.mark.parametrize("flag", ["--rollout.top-p", "--top_k"])
def test_top_p_and_top_k_are_refused_with_the_reason(command: str, flag: str, refused: Callable[..., str]) -> None:
    said = refused(command, flag, "0.9")
    assert f"{flag} is not offered: sampling would follow another distribution than the one that is scored; use" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 3", "e.toml: [train] has no key 'step'; did you mean 'steps'?"),
        ("[cahce]\nwindow_tokens = 8", "unknown section [cahce]; did you mean 'cache'?"),
        ("[rollout]\ntop_p = 0.9", "[rollout] top_p is not offered"),
        ("[train]\nsteps = '3'", "[train] steps must be an integer, got '3' (str); write it without quotes"),
        ("[cache]\nwindow_tokens = 0.5", "[cache] window_tokens must be an integer, got 0.5 (float)"),
        ("[train\n", "the experiment file must be TOML"),
        (
            "[cache]\nwindow_tokens = 10\nevict_tokens = 4",
            "window_tokens must be a multiple of evict_tokens (4), got 10",
        ),
    ],
)
def test_a_bad_experiment_file_is_refused(tmp_path: Path, refused: Callable[..., str], text: str, message: str) -> None:
    (tmp_path / "e.toml").write_text(text)
    assert message in refused("train", "e.toml")


def test_a_missing_experiment_file_is_refused(refused: Callable[..., str]) -> None:
    assert "the experiment file must exist, got 'nowhere.toml'; see the files in configs/" in refused(
        "compare", "nowhere.toml"
    )


def test_what_a_command_needs_and_lacks_is_said_before_any_work(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "adapter.kind must be trainable" in refused("train", "--adapter.kind", "none")
    assert "distill.steps must be at least 1 for pte distill, got 0" in refused("distill", "--distill.steps", "0")
    assert "pte generate needs problems, got none; set --prompt TEXT" in refused("generate")
    assert "pte compare needs the PTE arm's experiment" in refused("compare", "--cache.policy", "none")
    assert "pte compare needs distill.steps and train.steps" in refused("compare", "--train.steps", "0")
    assert "arm from the base, got adapter.checkpoint" in refused(
        "compare", "--adapter.checkpoint", saved_adapter(tmp_path)
    )
    for flag in ("--output", "--completions"):
        assert "the directory of an output file must exist, got 'no/where.json'; make it first" in refused(
            "eval", *short_flags(), flag, "no/where.json"
        )


def test_what_would_be_ignored_is_refused(refused: Callable[..., str]) -> None:
    said = refused("train", "--task.train-path", "p.jsonl")
    assert "task.train_path must be left out with task.kind 'chained'" in said and "got 'p.jsonl'" in said
    said = refused("train", "--train.steps", "3", "e.toml")
    assert "the experiment file must come first, got 'e.toml' later; write pte train e.toml and then the flags" in said


def test_an_empty_prompt_and_unknown_words_are_refused(refused: Callable[..., str]) -> None:
    base = [*short_flags(), "--adapter.kind", "none"]
    assert "problem 'prompt-0' must not be empty, got ''; write its text" in refused("generate", *base, "--prompt", "")
    assert "problem 'prompt-1' must be text that the model's tokenizer can encode, got 'hello'" in refused(
        "generate", *base, "--prompt", "A3 B5 #1 A B C ? C", "hello"
    )


@pytest.mark.parametrize(
    ("command", "changes", "tokens"),
    [
        ("train", {"rollout__max_new_tokens": 2026}, "23 + 2026"),
        ("train", {"eval__max_new_tokens": 2026}, "23 + 2026"),
        ("distill", {"distill__source": "teacher", "rollout__max_new_tokens": 2026}, "23 + 2026"),
        ("compare", {"rollout__max_new_tokens": 2026}, "23 + 2026"),
        ("eval", {"eval__max_new_tokens": 2026}, "23 + 2026"),
    ],
)
def test_prompt_plus_completion_beyond_the_trained_positions_is_refused_before_any_step(
    refused: Callable[..., str], command: str, changes: dict[str, object], tokens: str
) -> None:
    said = refused(command, *short_flags(**changes))
    assert f"prompt plus completion must stay within the model's 2048 trained positions, got {tokens} tokens" in said
    assert "set allow_beyond_trained_positions" in said


def test_more_than_the_trained_positions_is_allowed_by_name(tmp_path: Path) -> None:
    flags = short_flags(
        rollout__max_new_tokens=2026,
        distill__steps=1,
        train__steps=0,
        eval__problems=1,
        run__output_dir=tmp_path,
        model__allow_beyond_trained_positions=True,
    )
    assert main(["train", *flags]) == 0


def jsonl_flags(tmp_path: Path, **changes: object) -> list[str]:
    """A JSONL task on the reasoner with a chat template; the problem file is made if there is none."""
    if not (tmp_path / "model").exists():
        text_model(tmp_path)
    if not (tmp_path / "p.jsonl").exists():
        write_problems(tmp_path / "p.jsonl")
    return short_flags(
        **{
            "model__path": tmp_path / "model",
            "task__kind": "jsonl",
            "task__train_path": tmp_path / "p.jsonl",
            "task__boxed_instruction": False,
            "distill__steps": 0,
            "train__steps": 1,
            **changes,
        }
    )


GOOD_LINE = '{"id": "a", "problem": "A3 B5 #1 A B C ? C", "answer": "8", "source": "s"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "problem file must exist, got"),
        ("", "p.jsonl: a problem file must hold at least one problem, got none"),
        (GOOD_LINE + "{nonsense", "p.jsonl, line 2: each line must be a JSON object, got '{nonsense'"),
        (GOOD_LINE + "[1]", "p.jsonl, line 2: each line must be a JSON object"),
        (GOOD_LINE * 2, "p.jsonl, line 2: id must be unique, got 'a', which line 1 has; rename one or drop it"),
        (GOOD_LINE.replace("answer", "anwser"), "p.jsonl, line 1: keys must be id, problem, answer, source, got the"),
        (GOOD_LINE.replace('"8"', "8"), "p.jsonl, line 1: answer must be a string, got 8; put the value in quotation"),
        (GOOD_LINE.replace("A3 B5 #1 A B C ? C", " "), "p.jsonl, line 1: problem must not be empty"),
    ],
)
def test_a_bad_problem_file_is_named_with_its_line(
    tmp_path: Path, refused: Callable[..., str], content: str | None, message: str
) -> None:
    flags = jsonl_flags(tmp_path)
    (tmp_path / "p.jsonl").unlink()
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    assert message in refused("train", *flags)


def test_a_bad_file_of_evaluation_problems_or_traces_is_found_before_training(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "e.jsonl").write_text(GOOD_LINE * 2)
    flags = jsonl_flags(tmp_path, task__eval_paths=(tmp_path / "e.jsonl",))
    assert "e.jsonl, line 2: id must be unique" in refused("train", *flags)
    (tmp_path / "t.jsonl").write_text('{"id": "a"}\n')
    assert 't.jsonl, line 1: a trace must be a JSON object with "id" and "trace"' in refused(
        "train", *jsonl_flags(tmp_path, task__traces_path=tmp_path / "t.jsonl")
    )
    said = refused("train", *jsonl_flags(tmp_path, distill__steps=1))
    assert "distill.source 'traces' needs right traces, and this task has none; set distill.source to 'teacher'" in said
    traces = write_traces(tmp_path / "t.jsonl", 4)
    assert main(["train", *jsonl_flags(tmp_path, task__traces_path=traces, distill__steps=1, train__steps=0)]) == 0


REWARDS = """
def raises(completions, **columns):
    raise KeyError("ground_truth")

def one(completions, **columns):
    return [1.0]

def nan(completions, **columns):
    return [float("nan")] * len(completions)

def nothing(completions, **columns):
    return None

def text(completions, **columns):
    return ["good"] * len(completions)

def later(completions, **columns):
    if any(completions):
        raise RuntimeError("only with text")
    return [0.0] * len(completions)

number = 3
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "reward function rewards:raises must score every completion, but raised KeyError: 'ground_truth'"),
        ("one", "reward function rewards:one must return one reward for each completion (2), got 1; return a list"),
        ("nan", "reward function rewards:nan must return finite numbers, got nan at index 0; return 0.0 where"),
        ("nothing", "reward function rewards:nothing must return a list of numbers, got NoneType"),
        ("text", "reward function rewards:text must return finite numbers, got 'good' at index 0"),
        ("nans", "reward must name a function of rewards, got 'rewards:nans'; did you mean rewards:nan?"),
        ("number", "reward must name a function of rewards, got 'rewards:number'"),
    ],
)
def test_a_reward_function_that_cannot_score_is_found_before_any_work(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    assert message in refused("train", *jsonl_flags(tmp_path, task__reward=f"rewards:{name}"))


def test_a_reward_function_that_fails_later_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    flags = jsonl_flags(
        tmp_path, task__reward="rewards:later", distill__steps=1, distill__source="teacher", run__output_dir=tmp_path
    )
    assert main(["train", *flags]) == 2
    assert "rewards:later must score every completion, but raised RuntimeError" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-000001\n"


def test_a_reward_module_that_is_not_there_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("train", *jsonl_flags(tmp_path, task__reward="no_such_module:reward"))
    assert "reward must name a module that can be imported, got 'no_such_module:reward'" in said
    assert "reward must be 'math', 'exact' or 'module:function', got 'mth'" in refused(
        "train", *jsonl_flags(tmp_path, task__reward="mth")
    )


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = text_model(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    said = refused("train", *short_flags(model__path=path))
    assert f"the tokenizer must have an end token, got none in '{path}'; set eos_token in tokenizer_config.json" in said


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_layer=1, n_embd=8, n_head=1), "model type 'gpt2' is not supported"),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0, num_hidden_layers=2),
            "model type 'qwen2' with sliding-window layers (sliding_window=8) is not supported",
        ),
        (
            Qwen3Config(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, num_hidden_layers=1
            ),
            "rotary embedding of type 'dynamic' is not supported",
        ),
    ],
    ids=["architecture", "sliding window", "rotary"],
)
def test_an_unsupported_model_is_refused_by_name(
    tmp_path: Path, refused: Callable[..., str], config: object, message: str
) -> None:
    path = text_model(tmp_path)
    config.save_pretrained(path)
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer.pop("auto_map", None)
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    said = refused("train", *short_flags(model__path=path))
    assert message in said and "; use " in said


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = text_model(tmp_path)
    weights = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    smaller = {
        name: tensor[:100] if len(tensor) == config["vocab_size"] else tensor for name, tensor in weights.items()
    }
    save_file({name: tensor.clone() for name, tensor in smaller.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    said = refused("train", *short_flags(model__path=path))
    assert re.search(r"the tokenizer must be the model's own, got token \d+ for a model of 100 tokens; use the", said)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("train", *short_flags(model__path=tmp_path / "nowhere"))
    assert (
        f"model.path must name a directory with a Transformers checkpoint, or one on the hub, got '{tmp_path}" in said
    )
    assert "models/none" in refused("eval", *short_flags(model__path="models/none"))


def test_code_in_a_checkpoint_runs_only_when_the_user_asks_for_it(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = text_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    refused("eval", *short_flags(model__path=path))
    assert not (tmp_path / "ran").exists()


def saved_adapter(tmp_path: Path, **changes: object) -> Path:
    """A saved adapter whose update is far from zero."""
    _, session = open_short(double=False, **changes)
    directory = tmp_path / "adapter"
    save_adapter(directory, session.adapter_tensors(), metadata=session.metadata())
    return directory


def test_a_saved_adapter_brings_its_options_and_a_flag_against_them_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = saved_adapter(tmp_path, adapter__rank=6, adapter__targets=("o_proj", "v_proj"), adapter__kind="global_only")
    for words in (["--adapter.checkpoint", str(path)], [f"--adapter.checkpoint={path}"]):
        adapter = parse("eval", words).experiment.adapter
        assert (adapter.rank, set(adapter.targets), adapter.kind) == (6, {"o_proj", "v_proj"}, "global_only")
        assert adapter.checkpoint == str(path)
    experiment = tmp_path / "e.toml"
    experiment.write_text(f"[adapter]\ncheckpoint = {str(path)!r}\nrank = 32\n")
    assert parse("eval", [str(experiment)]).experiment.adapter.rank == 6
    said = refused("eval", "--adapter.checkpoint", path, "--adapter.rank", "4")
    assert "adapter.rank must be that of the adapter that is loaded (6), got 4; set adapter.rank to 6 or start" in said
    assert "adapter.checkpoint needs an adapter to fill" in refused(
        "eval", "--adapter.checkpoint", path, "--adapter.kind", "none"
    )


def test_a_saved_adapter_changes_what_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved_adapter(tmp_path, adapter__kind="lora")
    texts = []
    for extra in ([], ["--adapter.checkpoint", str(path)]):
        output = tmp_path / "completions.jsonl"
        flags = ["--cache.window-tokens", "16", "--cache.evict-tokens", "4", "--task.num-statements", "4"]
        limits = ["--eval.problems", "4", "--eval.max-new-tokens", "56", "--completions", str(output)]
        assert main(["eval", *flags, *limits, *extra]) == 0
        texts.append(output.read_text())
        assert "decode: eager\n" in capsys.readouterr().out
    assert texts[0] != texts[1]


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = saved_adapter(tmp_path)
    model = text_model(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"] += 0.1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    said = refused("eval", "--adapter.checkpoint", path, "--model.path", model)
    assert f"the adapter must be trained on the loaded base '{model}'" in said and "got one for 'embedded'" in said


def truncated(path: Path) -> None:
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(path: Path) -> None:
    file = path / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(bytes(content))


def pickled(path: Path) -> None:
    (path / "adapter.safetensors").write_bytes(pickle.dumps({"up": 1.0}))


def torch_pickled(path: Path) -> None:
    torch.save({"up": torch.ones(2)}, path / "adapter.safetensors")


def foreign(path: Path) -> None:
    save_file({"up": torch.ones(2)}, path / "adapter.safetensors")


def empty(path: Path) -> None:
    (path / "adapter.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is corrupt or truncated"),
        (corrupt, "is corrupt: it does not have the digest it was saved with; use another checkpoint"),
        (pickled, "only safetensors are read, got a pickle in"),
        (torch_pickled, "only safetensors are read, got a pickle in"),
        (foreign, "must be adapter tensors written by pte, got other safetensors; use a pte checkpoint"),
        (empty, "is corrupt or truncated"),
        (shutil.rmtree, "is missing: there is nothing to load; check the path"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_damaged_adapter_is_refused(
    tmp_path: Path, refused: Callable[..., str], command: str, damage: Callable[[Path], None], message: str
) -> None:
    path = saved_adapter(tmp_path)
    damage(path)
    assert message in refused(command, "--adapter.checkpoint", path)


def test_an_adapter_of_another_format_version_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    _, session = open_short(double=False)
    metadata = replace(session.metadata(), format_version=99)
    save_adapter(tmp_path / "adapter", session.adapter_tensors(), metadata=metadata)
    assert "must have format version 1, got 99; read it with pte" in refused(
        "generate", "--adapter.checkpoint", tmp_path / "adapter", "--prompt", "A3"
    )


def test_a_run_directory_that_is_taken_or_missing_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    taken = tmp_path / "elsewhere" / "run"
    taken.mkdir(parents=True)
    (taken / "notes.txt").write_text("mine")
    flags = short_flags(run__output_dir=tmp_path / "elsewhere")
    for command in ("train", "compare"):
        said = refused(command, *flags)
        assert f"run directory must be new, got '{taken}'; go on with that run by --run.resume, or set another" in said
        said = refused(command, *short_flags(run__output_dir=tmp_path / "elsewhere", run__name="new"), "--run.resume")
        assert "run directory must hold a run to resume" in said
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    assert [path.name for path in taken.parent.iterdir()] == ["run"]


def test_generate_writes_the_completion_of_each_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write_problems(tmp_path / "p.jsonl", 2)
    words = ["--adapter.kind", "none", "--cache.policy", "none", "--eval.max-new-tokens", "64"]
    assert main(["generate", *words, "--prompt", "A3 B5 #1 A B C #2 C A D ? D", "--problems", str(problems)]) == 0
    shown = capsys.readouterr().out
    # C = 3 + 5 = 8, D = 8 + 3 = 11 mod 10 = 1: two statements of ten tokens, then the answer.
    assert "=> D 1\n24 tokens, 0 evictions, ended by stop" in shown
    assert shown.count("44 tokens, 0 evictions, ended by stop") == 2
    assert "prompt-0" in shown


def test_eval_writes_scores_and_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, completions = tmp_path / "scores.json", tmp_path / "completions.jsonl"
    flags = short_flags(cache__policy="none", eval__problems=3)
    words = ["--adapter.kind", "none", "--output", str(scores), "--completions", str(completions)]
    completions.write_text("old\n")
    assert main(["eval", *flags, *words]) == 0
    written = json.loads(scores.read_text())["chained"]
    assert (written["problems"], written["accuracy"], written["evictions"]) == (3, 1.0, 0)
    rows = [json.loads(line) for line in completions.read_text().splitlines()]
    assert [row["right"] for row in rows] == [True] * 3
    assert all(row["completion"].endswith(row["answer"]) and row["tokens"] == 44 for row in rows)
    assert "100.0 %" in capsys.readouterr().out


def test_eval_warns_when_its_problems_are_among_those_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = write_problems(tmp_path / "p.jsonl", 4)
    other = write_problems(tmp_path / "other.jsonl", 4, seed=8)
    flags = jsonl_flags(tmp_path, task__eval_paths=(problems,), eval__max_new_tokens=4, eval__problems=1)
    for training, warned in ((problems, True), (other, False)):
        assert main(["eval", *flags, "--train-path", str(training)]) == 0
        assert ("warning" in flat(capsys.readouterr().out)) is warned


def test_eval_without_evaluation_problems_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "task.eval_paths must name problem files for pte eval, got none; set --task.eval-paths FILE" in refused(
        "eval", *jsonl_flags(tmp_path)
    )


def test_an_interrupted_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pte import commands

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    assert main(["train"]) == 130
    assert "interrupted; a run goes on with --run.resume" in capsys.readouterr().err


def test_warnings_of_a_run_reach_the_user_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = short_flags(run__output_dir=tmp_path, rollout__max_new_tokens=20, distill__steps=0, train__steps=2)
    assert main(["train", *flags]) == 0
    shown = flat(capsys.readouterr().out)
    assert shown.count("100% of the completions were cut off at 20 tokens; raise rollout.max_new_tokens") == 1
    assert shown.count("groups tie (reward 0): this step has no gradient") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["evaluations"]["chained"]["problems"] == 4
    assert math.isfinite(summary["last_metrics"]["loss"])


def test_files_for_generated_problems_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["eval", "--task.eval-paths", "held.jsonl", "--run.output-dir", str(tmp_path)])
    assert status == 2
    assert "task.eval_paths must be left out with task.kind 'chained'" in capsys.readouterr().err


def test_an_experiment_file_behind_the_flags_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run.name", "x", "configs/embedded.toml"]) == 2
    assert "the experiment file must come first, got 'configs/embedded.toml' later" in capsys.readouterr().err
