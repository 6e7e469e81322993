"""The one extension point: which kept reasoning tokens leave at an eviction.

Decides: what a policy may look at (`KeptTokens`), how it says what it needs of that (`Needs`), and what it returns
(slots). A policy never sees the prompt, which is never evicted, nor padding.
A policy that needs nothing is a pure function of token indices, eviction number and stream seed: rollout and replay
both call it, and get the same answer. A policy that needs attention, keys or values could choose otherwise when these
are rounded otherwise: the rollout records what left, and the replay follows the record.
What nobody needs is never computed.

Paper: Section 3, "oldest 25 %"; the ablation over eviction policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from pte.method.cache import BoundedCache
    from pte.method.observe import ObservedQueries


@dataclass(frozen=True)
class Needs:
    """What a policy looks at besides token indices, eviction number and stream seed.

    Args:
        attention: Whose attention to the kept tokens is summed: of all queries while a token was kept (`kept`), of
            those since the last eviction (`since_eviction`), of the last ones before the next (`last`); None for
            nobody's.
        last_queries: How many the last ones are, from 1 to the tokens of a block.
        below_average: Count the probabilities below the mean of their query's instead of summing them.
        keys: The keys of the kept tokens, as they lie in the cache.
        values: Their values.
    """

    attention: ObservedQueries | None = None
    last_queries: int = 1
    below_average: bool = False
    keys: bool = False
    values: bool = False

    @property
    def anything(self) -> bool:
        """True when the choice depends on what the model computed, so that it has to be recorded."""
        return self.attention is not None or self.keys or self.values


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of saturated windows, as a policy sees them. What it does not need is None.

    Args:
        token_indices: Reasoning index of the token in each window slot.
        eviction_index: How many evictions each sequence had before.
        stream_seeds: The seed of each sequence's own random stream.
        attention_received: Softmax probabilities given to each token by the observed queries, its own included, summed
            over queries, query heads and layers; or, where `Needs.below_average`, how many of them were low.
        keys: Post-rotary keys.
        values: Values.
    """

    token_indices: Int[Tensor, "batch window"]
    eviction_index: Int[Tensor, " batch"]
    stream_seeds: Int[Tensor, " batch"]
    attention_received: Float[Tensor, "batch window"] | None = None
    keys: Float[Tensor, "layers batch kv_heads window head_dim"] | None = None
    values: Float[Tensor, "layers batch kv_heads window head_dim"] | None = None


class EvictionPolicy(Protocol):
    """Chooses the evicted slots of a saturated window, for every sequence of a batch by itself."""

    name: str
    needs: Needs

    def evicted_slots(self, kept: KeptTokens, *, evict_tokens: int) -> Int[Tensor, "batch evicted"]:
        """Slots whose tokens leave, in the order in which new tokens take them.

        Args:
            kept: The kept tokens.
            evict_tokens: Number of tokens that leave.
        """
        ...

    def segments_per_stretch(self, window_tokens: int, evict_tokens: int) -> int:
        """How many consecutive evictions only touch tokens that were kept before the first of them (at least 1).

        1 for a policy that needs anything: its next choice needs what the segment before it computes.
        """
        ...

    def check(self, window_tokens: int, evict_tokens: int) -> None:
        """Raises ValueError when the policy cannot work with this budget."""
        ...


def kept_tokens(
    cache: BoundedCache,
    needs: Needs,
    *,
    rows: Int[Tensor, " rows"] | slice,
    eviction_index: Int[Tensor, " rows"],
    stream_seeds: Int[Tensor, " rows"],
) -> KeptTokens:
    """What a policy sees of the given sequences of a cache.

    Args:
        cache: Its windows are saturated in these rows.
        needs: Of the policy.
        rows: Sequences that evict; a slice copies nothing.
        eviction_index: How many evictions each of them had before.
        stream_seeds: Of each of them.
    """
    window = (slice(None), rows, slice(None), slice(cache.prompt_slots, None))
    keys, values = cache.stores()
    received = cache.attention_received if needs.attention is not None else None
    return KeptTokens(
        token_indices=cache.token_indices()[rows],
        eviction_index=eviction_index,
        stream_seeds=stream_seeds,
        attention_received=None if received is None else received[rows],
        keys=cache.wide(keys, window).detach() if needs.keys else None,
        values=cache.wide(values, window).detach() if needs.values else None,
    )
