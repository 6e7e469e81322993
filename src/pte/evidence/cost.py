"""What an arm costs: wall time with its breakdown, FLOPs, tokens per second, memory; and memory over tokens.

Decides: what is measured and in what unit; the step is `step.py`'s. Speeds come from steps without a clock, the
breakdown from steps with one (`pte.timing`), memory from fresh processes (`pte.bench.memory`), FLOPs from one step
under a counter (`flops.py`). Seconds are wall time: a busy machine shows in them.

Paper: none; its tables give peak memory and accuracy, and no breakdown of wall time.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

import torch

from pte.bench.memory import read_in_fresh_process
from pte.evidence.flops import counted_flops
from pte.evidence.step import CostStep
from pte.rollout.token_step import decode_path
from pte.timing import StepClock, step_clock

if TYPE_CHECKING:
    from pte.config import ExperimentConfig
    from pte.rollout.record import Rollout

Result = TypeVar("Result")

ROLLOUT_SPANS = ("prefill", "decode", "fold", "read")
"""Outermost spans of a rollout: the first state and its reading lie in no other span there."""
UPDATE_SPANS = ("forward", "backward", "optimizer")
STATE_SPANS = ("fold", "read")


def measure_cost(config: ExperimentConfig, *, repeats: int = 3) -> dict[str, float]:
    """Cost of one GRPO step of an arm on completions of exactly `rollout.max_new_tokens` tokens.

    Args:
        config: Of the arm; any adapter, any cache.
        repeats: Steps without a clock, and as many with one; at least 1. Medians are returned, of the breakdown the
            step of median length.

    Returns:
        By name: `rollout_tokens_per_second` (without rewards), `update_tokens_per_second`; `rollout_flops_per_token`,
        `update_flops_per_token`, per completion token; `cache_bytes`, `state_bytes` of all slots;
        `peak_memory_bytes` of a step above what the process held before it; the breakdown of one step,
        `prefill_seconds`, `decode_seconds`, `fold_seconds`, `read_seconds`, `reward_seconds`, `forward_seconds`,
        `backward_seconds`, `optimizer_seconds`, `other_seconds`, exclusive of each other, whose sum is
        `step_seconds`; `state_fraction`, the share of fold and read in it, and the same of the rollout's and of the
        update's spans. Without an update (the base alone) the entries that start with `update_` are missing; where
        memory cannot be read (`pte.plan.process_memory`), `peak_memory_bytes` is; where decode kernels are fused or
        captured, S is read inside them, `rollout_state_fraction` is missing and `state_fraction` leaves these readings
        out.

    Raises:
        ValueError: `repeats` is below 1, or the experiment cannot be opened.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}; use for example 3")
    tokens = config.rollout.max_new_tokens
    step = CostStep(config)
    step.run(warmup_tokens(config, tokens), 0)
    costs = counted_costs(step, tokens)
    speeds = [speeds_of_a_step(step, tokens, index) for index in range(repeats)]
    costs |= {name: statistics.median(speed[name] for speed in speeds) for name in speeds[0]}
    clocks = [clocked_step(step, tokens, index) for index in range(repeats)]
    middle = sorted(clocks, key=lambda clock: clock.total_nanoseconds)[(repeats - 1) // 2]
    costs |= breakdown(middle, path=decode_path(step.session.policy))
    if step.stage is None:
        costs = {name: cost for name, cost in costs.items() if not name.startswith("update_")}
    costs |= {"cache_bytes": float(step.cache_bytes), "state_bytes": float(step.state_bytes)}
    memory = memory_in_fresh_process(config, tokens)
    peaks = [memory[name] for name in ("rollout_peak_bytes", "update_peak_bytes") if name in memory]
    return costs | ({"peak_memory_bytes": max(peaks)} if peaks else {})


def memory_over_tokens(config: ExperimentConfig, lengths: Sequence[int]) -> list[dict[str, float]]:
    """Memory of one step of an arm by completion length: the flat line, or the rising one.

    Args:
        config: Of the arm; `rollout.max_new_tokens` is not read.
        lengths: Completion tokens, each measured in a process of its own.

    Returns:
        For each length `tokens`; `cache_bytes` and `state_bytes` of all slots, exact; `rollout_peak_bytes` and
        `update_peak_bytes`, the growth of memory beyond what the process held before, which reads differently by
        about 1 MB from process to process. The base alone has no `update_peak_bytes`; where memory cannot be read,
        both peaks are missing.

    Raises:
        ValueError: A length is below 1.
        RuntimeError: The process failed; its last lines are in the message.
    """
    for tokens in lengths:
        if tokens < 1:
            raise ValueError(f"lengths must be at least 1, got {tokens}; use for example 64, 128, 256")
    return [memory_in_fresh_process(config, tokens) for tokens in lengths]


def warmup_tokens(config: ExperimentConfig, tokens: int) -> int:
    """A short completion that evicts twice: libraries are loaded, the optimizer has its state."""
    return min(tokens, config.cache.window_tokens + 2 * config.cache.evict_tokens)


def counted_costs(step: CostStep, tokens: int) -> dict[str, float]:
    """FLOPs per completion token of one step."""
    completion_tokens = step.sequences * tokens
    rollouts: list[Rollout] = []
    rollout = counted_flops(lambda: rollouts.extend(step.sample(tokens, 1)))
    scored = step.score(rollouts, 1)
    update = counted_flops(lambda: step.update(scored))
    return {
        "rollout_flops_per_token": rollout / completion_tokens,
        "update_flops_per_token": update / completion_tokens,
    }


def speeds_of_a_step(step: CostStep, tokens: int, index: int) -> dict[str, float]:
    """Completion tokens per second of a step's rollout and of its update."""
    gc.collect()
    sampling, rollouts = seconds_of(step.device, lambda: step.sample(tokens, index))
    scored = step.score(rollouts, index)
    updating, _ = seconds_of(step.device, lambda: step.update(scored))
    completion_tokens = step.sequences * tokens
    return {
        "rollout_tokens_per_second": completion_tokens / sampling,
        "update_tokens_per_second": completion_tokens / updating,
    }


def seconds_of(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall time of some work, and what it returned."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def clocked_step(step: CostStep, tokens: int, index: int) -> StepClock:
    """A whole step under a clock."""
    gc.collect()
    with step_clock(step.device) as clock:
        step.run(tokens, index)
    return clock


def breakdown(clock: StepClock, *, path: str) -> dict[str, float]:
    """Where the time of a step went, and the share of the state's work in it.

    Args:
        clock: Of the step.
        path: What computed the rollout's tokens, as `decode_path` names it; `rollout_state_fraction` is missing where
            no clock sees its kernels one by one.
    """
    seconds = clock.seconds()

    def share(outermost: Sequence[str]) -> float:
        times = {path: spent for path, spent in clock.nanoseconds.items() if path and path[0] in outermost}
        state = sum(spent for path, spent in times.items() if path[-1] in STATE_SPANS)
        return state / max(1, sum(times.values()))

    hidden = path.startswith("fused") or "CUDA graph" in path
    rollout = {} if hidden else {"rollout_state_fraction": share(ROLLOUT_SPANS)}
    return {
        **{f"{name}_seconds": spent for name, spent in seconds.items()},
        "step_seconds": clock.total_nanoseconds / 1e9,
        "state_fraction": sum(seconds[name] for name in STATE_SPANS) * 1e9 / clock.total_nanoseconds,
        **rollout,
        "update_state_fraction": share(UPDATE_SPANS),
    }


def memory_in_fresh_process(config: ExperimentConfig, tokens: int) -> dict[str, float]:
    """What `pte.evidence.memory_process` reads of one step."""
    request = {"config": asdict(config), "tokens": tokens, "threads": torch.get_num_threads()}
    return read_in_fresh_process("pte.evidence.memory_process", json.dumps(request))
