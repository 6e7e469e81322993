"""What a rollout holds: slots, states, records of every token, and the widest moment of its work.

Decides: which moments compete for the peak: reading the prompts, a decode step, an eviction. On the CPU the largest
counts; on a GPU a decode step lies in the pool of its CUDA graph, which nothing else can use, and comes on top.
Each line follows the code that it names; nothing here is measured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pte.method.cache import analytic_bytes
from pte.plan.memory import FLOAT32_BYTES, PhaseMemory, Row
from pte.rollout.evict import EVICTED_NUMBERS
from pte.rollout.prefill import PREFILL_TOKENS

if TYPE_CHECKING:
    from pte.plan.memory import PlannedPolicy, Workload

RECORD_BYTES = 8 + 4 + 4
"""Of a token in `DecodeBuffers`: its id, its log-prob, its random number."""
ROLLOUT_BYTES = 48
"""Of a token in a finished `Rollout`, in host memory: a Python integer, its place in the tuple, a log-prob."""


def rollout_memory(policy: PlannedPolicy, work: Workload) -> PhaseMemory:
    """A rollout of the worst case at its peak.

    Args:
        policy: What is sampled from.
        work: How many sequences, how long.
    """
    rows = min(work.slots, work.sequences)
    slots = analytic_bytes(
        policy.sizes.cache_shape,
        batch=rows,
        prompt_slots=work.prompt_tokens,
        window_slots=policy.schedule.kept_tokens(work.completion_tokens),
        dtype=policy.cache_dtype,
    )
    columns = work.completion_tokens + 1
    rotations = (work.prompt_tokens + columns) * 2 * policy.sizes.head_dim * policy.dtype.itemsize
    step, prompts, eviction = step_bytes(policy, rows), prompt_bytes(policy, work, rows), eviction_bytes(policy, rows)
    if work.completion_tokens - 1 <= (policy.schedule.window_tokens or work.completion_tokens):
        eviction = 0
    widest = max(prompts, eviction) if policy.cuda else max(prompts, eviction, step)
    device: dict[Row, int] = {
        "adapter": policy.working_bytes,
        "slots": slots,
        # What adapters read is kept beside what is folded.
        "states": 2 * rows * policy.state_bytes,
        "records": rows * columns * RECORD_BYTES + rotations,
    }
    if policy.cuda:
        device["decode step"] = step
    # The moment that is the peak gives its name.
    name: Row = "prompts" if widest == prompts else "evicted" if widest == eviction else "decode step"
    device[name] = device.get(name, 0) + widest
    records: dict[Row, int] = {"records": work.sequences * work.completion_tokens * ROLLOUT_BYTES}
    return PhaseMemory(device, records)


def step_bytes(policy: PlannedPolicy, rows: int) -> int:
    """Widest moment of one decode step (`TokenStep.advance`): log-probs, probabilities and their sums of each row."""
    sizes, itemsize = policy.sizes, policy.dtype.itemsize
    drawing = 3 * FLOAT32_BYTES * sizes.vocab
    layer = (3 * sizes.intermediate_size + 4 * sizes.hidden_size) * itemsize
    return rows * max(drawing, layer)


def prompt_bytes(policy: PlannedPolicy, work: Workload, rows: int) -> int:
    """Widest moment of reading the prompts of the first rows (`PromptReader.read_batch`).

    A layer's MLP on top of the keys and values of all layers; or, at the end, these, their stack, and each prompt's
    copy of it. Prompts read before wait for their sequences.
    """
    sizes, itemsize = policy.sizes, policy.dtype.itemsize
    distinct = math.ceil(rows / work.group_size)
    at_once = min(distinct, max(1, PREFILL_TOKENS // work.prompt_tokens))
    tokens = at_once * work.prompt_tokens
    before = (distinct - at_once) * work.prompt_tokens * policy.token_bytes
    layer = tokens * (3 * sizes.intermediate_size + 4 * sizes.hidden_size) * itemsize
    return before + max(tokens * policy.token_bytes + layer, 3 * tokens * policy.token_bytes)


def eviction_bytes(policy: PlannedPolicy, rows: int) -> int:
    """Widest moment of an eviction (`evict_rows`): what leaves and, where it is folded, its keys before rotation.

    All rows are due at once. Keys in float32, turned back in four tensors as large; then keys, values and the same in
    the order of the products.
    """
    sizes, block = policy.sizes, policy.schedule.evict_tokens
    if block is None:
        return 0
    row_numbers = sizes.layers * block * sizes.kv_dim
    numbers = min(rows, max(1, EVICTED_NUMBERS // row_numbers)) * row_numbers
    folding = 4 * FLOAT32_BYTES if policy.kind == "thought" else 0
    return numbers * (2 * policy.dtype.itemsize + folding)
