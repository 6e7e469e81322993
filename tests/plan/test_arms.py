"""Largest batch, longest completion and times are those of the formulas; more of anything never needs less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pte.config import CacheConfig, ExperimentConfig, ModelConfig, RolloutConfig, TrainConfig
from pte.config_file import load_experiment
from pte.method.schedule import EvictionSchedule
from pte.plan.arms import ArmPlan, largest, plan_arms, planned_policy, planned_work, rollout_fits, update_fits
from pte.plan.machine import CONTEXT_BYTES, Machine, planned_machine
from pte.plan.model_sizes import ModelSizes, model_sizes
from pte.plan.report import as_json, sentences
from pte.plan.rollout_memory import rollout_memory
from pte.plan.roofline import DecodeWork, DeviceRates, step_bound_seconds, update_flops
from pte.plan.shapes import SHAPES, model_config
from pte.plan.update_memory import later_stretches, update_memory

ROOT = Path(__file__).parents[2]
RECIPES = {"3b": "qwen2.5-3b", "7b": "qwen2.5-7b", "8b": "r1-distill-llama-8b"}
SIZES = ModelSizes.of(model_config(SHAPES["3b"]))
EXPERIMENT = ExperimentConfig(
    model=ModelConfig(dtype="bfloat16"),
    cache=CacheConfig(window_tokens=512, evict_tokens=128),
    rollout=RolloutConfig(max_new_tokens=3072, slots=64),
    train=TrainConfig(prompts_per_step=8, group_size=8, micro_batch_size=2),
)
GPU = planned_machine(gpu="h100", gpu_memory=None, host_memory=None, bandwidth=None, flops=None)


def arms(config: ExperimentConfig = EXPERIMENT, machine: Machine = GPU) -> dict[str, ArmPlan]:
    return {plan.name: plan for plan in plan_arms(config, SIZES, machine, prompt_tokens=256)}


def test_the_arms_are_the_paper_s() -> None:
    found = arms()
    assert list(found) == ["LoRA", "LoRA_c", "PTE"]
    assert [plan.policy.kind for plan in found.values()] == ["lora", "lora", "thought"]
    assert [plan.policy.schedule.is_full for plan in found.values()] == [True, False, False]
    assert arms(replace(EXPERIMENT, adapter=replace(EXPERIMENT.adapter, kind="none")))["PTE"] == found["PTE"]


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("name", ["LoRA", "LoRA_c", "PTE"])
def test_one_more_than_the_largest_does_not_fit_by_the_same_formula(name: str, cuda: bool) -> None:
    machine = Machine(cuda, 40 * 10**9, None, None, "")
    plan = arms(machine=machine)[name]
    work = planned_work(EXPERIMENT, prompt_tokens=256)
    policy = plan.policy
    assert plan.fits and plan.largest_slots > 64 and 2 <= plan.largest_micro_batch < work.sequences

    def slots(count: int) -> bool:
        return rollout_fits(policy, replace(work, slots=count, sequences=count), machine)

    def micro_batch(count: int) -> bool:
        return update_fits(policy, replace(work, micro_batch=count), machine)

    assert slots(plan.largest_slots) and not slots(plan.largest_slots + 1)
    assert micro_batch(plan.largest_micro_batch) and not micro_batch(plan.largest_micro_batch + 1)
    longest = replace(work, completion_tokens=plan.longest_completion)
    assert rollout_fits(policy, longest, machine) and update_fits(policy, longest, machine)
    if plan.longest_completion < SIZES.max_positions - 256:
        longer = replace(work, completion_tokens=plan.longest_completion + 1)
        assert not (rollout_fits(policy, longer, machine) and update_fits(policy, longer, machine))


def test_a_window_makes_the_completion_as_long_as_the_positions_and_a_full_cache_does_not() -> None:
    found = arms(machine=Machine(True, 40 * 10**9, None, None, ""))
    assert found["PTE"].longest_completion == found["LoRA_c"].longest_completion == SIZES.max_positions - 256
    assert 3072 < found["LoRA"].longest_completion < 40_000


def test_host_memory_bounds_what_waits_in_mode_chain_and_horizon_needs_none() -> None:
    machine = Machine(True, 80 * 10**9, 10**9, None, "")
    long = replace(EXPERIMENT, rollout=RolloutConfig(max_new_tokens=60_000, slots=64))
    chain, lora = arms(long, machine)["PTE"], arms(long, machine)["LoRA_c"]
    # 2 sequences x 59,487 tokens beyond the window x 36,864 bytes: 4.4 GB, rounded up by whole groups of stretches.
    assert 4.3e9 < chain.update.host_bytes < 8.8e9 and not chain.fits
    assert lora.update.host_bytes == 0 and lora.fits
    horizon = replace(long, train=replace(long.train, gradient_mode="horizon", horizon=4))
    assert arms(horizon, machine)["PTE"].fits


@given(
    window=st.integers(1, 8),
    blocks=st.integers(1, 4),
    tokens=st.integers(1, 200),
    segments=st.integers(1, 4),
)
def test_stretches_are_counted_as_the_schedule_makes_them(window: int, blocks: int, tokens: int, segments: int) -> None:
    schedule = EvictionSchedule(window * blocks, window)
    policy = replace(arms()["PTE"].policy, schedule=schedule, segments_per_stretch=segments)
    work = replace(planned_work(EXPERIMENT, prompt_tokens=256), completion_tokens=tokens)
    made = list(schedule.stretches(max(tokens - 1, 0), segments_per_stretch=segments))
    assert later_stretches(policy, work) == len(made) - 1


@settings(max_examples=60)
@given(
    name=st.sampled_from(["LoRA", "LoRA_c", "PTE"]),
    mode=st.sampled_from(["chain", "horizon"]),
    cuda=st.booleans(),
    rank=st.sampled_from([1, 32, 64]),
    values=st.tuples(st.integers(1, 3000), st.integers(1, 9000), st.integers(1, 300), st.integers(1, 63)),
    field=st.sampled_from(["prompt_tokens", "completion_tokens", "slots", "micro_batch"]),
)
def test_more_of_anything_never_needs_less(name, mode, cuda, rank, values, field) -> None:
    policy = replace(POLICIES[name], cuda=cuda, rank=rank)
    prompt, completion, slots, micro_batch = values
    work = replace(
        planned_work(EXPERIMENT, prompt_tokens=prompt),
        completion_tokens=completion,
        slots=slots,
        sequences=max(64, slots + 1),
        micro_batch=micro_batch,
        gradient_mode=mode,
        horizon=4,
    )
    longer = replace(work, **{field: getattr(work, field) + 1})
    # A longer prompt may be read with fewer others at once.
    for phase in (update_memory,) if field == "prompt_tokens" else (rollout_memory, update_memory):
        less, more = phase(policy, work), phase(policy, longer)
        assert more.device_bytes >= less.device_bytes and more.host_bytes >= less.host_bytes


@given(bound=st.integers(0, 1000), most=st.integers(1, 1000))
def test_the_largest_is_found_wherever_the_bound_is(bound: int, most: int) -> None:
    assert largest(lambda count: count <= bound, most) == min(bound, most)


def test_times_are_the_roofline_s() -> None:
    plan = arms()["PTE"]
    work, rates = DecodeWork.of(SIZES, plan.policy.dtype), DeviceRates(3.35e12, 989e12)
    # 512 tokens enter before the first eviction; then the window is full less half a block on average.
    attended = sum(min(t + 1, 512 - 127 + (t - 512) % 128) for t in range(3071)) / 3071
    step = step_bound_seconds(work, rates, batch=64, attended_tokens=256 + attended)
    assert plan.time is not None
    assert plan.time.tokens_per_second == pytest.approx(64 / step)
    assert plan.time.rollout_seconds == pytest.approx(3072 * step)
    flops = update_flops(work, EXPERIMENT.cache.schedule, sequences=64, prompt_tokens=256, tokens=3072)
    assert plan.time.update_seconds == pytest.approx(flops / 989e12)


def test_a_base_that_is_too_large_cannot_run_and_the_remedy_is_said() -> None:
    machine = Machine(True, 6 * 10**9, None, None, "")
    found = list(arms(machine=machine).values())
    assert not any(plan.weights_fit or plan.fits or plan.largest_slots or plan.longest_completion for plan in found)
    said = sentences(found, machine)
    assert said[0].startswith("LoRA cannot run: weights, adapter and optimizer alone take ")
    assert said[0].endswith("of 6.00 GB; use a smaller base, --dtype bfloat16 or a larger device")


def with_micro_batch(count: int, machine: Machine, *, again: bool = False) -> dict[str, ArmPlan]:
    train = replace(EXPERIMENT.train, micro_batch_size=count, gradient_checkpointing=again)
    return arms(replace(EXPERIMENT, train=train), machine)


def test_an_update_that_is_too_wide_is_told_its_micro_batch() -> None:
    machine = Machine(True, 16 * 10**9, None, None, "")
    found = with_micro_batch(64, machine)
    most, again = found["PTE"].largest_micro_batch, found["PTE"].largest_recomputed
    assert not found["PTE"].fits_recomputed and 1 <= most < again < 64
    assert f"--micro-batch {most} or less for the update (--gradient-checkpointing: {again})" in " ".join(
        sentences(list(found.values()), machine)
    )


def test_gradient_checkpointing_is_named_where_it_makes_an_arm_fit_and_only_there() -> None:
    found = with_micro_batch(64, GPU)
    pte, full = found["PTE"], found["LoRA"]
    assert not pte.fits and pte.fits_recomputed and pte.largest_micro_batch < pte.largest_recomputed == 64
    said = " ".join(sentences(list(found.values()), GPU))
    assert (
        f"PTE fits with --gradient-checkpointing, which computes each layer of the update twice, or with "
        f"--micro-batch {pte.largest_micro_batch}" in said
    )
    # A full cache's layers are computed again in any case.
    assert full.fits == full.fits_recomputed and full.largest_micro_batch == full.largest_recomputed
    checkpointed = with_micro_batch(64, GPU, again=True)
    assert checkpointed["PTE"].fits and checkpointed["LoRA"].update == full.update
    assert checkpointed["PTE"].rollout == pte.rollout and checkpointed["PTE"].largest_micro_batch == 64
    assert "--gradient-checkpointing" not in " ".join(sentences(list(checkpointed.values()), GPU))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("paper-*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_paper_is_planned_from_a_configuration_without_weights(path: Path, tmp_path: Path) -> None:
    (shape,) = (shape for shape, name in RECIPES.items() if path.stem == f"paper-{name}")
    model_config(SHAPES[shape]).save_pretrained(tmp_path)
    config = load_experiment(path, overrides={"model.path": str(tmp_path)})
    found = plan_arms(config, model_sizes(config.model.path), GPU, prompt_tokens=1024)
    weights = {"3b": 6.17e9, "7b": 15.23e9, "8b": 16.06e9}[shape]
    for plan in found:
        # Fused rows for B on top: 7 maps' inputs x 32 x 2 bytes a layer, and A beside them.
        assert weights < plan.policy.weights_bytes < 1.03 * weights
    # The cache bytes of docs/reproduce.md, GB.
    full, bounded = {"3b": (9.66, 4.83), "7b": (15.03, 7.52), "8b": (34.35, 17.18)}[shape]
    slots = [plan.rollout.device["slots"] / 1e9 for plan in found]
    assert slots == pytest.approx([full, bounded, bounded], rel=0.001)
    assert set(as_json(found, GPU)["arms"]) == {"LoRA", "LoRA_c", "PTE"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": CacheConfig(policy="none")}, "cache.policy must have a window.*use --cache.policy window"),
        (
            {"train": replace(EXPERIMENT.train, gradient_mode="exact")},
            "train.gradient_mode must be 'chain' or 'horizon'.*got 'exact'.*--train.gradient-mode chain",
        ),
        (
            {"rollout": RolloutConfig(max_new_tokens=140_000)},
            "must stay within the model's 131072 trained positions, got 140256 tokens; lower --prompt or --completion",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arms(replace(EXPERIMENT, **changes))


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt must be at least 1 token, got 0; use for example 1024"):
        plan_arms(EXPERIMENT, SIZES, GPU, prompt_tokens=0)


def test_a_gpu_loses_its_context_and_some_fragments_and_a_cpu_nothing() -> None:
    assert GPU.taken(resident=10**9, phase=10**9) == 2 * 10**9 + 5 * 10**7 + CONTEXT_BYTES
    assert Machine(False, 10**9, None, None, "").taken(resident=1, phase=2) == 3


POLICIES = {
    name: planned_policy(
        replace(
            EXPERIMENT,
            adapter=replace(EXPERIMENT.adapter, kind="thought" if name == "PTE" else "lora"),
            cache=replace(EXPERIMENT.cache, policy="none" if name == "LoRA" else "window"),
        ),
        SIZES,
        cuda=True,
    )
    for name in ("LoRA", "LoRA_c", "PTE")
}
