"""What the graph of a stretch holds while it is walked back, layer by layer or whole.

Decides: the bytes that autograd keeps of a stretch (`run_stretch`), of its head's chunks (`score`), and which of its
moments can be the widest: the head; the last layer's MLP, since a graph is freed as the backward pass goes on; where
layers are computed again, each of them beside the inputs of all; the first layer beside the gradients of all, in the
base's dtype; and these gradients alone, as float32.
Does not know: what lies there between stretches. Each line follows the code that it names; nothing here is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pte.method.adapter import INPUT_GROUPS
from pte.method.attention import MASK_ALIGNMENT
from pte.plan.memory import FLOAT32_BYTES, Row
from pte.rollout.scores import LOGITS_PER_CHUNK

if TYPE_CHECKING:
    from pte.plan.memory import PlannedPolicy

Moment = dict[Row, int]


def joined(*parts: Moment) -> Moment:
    """What several parts of a moment hold together."""
    whole: Moment = {}
    for part in parts:
        for row, size in part.items():
            whole[row] = whole.get(row, 0) + size
    return whole


def stretch_moments(
    policy: PlannedPolicy, rows: int, *, tokens: int, scored: int, attended: int = 0, recomputed: bool
) -> list[Moment]:
    """The moments of a stretch that can be its widest.

    Args:
        policy: What is trained.
        rows: Sequences.
        tokens: Of the stretch, per sequence.
        scored: Tokens of the stretch that are scored, per sequence.
        attended: Keys that are attended to, the stretch's own included; 0 where nothing is cached.
        recomputed: Its layers are computed again, one by one.
    """
    sizes, itemsize = policy.sizes, policy.dtype.itemsize
    stream = rows * tokens * sizes.hidden_size
    keys = rows * tokens * policy.token_bytes
    mlp = rows * tokens * 2 * sizes.intermediate_size * itemsize
    layer = rows * tokens * layer_token_bytes(policy, cached=attended > 0)
    # Keys and values with the cache's before them.
    layer += rows * attended * policy.token_bytes // sizes.layers
    masks = rows * tokens * mask_row_bytes(policy, attended)
    head = head_bytes(policy, rows * scored)
    # The keys of all layers are put into one tensor before the values are.
    stacking = keys // 2
    if not recomputed:
        # The first norm's input needs no gradient; the last norm keeps its own.
        final = stream * 2 * itemsize
        widest = max(stacking, mlp)
        return [
            {
                "activations": sizes.layers * layer + masks + final + keys + widest,
                "LM head": max(0, head - widest),
            },
            {"activations": masks + keys + layer, "gradients": policy.working_bytes},
            {"activations": masks + keys, "gradients": policy.adapter_bytes},
        ]
    inputs = sizes.layers * stream * itemsize
    final = stream * (FLOAT32_BYTES + 2 * itemsize)
    # A full cache is all one stretch: its keys are let go before it is walked back.
    stored = masks + (0 if policy.schedule.is_full else keys)
    again = layer + mlp + stream * itemsize + stored
    return [
        {"activations": inputs + final + masks + keys + stacking, "LM head": max(0, head - stacking)},
        {"activations": inputs + again},
        {"activations": again, "gradients": policy.working_bytes},
        {"activations": stored, "gradients": policy.adapter_bytes},
    ]


def mask_row_bytes(policy: PlannedPolicy, attended: int) -> int:
    """The masks of one token over the cache: one, and that of every query head of a key head, for all layers."""
    group = policy.sizes.heads // policy.sizes.kv_heads
    itemsize, padding = policy.dtype.itemsize, -attended % MASK_ALIGNMENT
    packed = group * (attended + padding) if group > 1 or padding else 0
    return (attended + packed) * itemsize


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
