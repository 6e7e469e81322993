"""StreamingLLM: the first reasoning tokens stay as attention sinks, the oldest of the others leave.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453). The prompt, which
holds that paper's sinks, is protected here in any case; these are sinks among the reasoning tokens on top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pte.method.eviction.policy import KeptTokens, Needs

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class AttentionSinks:
    """Keeps the first `sink_tokens` reasoning tokens for ever, evicts the oldest of the rest.

    Args:
        sink_tokens: Reasoning tokens that never leave, at least 1.

    Raises:
        ValueError: `sink_tokens` is below 1.
    """

    name = "sinks"
    needs = Needs()

    def __init__(self, sink_tokens: int) -> None:
        if sink_tokens < 1:
            raise ValueError(f"sink_tokens must be at least 1, got {sink_tokens}; use policy 'window' for no sinks")
        self.sink_tokens = sink_tokens

    def evicted_slots(self, kept: KeptTokens, *, evict_tokens: int) -> Int[Tensor, "batch evicted"]:
        """Slots of the oldest tokens that are not sinks, oldest first."""
        tokens = kept.token_indices
        last = torch.iinfo(tokens.dtype).max
        candidates = tokens.masked_fill(tokens < self.sink_tokens, last)
        return candidates.topk(evict_tokens, dim=1, largest=False, sorted=True).indices

    def segments_per_stretch(self, window_tokens: int, evict_tokens: int) -> int:
        """The tokens kept now, less the sinks, leave before any newer one."""
        return (window_tokens - self.sink_tokens) // evict_tokens

    def check(self, window_tokens: int, evict_tokens: int) -> None:
        """Refuses a window that the sinks leave too small for one block.

        Raises:
            ValueError: sink_tokens + evict_tokens exceeds window_tokens.
        """
        if self.sink_tokens + evict_tokens > window_tokens:
            raise ValueError(
                f"sink_tokens + evict_tokens must not exceed window_tokens ({window_tokens}), got {self.sink_tokens} "
                f"+ {evict_tokens}; use sink_tokens of at most {window_tokens - evict_tokens}"
            )
