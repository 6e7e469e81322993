"""The dry run: the longest prompt with the longest completion, nothing written, nothing kept."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pte import dry_run as dry_run_module
from pte.cli import main
from pte.dry_run import dry_run, planned_rollout
from pte.plan.process_memory import probe_available
from pte.rollout.generate import RolloutEngine
from pte.rollout.replay import Replay
from short_runs import equal, open_short, parameters, short_config, short_flags, text_model, write_problems

pytestmark = pytest.mark.system


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, int, int]]]:
    """Sequences, prompt tokens and completion tokens of every rollout and replay."""
    shapes: dict[str, list[tuple[int, int, int]]] = {"rollout": [], "replay": []}
    run, forward = RolloutEngine.run, Replay.forward

    def watched_run(self: RolloutEngine, requests, **options):
        rollouts = run(self, requests, **options)
        completion = {len(rollout.completion_ids) for rollout in rollouts}
        assert completion == {self.max_new_tokens}, "the worst case never stops early"
        shapes["rollout"].append((len(rollouts), len(requests[0].prompt_ids), self.max_new_tokens))
        return rollouts

    def watched_forward(self: Replay, batch, **options):
        shapes["replay"].append((*batch.completion_ids.shape, batch.prompt_ids.shape[1]))
        return forward(self, batch, **options)

    monkeypatch.setattr(RolloutEngine, "run", watched_run)
    monkeypatch.setattr(Replay, "forward", watched_forward)
    return shapes


def test_the_worst_case_is_the_longest_prompt_with_the_longest_completion(tmp_path: Path, seen: dict) -> None:
    path = write_problems(tmp_path / "p.jsonl", 8)
    rows = path.read_text().splitlines()
    # The order of seed 0 is 5, 4, 1, 3, 2, ...: the longest does not come first.
    long = rows[2].replace('"problem": "', '"problem": "A1 B2 C3 D4 ')
    path.write_text("\n".join([*rows[:2], long, *rows[3:]]))
    config = short_config(
        model__path=str(text_model(tmp_path)),
        task__kind="jsonl",
        task__train_path=str(path),
        task__boxed_instruction=False,
        distill__source="teacher",
        train__kl_beta=0.1,
        rollout__slots=5,
    )
    report = dry_run(config)
    # <bos>, 4 constants, 4 x 4 statement tokens, ? and the variable: 23, and 4 more in the long one.
    assert "prompt 27 tokens" in report
    assert seen["rollout"] == [(5, 27, 56), (4, 27, 56)], "the policy, then the teacher with its full cache"
    # distill.micro_batch_size 16; GRPO 8, once under the policy and once under the reference.
    assert seen["replay"] == [(16, 56, 27), (8, 56, 27), (8, 56, 27)]


def test_the_report_gives_peaks_the_formula_of_the_cache_and_what_to_lower() -> None:
    report = dry_run(short_config())
    assert re.search(r"rollout: \d+\.\d s \(eager\), cache", report), "how tokens are computed"
    assert len(re.findall(r"process or device peak \d+ MiB", report)) == 3
    # 8 sequences x (23 + 16) tokens x 3 layers x keys and values x bytes.
    _, session = open_short(double=False)
    expected = 8 * (23 + 16) * session.policy.cache_shape.token_bytes(torch.float32) / 2**20
    assert f"the cache is 8 x (prompt + 16 kept tokens) = {expected:.1f} MiB whatever the completion's length" in report
    assert f"cache {expected:.1f} MiB, process" in report, "what the rollout really took"
    assert "to lower the peak: rollout.slots, train.micro_batch_size, cache.window_tokens" in report


def test_float8_names_what_computes_it_and_halves_the_cache_but_for_its_scales() -> None:
    report = dry_run(short_config(model__dtype="float8"))
    assert re.search(r"rollout: \d+\.\d s \(eager, float8 emulated on cpu\), cache", report)
    # 8 sequences x (23 + 16) tokens x 3 layers x keys and values of 2 heads, 32 bytes each and 2 for its scale.
    expected = 8 * (23 + 16) * 3 * 2 * 2 * (32 + 2) / 2**20
    assert f"{expected:.1f}" != f"{2 * expected:.1f}", "bfloat16 would be seen"
    assert f"the cache is 8 x (prompt + 16 kept tokens) = {expected:.1f} MiB" in report
    assert f"cache {expected:.1f} MiB, process" in report


def test_it_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sessions = []
    opened = dry_run_module.open_session
    monkeypatch.setattr(
        dry_run_module, "open_session", lambda config, **given: sessions.append(opened(config, **given)) or sessions[0]
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", *short_flags()]) == 0
    assert "worst case: prompt 23 tokens" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    _, fresh = open_short(double=False, moved=False)
    before, after = fresh.policy.base.state_dict(), sessions[0].policy.base.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_leaves_a_saved_adapter_that_it_starts_from_alone(tmp_path: Path) -> None:
    from pte.checkpoint import load_adapter, save_adapter

    _, session = open_short(double=False)
    save_adapter(tmp_path / "adapter", session.adapter_tensors(), metadata=session.metadata())
    dry_run(short_config(adapter__checkpoint=str(tmp_path / "adapter")))
    assert equal(load_adapter(tmp_path / "adapter")[0], parameters(session))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "set train.gradient_checkpointing, or lower rollout.slots"),
        ({"train__gradient_checkpointing": True}, "; lower rollout.slots"),
        ({"distill__steps": 1}, "set distill.gradient_checkpointing, or lower rollout.slots"),
    ],
)
def test_an_update_without_memory_is_told_to_compute_layers_again(
    changes: dict[str, object], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(torch.Tensor, "backward", no_memory)
    with pytest.raises(RuntimeError, match="worst case does not fit") as caught:
        dry_run(short_config(**{"distill__steps": 0, **changes}))
    assert remedy in str(caught.value)
    assert ("set " in str(caught.value)) == remedy.startswith("set ")


def test_a_worst_case_without_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(RolloutEngine, "run", no_memory)
    with pytest.raises(
        RuntimeError,
        match=r"worst case does not fit: CUDA out of memory. Tried .*GiB.; done so far: worst case: prompt 23.*; lower "
        r"rollout.slots, train.micro_batch_size, cache.window_tokens or rollout.max_new_tokens, in this order",
    ):
        dry_run(short_config())


def test_what_a_run_refuses_a_dry_run_refuses_too() -> None:
    with pytest.raises(ValueError, match="prompt plus completion must stay within the model's 2048 trained positions"):
        dry_run(short_config(rollout__max_new_tokens=4000))
    with pytest.raises(ValueError, match="adapter.kind must be trainable"):
        dry_run(short_config(adapter__kind="none"))


@pytest.mark.parametrize("policy", ["h2o", "rkv"])
def test_the_worst_case_of_a_warm_start_chooses_what_leaves(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = []
    forward = Replay.forward

    def watched(self: Replay, batch, **options):
        records.append(batch.evicted_tokens is not None)
        return forward(self, batch, **options)

    monkeypatch.setattr(Replay, "forward", watched)
    report = dry_run(short_config(cache__policy=policy))
    # Traces have no record, GRPO's rollouts have one.
    assert records == [False, True] and "grpo: one update" in report


def test_a_process_plans_its_own_share_of_a_step_and_not_the_whole() -> None:
    config, session = open_short(double=False)
    prompt = (1,) * 23
    half = replace(config, rollout=replace(config.rollout, slots=4), train=replace(config.train, prompts_per_step=1))
    share = planned_rollout(session.policy, config, prompt, sequences=4)
    assert config.train.prompts_per_step * config.train.group_size == 8
    assert share == planned_rollout(session.policy, half, prompt, sequences=4)
    assert share < planned_rollout(session.policy, config, prompt, sequences=8)


def test_every_phase_is_held_against_its_plan() -> None:
    report = dry_run(short_config(distill__gradient_mode="exact"))
    rollout, distill, grpo = re.findall(r"beyond what was there before: (.*)", report)
    if probe_available():
        ratios = [float(found[1]) for text in (rollout, grpo) if (found := re.search(r"\((\d+\.\d\d)\)", text))]
        # So small a run is mostly what libraries load; how near plans are is measured in tests/plan.
        assert len(ratios) == 2 and all(0 < ratio < 1.5 for ratio in ratios)
    assert re.match(r"planned \d+\.\d MiB, ", rollout) and re.match(r"planned \d+\.\d MiB, ", grpo)
    assert distill.startswith("not planned in this gradient mode, ")
