"""`pte plan`: short flags are the experiment's, the table and the file say the same, refusals come first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pte.arguments import PLAN_FLAGS, PlanArguments
from pte.cli import main, parse

pytestmark = pytest.mark.system


def planned(*words: str) -> PlanArguments:
    arguments = parse("plan", words)
    assert isinstance(arguments, PlanArguments)
    return arguments


def test_short_flags_say_what_the_experiment_s_own_say() -> None:
    values = {
        "--model": "embedded",
        "--dtype": "bfloat16",
        "--gradient-mode": "horizon",
        "--window": "64",
        "--evict": "32",
    }
    switch = "--gradient-checkpointing"
    valued = {flag: name for flag, name in PLAN_FLAGS.items() if flag != switch}
    short = [f"{flag}={values.get(flag, '4')}" for flag in valued]
    long = [word for flag, name in valued.items() for word in (name, values.get(flag, "4"))]
    assert planned(*short, switch) == planned(*long, PLAN_FLAGS[switch])
    assert planned(switch).experiment.train.gradient_checkpointing


def test_a_window_alone_evicts_a_quarter_and_a_gpu_alone_computes_in_bfloat16() -> None:
    config = planned("--window", "100", "--gpu-memory", "80GB").experiment
    assert (config.cache.window_tokens, config.cache.evict_tokens, config.model.dtype) == (100, 25, "bfloat16")
    config = planned("--window=100", "--evict", "50", "--gpu", "h100", "--dtype", "float32").experiment
    assert (config.cache.evict_tokens, config.model.dtype) == (50, "float32")
    assert planned("--host-memory", "8GB").experiment.model.dtype == "float32"
    # tyro takes underscores for dashes, and so do the short flags and what follows from them.
    underscores = planned("--cache.window_tokens", "100", "--gpu_memory", "80GB", "--micro_batch=2").experiment
    dashes = planned("--window", "100", "--gpu-memory", "80GB", "--micro-batch", "2").experiment
    assert underscores == dashes


def test_an_experiment_file_says_what_no_flag_says() -> None:
    path = str(Path(__file__).parents[2] / "configs" / "embedded.toml")
    config = planned(path, "--gpu-memory", "80GB", "--group", "8").experiment
    assert (config.model.dtype, config.cache.evict_tokens, config.train.group_size) == ("float32", 4, 8)


def test_the_table_and_the_file_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "embedded", "--window", "16", "--completion", "64", "--gpu", "a100-40gb", "--prompt", "8"]
    assert main(["plan", *words, "--output", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["device_bytes"] == 40 * 10**9
    assert "686,080 parameters, bfloat16, on a GPU with 40.00 GB" in shown
    pte = plan["arms"]["PTE"]
    # 64 slots x (8 + 16) tokens x 3 layers x 2 x 64 numbers x 2 bytes.
    assert pte["rollout_bytes"]["slots"] == 64 * 24 * 3 * 2 * 64 * 2
    assert f"{pte['rollout_bytes']['slots'] / 1e6:.2f} MB" in shown
    assert sum(pte["rollout_bytes"].values()) < pte["rollout_taken_bytes"]
    for label in ("weights", "optimizer", "states", "replay: activations", "longest completion", "tokens/s", "fits"):
        assert label in shown
    assert f"{pte['time']['tokens_per_second']:,.0f}" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "embedded"], "gpu_memory must say what there is, got none; use for example --gpu-memory 80GB"),
        (["--model", "nowhere", "--gpu", "h100"], "model.path must name a directory with a config.json"),
        (["--gpu-memory", "80"], "gpu_memory must be a number with one of the units"),
        (
            ["--gpu-memory", "80GB", "--window", "100", "--evict", "30"],
            "window_tokens must be a multiple of evict_tokens",
        ),
    ],
)
def test_refusals_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        status = main(["plan", *words])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
