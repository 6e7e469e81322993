"""What an update holds: the graph of one stretch, gradients, and what waits between stretches.

Decides: which moments compete for the peak of a backward walk (`Replay.walk_backward`; `walk_exact` for a full
cache): those of the first stretch (prompt and window), of a later one (a window of tokens over the cache), and the KL
term's reference. What a stretch holds is in `stretch_memory.py`. Folding again what was evicted needs less: keys are
narrower than an MLP. Each line follows the code that it names; nothing here is measured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pte.method.cache import analytic_bytes
from pte.plan.memory import PhaseMemory, Row
from pte.plan.stretch_memory import head_bytes, joined, stretch_moments
from pte.rollout.gradients import KEPT_BYTES_FRACTION

if TYPE_CHECKING:
    from pte.plan.memory import PlannedPolicy, Workload
    from pte.plan.stretch_memory import Moment

BATCH_BYTES = 60
"""Of a completion token in a replayed batch: ids, masks, log-probs recorded, found and of the loss, entropies."""


def update_memory(policy: PlannedPolicy, work: Workload) -> PhaseMemory:
    """An update of the worst case at its peak.

    Args:
        policy: What is trained.
        work: How many sequences, how long, which gradients.

    Raises:
        ValueError: Gradients go through everything under a window: its memory grows with the completion.
    """
    if work.gradient_mode == "exact" and not policy.schedule.is_full:
        raise ValueError(
            "train.gradient_mode must be 'chain' or 'horizon' to be planned under a window, got 'exact', which keeps "
            "a cache for every stretch; use --train.gradient-mode chain, or measure with pte train --dry-run"
        )
    rows = min(work.micro_batch, work.sequences)
    # Gradients of earlier micro-batches lie on the parameters while the next one is walked.
    earlier = policy.adapter_bytes if work.sequences > rows else 0
    common: Moment = {
        "adapter": policy.working_bytes,
        "gradients": earlier,
        "records": rows * work.completion_tokens * BATCH_BYTES,
    }
    moments = full_walk(policy, work, rows) if policy.schedule.is_full else bounded_walk(policy, work, rows)
    if work.reference is not None:
        moments.append(reference_walk(policy, work, rows))
    widest = joined(max(moments, key=lambda moment: sum(moment.values())), common)
    later = later_stretches(policy, work)
    host: dict[Row, int] = {}
    if policy.cuda and later:
        host["evicted"] = waiting_bytes(policy, work, rows, index=later)
    return PhaseMemory(widest, host)


def bounded_walk(policy: PlannedPolicy, work: Workload, rows: int) -> list[Moment]:
    """The moments of a walk under a window: in its first stretch, and in those of the later ones that can be widest."""
    window, entered = policy.schedule.window_tokens, max(work.completion_tokens - 1, 0)
    assert window is not None
    first, later = min(window, entered), later_stretches(policy, work)
    slots = 0
    if later:
        slots = analytic_bytes(
            policy.sizes.cache_shape,
            batch=rows,
            prompt_slots=work.prompt_tokens,
            window_slots=first,
            dtype=policy.dtype,
        )
    # States as they are folded and as they are read.
    kept: Moment = {"slots": slots, "states": 2 * rows * policy.state_bytes}
    graphs = stretch_moments(
        policy,
        rows,
        tokens=work.prompt_tokens + first,
        scored=first + 1,
        recomputed=work.gradient_checkpointing,
    )
    moments = [joined(graph, kept) for graph in graphs]
    # The last of a group has the most that stays on the device.
    group = group_stretches(policy)
    for index in sorted({1, min(later, group), later - later % group, later - 1, later}):
        if 1 <= index <= later:
            moments += [joined(one, {"slots": slots}) for one in later_moments(policy, work, rows, index=index)]
    return moments


def later_moments(policy: PlannedPolicy, work: Workload, rows: int, *, index: int) -> list[Moment]:
    """The moments of a stretch over the cache.

    Args:
        policy: What is trained.
        work: How long its sequences are.
        rows: Sequences.
        index: Of the stretch, 1 for the one behind the first.
    """
    window, block = policy.schedule.window_tokens, policy.schedule.evict_tokens
    assert window is not None and block is not None
    entering = work.completion_tokens - 1 - window - (index - 1) * policy.segments_per_stretch * block
    segments = min(policy.segments_per_stretch, math.ceil(entering / block))
    tokens = segments * block
    graphs = stretch_moments(
        policy,
        rows,
        tokens=tokens,
        scored=min(tokens, entering),
        attended=work.prompt_tokens + window + tokens,
        recomputed=work.gradient_checkpointing,
    )
    before = stretches_kept(policy, work, index)
    span_bytes = policy.segments_per_stretch * block * policy.token_bytes
    waiting = 0 if policy.cuda else waiting_bytes(policy, work, rows, index=index)
    kept: Moment = {
        # The sum of those before.
        "gradients": policy.adapter_bytes,
        "states": rows * policy.state_bytes * (1 + 2 * segments) + kept_states(policy, work, rows, index=index),
        "evicted": rows * (tokens * policy.token_bytes + before * span_bytes) + waiting,
    }
    return [joined(graph, kept) for graph in graphs]


def full_walk(policy: PlannedPolicy, work: Workload, rows: int) -> list[Moment]:
    """The moments of a walk under a full cache, whose one stretch is as long as the completion."""
    entered = max(work.completion_tokens - 1, 0)
    moments = stretch_moments(
        policy,
        rows,
        tokens=work.prompt_tokens + entered,
        scored=work.completion_tokens,
        recomputed=True,
    )
    return [joined(moment, {"states": 4 * rows * policy.state_bytes}) for moment in moments]


def reference_walk(policy: PlannedPolicy, work: Workload, rows: int) -> Moment:
    """The frozen base's log-probs of a micro-batch, without a graph; its longest stretch is the first."""
    sizes, itemsize = policy.sizes, policy.dtype.itemsize
    entered = max(work.completion_tokens - 1, 0)
    window = policy.schedule.window_tokens
    kept = entered if work.reference == "full" or window is None else min(window, entered)
    tokens = rows * (work.prompt_tokens + kept)
    layer = tokens * (3 * sizes.intermediate_size + 4 * sizes.hidden_size) * itemsize
    keys = tokens * policy.token_bytes
    return {"activations": keys + max(keys, layer), "LM head": head_bytes(policy, rows * kept)}


def later_stretches(policy: PlannedPolicy, work: Workload) -> int:
    """Stretches behind the first one."""
    window, block = policy.schedule.window_tokens, policy.schedule.evict_tokens
    if window is None or block is None:
        return 0
    behind = work.completion_tokens - 1 - window
    return max(0, math.ceil(behind / (policy.segments_per_stretch * block)))


def group_stretches(policy: PlannedPolicy) -> int:
    """Stretches that mode `chain` takes as one group, as `pte.rollout.gradients.group_stretches` decides it."""
    block = policy.schedule.evict_tokens
    assert block is not None
    kv_bytes = policy.segments_per_stretch * block * policy.token_bytes
    return max(1, math.ceil(2 * policy.state_bytes / (KEPT_BYTES_FRACTION * kv_bytes)))


def stretches_kept(policy: PlannedPolicy, work: Workload, index: int) -> int:
    """Stretches before a later one whose evicted keys and values are still on the device."""
    if policy.kind != "thought":
        return 0
    if work.gradient_mode == "horizon":
        return min(index - 1, math.ceil(work.horizon / policy.segments_per_stretch))
    return (index - 1) % group_stretches(policy)


def kept_states(policy: PlannedPolicy, work: Workload, rows: int, *, index: int) -> int:
    """States and their gradients that a backward walk has kept when a later stretch is walked."""
    if policy.kind != "thought":
        return 0
    before, segments = stretches_kept(policy, work, index), policy.segments_per_stretch
    if work.gradient_mode == "horizon":
        return rows * policy.state_bytes * segments * before
    groups = (index - 1) // group_stretches(policy)
    return rows * policy.state_bytes * ((1 + segments) * before + 2 * groups)


def waiting_bytes(policy: PlannedPolicy, work: Workload, rows: int, *, index: int) -> int:
    """Evicted keys and values that wait in host memory when a later stretch is walked in mode `chain`: whole groups.

    Pinned memory is handed out in powers of two.
    """
    if policy.kind != "thought" or work.gradient_mode != "chain":
        return 0
    block, group = policy.schedule.evict_tokens, group_stretches(policy)
    assert block is not None
    size = rows * group * policy.segments_per_stretch * block * policy.token_bytes
    return (index - 1) // group * (1 << (size - 1).bit_length() if policy.cuda else size)
