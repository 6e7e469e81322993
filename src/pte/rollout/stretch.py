"""One stretch as one parallel forward: its inputs, its hidden states, the keys and values that it adds.

Decides: what a stretch's forward is a function of. `run_stretch` takes keys, values and states as arguments and reads
nothing else, so that it can be computed again. Does not know: the order of stretches, evictions, gradients, scores.

Paper: pi^D(y_t | C_t^D) for all t of a stretch at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.method.attention import StretchAttention
from pte.model.segment import adapter_weights, read_state, run_layers

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from pte.method.observe import AttentionObserver
    from pte.model.policy import BoundedPolicy


@dataclass(frozen=True)
class StretchInputs:
    """What one parallel forward of a stretch needs besides keys, values and states.

    Args:
        token_ids: One row per segment of each sequence, in the order sequence, segment.
        positions: Absolute, of the same tokens.
        mask: Over [cache slots | tokens of the stretch], 0 or -inf; None in the first stretch, whose rows are a prompt
            with its reasoning tokens directly behind it, so that causal attention over the row is all there is.
        segments: Segments per sequence.
        evicted_slots: Window slots of each eviction in the stretch, in order.
        reasoning: Index in its sequence's tokens of each reasoning token that the cache will hold.
        observer: Sums the attention that the next eviction's choice needs, or None.
        scored: Flat indices (sequence x tokens) of the tokens whose outputs are scored.
        targets: The completion tokens that they predict.
        places: Flat indices (batch row x completion) of those tokens.
    """

    token_ids: Int[Tensor, "rows segment_tokens"]
    positions: Int[Tensor, "rows segment_tokens"]
    mask: Float[Tensor, "sequences 1 tokens keys"] | None
    segments: int
    evicted_slots: list[Int[Tensor, "sequences evicted"]]
    reasoning: Int[Tensor, "sequences kept"]
    observer: AttentionObserver | None
    scored: Int[Tensor, " scored"]
    targets: Int[Tensor, " scored"]
    places: Int[Tensor, " scored"]


def run_stretch(
    policy: BoundedPolicy,
    inputs: StretchInputs,
    *,
    cache_keys: Float[Tensor, "layers sequences kv_heads slots head_dim"],
    cache_values: Float[Tensor, "layers sequences kv_heads slots head_dim"],
    states: Float[Tensor, "layers sequences segments rank rank"] | None,
    recompute_layers: bool = False,
) -> tuple[
    Float[Tensor, "sequences tokens hidden"],
    Float[Tensor, "layers sequences kv_heads tokens head_dim"],
    Float[Tensor, "layers sequences kv_heads tokens head_dim"],
]:
    """Hidden states of a stretch and the keys and values it adds, from its inputs alone.

    Args:
        policy: Base and adapter.
        inputs: Tokens, positions, mask.
        cache_keys: Cache slots at the start of the stretch.
        cache_values: Likewise.
        states: Running state of every segment, or None.
        recompute_layers: A backward pass computes each layer again, so that of a layer only its input is kept.
    """
    first = inputs.mask is None
    attention = StretchAttention(
        None if first else cache_keys,
        None if first else cache_values,
        mask=inputs.mask,
        segments=inputs.segments,
        observer=inputs.observer,
        float8=policy.float8,
    )
    hidden = run_layers(
        policy,
        inputs.token_ids,
        positions=inputs.positions,
        attention=attention,
        states=read_state(policy, None if states is None else states.flatten(1, 2)),
        weights=adapter_weights(policy),
        recompute=recompute_layers,
    )
    sequences = inputs.token_ids.shape[0] // inputs.segments
    return hidden.reshape(sequences, -1, hidden.shape[-1]), *attention.take()
