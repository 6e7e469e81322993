"""The benchmark's own claims: its baseline is honest, its memory probe sees what is there, its output can be parsed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from pte.bench.__main__ import main
from pte.bench.cpu_arms import evicted_bytes, plain_step, prompts
from pte.bench.figures import FIGURES, cpu_figures
from pte.bench.plain import PlainLoraStep, attach_plain_lora, completion_logprobs, detach_plain_lora, generate
from pte.bench.presets import CPU, Preset
from pte.bench.report import print_report
from pte.bench.run import Measured, measure, torch_threads
from pte.bench.timing import PairedSeconds
from pte.bench.workload import fixed_advantages, grpo_loss, randomize_ups
from pte.learn.loss import BatchTotals
from pte.method.adapter import LINEAR_MAPS, LowRankPair, ThoughtAdapter
from pte.method.schedule import EvictionSchedule
from pte.model.policy import BoundedPolicy, attach_adapter, layer_sizes
from pte.plan.process_memory import peak_growth_bytes, probe_available
from pte.plan.shapes import random_base
from pte.rollout.record import collate
from pte.rollout.replay import Replay

pytestmark = pytest.mark.system

MINI = replace(
    CPU,
    name="mini",
    shape=replace(CPU.shape, hidden_size=32, intermediate_size=48, layers=2, vocab=64, max_positions=256),
    batch=2,
    prompt_tokens=5,
    window_tokens=8,
    evict_tokens=4,
    rank=4,
    global_tokens=3,
    horizon=2,
    lengths=(6, 18),
    figure_tokens=18,
    long_tokens=30,
    warmup_tokens=6,
    rollout_repeats=1,
    step_repeats=1,
    memory_repeats=1,
)
needs_probe = pytest.mark.skipif(not probe_available(), reason="no /proc/self/clear_refs or no glibc")


@pytest.fixture(autouse=True)
def one_thread():
    with torch_threads(1):
        yield


def given_growth(preset: Preset, arm: str, tokens: int) -> int:
    """Readings as a process of its own would give them: 10 MB, and in `chain` the evicted bytes on top."""
    return 10_000_000 + (evicted_bytes(preset, tokens) if arm == "chain" else 0)


def test_a_cpu_run_has_every_figure_and_those_of_a_gpu_are_null() -> None:
    figures = Measured(CPU, rollouts=FAKE, steps=FAKE).figures
    assert list(figures) == [figure.name for figure in FIGURES]
    timed = {"rollout_vs_generate_1024", "train_step_vs_lora_1024"}
    assert {name for name, figure in figures.items() if figure is not None} == timed


FAKE = {1024: PairedSeconds(ours=(2.0, 3.0, 8.0), theirs=(4.0, 3.0, 4.0))}


def test_ratios_are_medians_over_pairs_and_unmeasured_memory_is_null() -> None:
    # Pairs ours / theirs: 0.5, 1, 2; median 1; tokens per second the other way round.
    figures = Measured(CPU, rollouts={1024: PairedSeconds((1.0, 3.0, 2.0), (4.0, 3.0, 4.0))}, steps=FAKE).figures
    assert figures["rollout_vs_generate_1024"] == 2.0
    assert figures["train_step_vs_lora_1024"] == 1.0
    assert figures["train_growth_mb_1024"] is None
    assert figures["train_growth_ratio_4096_horizon"] is None
    assert figures["train_growth_excess_chain_4096"] is None


def test_memory_figures_are_the_ratios_that_they_say() -> None:
    # 4096 tokens: evictions before token 4094, (4094 - 64) // 16 + 1 = 252, of 16 tokens x 4 rows x 2048 bytes;
    # 1024 tokens: (1022 - 64) // 16 + 1 = 60. A reading 1.5 times that difference higher makes 1.5.
    more = (252 - 60) * 16 * 4 * 2048
    assert evicted_bytes(CPU, 4096) - evicted_bytes(CPU, 1024) == more
    measured = Measured(CPU, rollouts=FAKE, steps=FAKE)
    measured.growths = {
        ("chain", 1024): [40_000_000, 41_000_000, 99_000_000],
        ("chain", 4096): [41_000_000 + more * 3 // 2],
        ("horizon", 1024): [30_000_000],
        ("horizon", 4096): [33_000_000],
    }
    assert measured.figures["train_growth_mb_1024"] == 41.0
    assert measured.figures["train_growth_excess_chain_4096"] == 1.5
    assert measured.figures["train_growth_ratio_4096_horizon"] == 1.1


def test_miniature_run_ends_with_one_json_line_of_all_figures(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    output = tmp_path / "kept.json"
    print_report(measure(MINI, read_growth=given_growth), output=output)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rollout, growth, horizon, chain, step = (figure.name for figure in cpu_figures(MINI))
    measured = {name: value for name, value in report["figures"].items() if value is not None}
    assert set(measured) == {rollout, growth, horizon, chain, step}
    assert {figure.name for figure in FIGURES} < set(report["figures"])
    assert all(math.isfinite(value) and value > 0 for value in measured.values())
    assert measured[chain] == pytest.approx(1.0)
    assert measured[horizon] == pytest.approx(1.0)
    assert json.loads(output.read_text()) == report
    assert [row["tokens"] for row in report["rollout"]] == list(MINI.lengths)


def test_plain_lora_equals_our_lora_policy_under_a_full_cache() -> None:
    base = random_base(MINI.shape).double()
    plain_base = random_base(MINI.shape)
    adapted = attach_plain_lora(plain_base, rank=MINI.rank)
    randomize_ups(linear.up for linear in adapted)
    plain_base.double()

    adapter = ThoughtAdapter(layer_sizes(base), kind="lora", rank=MINI.rank)
    pairs = [module for module in adapter.modules() if isinstance(module, LowRankPair)]
    assert len(pairs) == len(adapted) == len(LINEAR_MAPS) * MINI.shape.layers
    for pair, linear in zip(pairs, adapted, strict=True):
        pair.down.data, pair.up.data = linear.down.data.clone(), linear.up.data.clone()
    adapter.double()
    attach_adapter(base, adapter)

    tokens = generate(plain_base, prompts(MINI), new_tokens=11)
    logprobs = completion_logprobs(plain_base, tokens, prompt_tokens=MINI.prompt_tokens, logits_again=False)
    rollout_logprobs = logprobs.detach() + 0.05 * torch.sin(torch.arange(22.0)).view(2, 11).double()
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    shared = {
        "advantages": fixed_advantages(2).double(),
        "completion_mask": mask,
        "totals": BatchTotals(2, tokens=22),
    }
    plain_loss = grpo_loss(logprobs, rollout_logprobs, **shared)
    plain_loss.backward()

    batch = collate(
        prompts(MINI),
        tokens[:, MINI.prompt_tokens :].tolist(),
        stream_seeds=[0, 1],
        temperature=1.0,
    )
    replay = Replay(BoundedPolicy(base, adapter, EvictionSchedule(None)))
    ours = grpo_loss(replay(batch).policy_logprobs, rollout_logprobs, **shared)
    ours.backward()

    assert ours.item() == pytest.approx(plain_loss.item(), abs=1e-12)
    for pair, linear in zip(pairs, adapted, strict=True):
        assert linear.up.grad is not None and linear.up.grad.abs().max() > 1e-6
        torch.testing.assert_close(pair.up.grad, linear.up.grad, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(pair.down.grad, linear.down.grad, rtol=1e-8, atol=1e-12)


def test_merged_sampling_is_the_lora_policy_and_leaves_the_base_as_it_was() -> None:
    step = plain_step(MINI)
    for linear in step.adapted:
        linear.up.data *= 20
    tokens = torch.tensor(step.prompts)
    before = {name: value.clone() for name, value in step.base.state_dict().items()}
    adapted = step.base(input_ids=tokens).logits
    with step.merged():
        merged = step.base(input_ids=tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-6)
    after = step.base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (random_base(MINI.shape)(input_ids=tokens).logits - merged).abs().max() > 1e-3


@needs_probe
def test_memory_probe_sees_a_known_allocation_that_is_gone_afterwards() -> None:
    size = 64 * 2**20

    def work() -> None:
        block = torch.zeros(size, dtype=torch.uint8)
        block += 1

    assert peak_growth_bytes(work) == pytest.approx(size, rel=0.1)
    assert peak_growth_bytes(lambda: None) < size * 0.05


def checkpointed_step(*, micro_batch: int, gradient_checkpointing: bool) -> PlainLoraStep:
    base = random_base(MINI.shape).double()
    settings = {"rank": MINI.rank, "micro_batch": micro_batch, "gradient_checkpointing": gradient_checkpointing}
    return PlainLoraStep(base, prompts(MINI), **settings)


def test_checkpointing_by_micro_batches_is_the_same_update_and_leaves_the_base_in_evaluation_mode() -> None:
    whole = checkpointed_step(micro_batch=2, gradient_checkpointing=False)
    parts = checkpointed_step(micro_batch=1, gradient_checkpointing=True)
    before = [linear.up.detach().clone() for linear in whole.adapted]
    sampled = generate(whole.base, prompts(MINI), new_tokens=9)
    for step in (whole, parts):
        step.update(sampled)
    for start, one, other in zip(before, whole.adapted, parts.adapted, strict=True):
        assert (one.up - start).abs().max() > 1e-6
        torch.testing.assert_close(one.up, other.up, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(one.down, other.down, rtol=1e-4, atol=1e-8)
    assert not parts.base.training and not parts.base.is_gradient_checkpointing


def test_the_backward_of_a_checkpointed_layer_computes_it_again() -> None:
    forwards = {}
    for gradient_checkpointing in (False, True):
        step = checkpointed_step(micro_batch=2, gradient_checkpointing=gradient_checkpointing)
        sampled = generate(step.base, prompts(MINI), new_tokens=9)
        calls: list[object] = []
        step.adapted[0].register_forward_hook(lambda *_, calls=calls: calls.append(None))
        step.update(sampled)
        forwards[gradient_checkpointing] = len(calls)
    assert forwards == {False: 1, True: 2}


def test_a_checkpointed_baseline_scores_a_chunk_of_tokens_at_a_time_and_no_logit_waits(monkeypatch) -> None:
    updates, scored, saved = {}, {}, {}
    # Three tokens at a time; 18 completion tokens are six chunks.
    monkeypatch.setattr("pte.bench.plain.LOGITS_PER_CHUNK", 3 * MINI.shape.vocab)
    for gradient_checkpointing in (False, True):
        step = checkpointed_step(micro_batch=2, gradient_checkpointing=gradient_checkpointing)
        sampled = generate(step.base, prompts(MINI), new_tokens=9)
        tokens: list[int] = []
        held: list[int] = []

        def keep(tensor: torch.Tensor, held: list[int] = held) -> torch.Tensor:
            held.append(tensor.numel() if tensor.shape[-1] == MINI.shape.vocab else 0)
            return tensor

        head = step.base.get_output_embeddings()
        head.register_forward_hook(lambda _, __, out, tokens=tokens: tokens.append(out[..., 0].numel()))
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs = completion_logprobs(
                step.base, sampled, prompt_tokens=MINI.prompt_tokens, logits_again=gradient_checkpointing
            )
        saved[gradient_checkpointing] = sum(held)
        tokens.clear()
        step.update(sampled)
        scored[gradient_checkpointing] = tokens
        updates[gradient_checkpointing] = [logprobs, *(linear.up for linear in step.adapted)]
    assert scored == {False: [18], True: [3] * 12}, "twice, in forward and backward"
    assert saved[False] >= 18 * MINI.shape.vocab and saved[True] == 0
    for whole, chunked in zip(*updates.values(), strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-10, atol=1e-12)


def test_plain_lora_comes_off_again() -> None:
    base = random_base(MINI.shape)
    tokens = torch.tensor(prompts(MINI))
    logits = base(input_ids=tokens).logits
    adapted = attach_plain_lora(base, rank=MINI.rank)
    randomize_ups(linear.up for linear in adapted)
    assert not torch.equal(base(input_ids=tokens).logits, logits)
    detach_plain_lora(base)
    assert torch.equal(base(input_ids=tokens).logits, logits)


def test_output_in_a_missing_directory_is_refused_before_any_work(capsys, tmp_path) -> None:
    assert main(["--output", str(tmp_path / "absent" / "out.json")]) == 2
    assert "make the directory first" in capsys.readouterr().err


def test_a_preset_survives_its_way_to_another_process() -> None:
    assert Preset.from_json(MINI.to_json()) == MINI


def test_preset_with_too_few_positions_or_an_untimed_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="max_positions must hold"):
        replace(MINI, long_tokens=4096)
    with pytest.raises(ValueError, match="figure_tokens must be one of lengths"):
        replace(MINI, figure_tokens=7)
