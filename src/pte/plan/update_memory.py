"""What an update holds: the graph of one stretch, the head's chunk, gradients, and what waits between stretches.

Decides: which moments compete for the peak of a backward walk (`Replay.walk_backward`; `walk_exact` for a full
cache): the graph of the first stretch (prompt and window), of a later one (a window of tokens over the cache), and
the KL term's reference. A graph is widest when the backward pass begins at the head or in the last layer's MLP, since
it is freed as the pass goes on. Folding again what was evicted needs less: keys are narrower than an MLP.
Each line follows the code that it names; nothing here is measured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pte.method.adapter import INPUT_GROUPS
from pte.method.cache import analytic_bytes
from pte.plan.memory import FLOAT32_BYTES, PhaseMemory, Row
from pte.rollout.gradients import KEPT_BYTES_FRACTION
from pte.rollout.scores import LOGITS_PER_CHUNK

if TYPE_CHECKING:
    from pte.plan.memory import PlannedPolicy, Workload

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
    common: dict[Row, int] = {
        "adapter": policy.working_bytes,
        "gradients": earlier,
        "records": rows * work.completion_tokens * BATCH_BYTES,
    }
    moments = full_walk(policy, work, rows) if policy.schedule.is_full else bounded_walk(policy, work, rows)
    widest = max(moments, key=lambda moment: sum(moment.values()))
    for name, size in common.items():
        widest[name] = widest.get(name, 0) + size
    if work.reference is not None:
        reference = reference_walk(policy, work, rows)
        if sum(reference.values()) + sum(common.values()) > sum(widest.values()):
            widest = {**common, **reference}
    later = later_stretches(policy, work)
    host: dict[Row, int] = {}
    if policy.cuda and later:
        host["evicted"] = waiting_bytes(policy, work, rows, index=later)
    return PhaseMemory(widest, host)


def bounded_walk(policy: PlannedPolicy, work: Workload, rows: int) -> list[dict[Row, int]]:
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
    graph = stretch_graph(policy, rows, tokens=work.prompt_tokens + first, scored=first + 1)
    # States as they are folded and as they are read.
    moments = [{**graph, "slots": slots, "states": 2 * rows * policy.state_bytes}]
    # The second brings a second set of gradients, the last of a group the most that stays on the device.
    group = group_stretches(policy)
    for index in sorted({1, 2, min(later, group), later - later % group, later - 1, later}):
        if 1 <= index <= later:
            moments.append({**later_moment(policy, work, rows, index=index), "slots": slots})
    return moments


def later_moment(policy: PlannedPolicy, work: Workload, rows: int, *, index: int) -> dict[Row, int]:
    """The widest moment of a stretch over the cache.

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
    graph = stretch_graph(
        policy,
        rows,
        tokens=tokens,
        scored=min(tokens, entering),
        attended=work.prompt_tokens + window + tokens,
    )
    before = stretches_kept(policy, work, index)
    span_bytes = policy.segments_per_stretch * block * policy.token_bytes
    waiting = 0 if policy.cuda else waiting_bytes(policy, work, rows, index=index)
    return {
        **graph,
        # The sum so far; from the third stretch on, what the stretch before added is still held beside it.
        "gradients": min(index, 2) * policy.adapter_bytes,
        "states": rows * policy.state_bytes * (1 + 2 * segments) + kept_states(policy, work, rows, index=index),
        "evicted": rows * (tokens * policy.token_bytes + before * span_bytes) + waiting,
    }


def full_walk(policy: PlannedPolicy, work: Workload, rows: int) -> list[dict[Row, int]]:
    """The moments of a walk under a full cache: the head, the last layer's graph, the first layer's.

    Every layer's input is kept until its graph has been made and freed again; gradients come as inputs go.
    """
    sizes, itemsize = policy.sizes, policy.dtype.itemsize
    tokens = rows * (work.prompt_tokens + max(work.completion_tokens - 1, 0))
    stream = tokens * sizes.hidden_size
    inputs, keys = sizes.layers * stream * itemsize, tokens * policy.token_bytes
    final = stream * (FLOAT32_BYTES + 2 * itemsize)
    head = head_bytes(policy, rows * work.completion_tokens)
    graph = tokens * (layer_token_bytes(policy, cached=False) + 2 * sizes.intermediate_size * itemsize)
    layer = graph + stream * itemsize
    states = 4 * rows * policy.state_bytes
    return [
        # Keys and values of all layers are stacked once, before the head and before any layer is computed again.
        {
            "activations": inputs + keys + max(keys, final),
            "LM head": max(0, head - max(0, keys - final)),
            "states": states,
        },
        {"activations": inputs + keys + layer, "states": states},
        {"activations": keys + layer, "states": states, "gradients": policy.adapter_bytes},
    ]


def stretch_graph(
    policy: PlannedPolicy,
    rows: int,
    *,
    tokens: int,
    scored: int,
    attended: int = 0,
) -> dict[Row, int]:
    """The graph of a stretch when its backward begins.

    Args:
        policy: What is trained.
        rows: Sequences.
        tokens: Of the stretch, per sequence.
        scored: Tokens of the stretch that are scored, per sequence.
        attended: Keys that are attended to, the stretch's own included; 0 where nothing is cached.
    """
    sizes, itemsize = policy.sizes, policy.dtype.itemsize
    cached = attended > 0
    saved = sizes.layers * rows * tokens * layer_token_bytes(policy, cached=cached)
    # The first norm's input needs no gradient; the last norm keeps its own.
    final = rows * tokens * sizes.hidden_size * 2 * itemsize
    if cached:
        # Keys and values with the cache's before them, and the mask of every query head of a key head.
        group = sizes.heads // sizes.kv_heads
        masks = rows * tokens * attended * itemsize * (1 + (sizes.layers * group if group > 1 else 0))
        saved += masks + rows * attended * policy.token_bytes
    keys = rows * tokens * policy.token_bytes
    mlp = rows * tokens * 2 * sizes.intermediate_size * itemsize
    head = head_bytes(policy, rows * scored)
    return {
        "activations": saved + final + keys + max(keys, mlp),
        "LM head": max(0, head - max(keys, mlp)),
    }


def layer_token_bytes(policy: PlannedPolicy, *, cached: bool) -> int:
    """What one layer keeps of one token for its backward.

    The residual stream in float32 for each norm; the input of every adapted group; queries, attention's output (again,
    in the order of the output map, over a cache), keys and values (repeated over their group without a cache, joined
    to the cache's otherwise, and counted there); gate, activated gate, up and their product; B x and S B x.
    """
    sizes, itemsize = policy.sizes, policy.dtype.itemsize
    hidden, query, kv, mlp = sizes.hidden_size, sizes.query_dim, sizes.kv_dim, sizes.intermediate_size
    adapted = [any(name in policy.targets for name in names) for names in INPUT_GROUPS]
    attention_in, attention_out, mlp_in, mlp_out = adapted
    numbers = hidden * (attention_in + mlp_in) + 3 * mlp + mlp * mlp_out + 2 * query
    if cached:
        numbers += query * attention_out
    else:
        numbers += 2 * (query if sizes.heads > sizes.kv_heads else kv)
    low = len(policy.targets) * policy.rank * (itemsize + (FLOAT32_BYTES if policy.has_state else 0))
    norms = 2 * hidden + (query + kv if sizes.head_norms else 0)
    return numbers * itemsize + low + (norms + sizes.heads) * FLOAT32_BYTES


def head_bytes(policy: PlannedPolicy, scored: int) -> int:
    """The widest moment of one chunk of logits (`score`): log-probs, their gradient, and the logits'."""
    chunk = min(scored, max(1, LOGITS_PER_CHUNK // policy.sizes.vocab))
    narrow = policy.dtype.itemsize if policy.dtype.itemsize < FLOAT32_BYTES else 0
    return chunk * policy.sizes.vocab * (3 * FLOAT32_BYTES + narrow)


def reference_walk(policy: PlannedPolicy, work: Workload, rows: int) -> dict[Row, int]:
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
