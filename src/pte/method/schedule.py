"""When tokens leave the cache, and which stretches of a completion can be computed at once.

Decides: before which reasoning token an eviction happens, how many there were before any token, the segments
between evictions (one constant state each), and the stretches (several segments whose evictions only touch
tokens written before the stretch, so that one parallel forward equals the token-by-token walk).
Does not know: tensors, padding, batches, prompts. Everything here is a pure function of the reasoning-token index.

Paper: Section 3 (eviction when the cache is saturated, oldest 25 % first).
Deviations: 1. the budget counts reasoning tokens, the prompt comes on top; 2. an eviction happens before the token
that needs the room enters, and that token already reads the new state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class EvictionSchedule:
    """Budget of reasoning tokens and the block that leaves at once.

    Args:
        window_tokens: Reasoning tokens kept at most, W > 0; None keeps every token (the full cache).
        evict_tokens: Reasoning tokens evicted at once, E, with W a multiple of E; None only with a full cache.

    Raises:
        TypeError: A budget is not an integer number of tokens.
        ValueError: W or E is not positive, or W is not a multiple of E.
    """

    window_tokens: int | None
    evict_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.window_tokens is None:
            if self.evict_tokens is not None:
                raise ValueError(
                    f"evict_tokens must be None when window_tokens is None (the full cache evicts nothing), "
                    f"got {self.evict_tokens}; set window_tokens as well"
                )
            return
        for name, value in (("window_tokens", self.window_tokens), ("evict_tokens", self.evict_tokens)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer number of tokens, got {value!r}; use for example 1024")
            if value <= 0:
                raise ValueError(f"{name} must be at least 1 token, got {value}; use for example 1024")
        window, block = self.window_tokens, self.evict_tokens
        assert block is not None
        if window % block:
            raise ValueError(
                f"window_tokens must be a multiple of evict_tokens ({block}), got {window}; "
                f"use {(window // block + 1) * block}"
            )

    @property
    def is_full(self) -> bool:
        """True when nothing is ever evicted."""
        return self.window_tokens is None

    def evictions_before(self, token_index: int) -> int:
        """Number of evictions that have happened when reasoning token `token_index` attends.

        Args:
            token_index: Index of the reasoning token that enters as input, from 0.
        """
        if self.window_tokens is None or token_index < self.window_tokens:
            return 0
        assert self.evict_tokens is not None
        return (token_index - self.window_tokens) // self.evict_tokens + 1

    def evicts_at(self, token_index: int) -> bool:
        """True when a block leaves just before reasoning token `token_index` enters."""
        if self.window_tokens is None or token_index < self.window_tokens:
            return False
        assert self.evict_tokens is not None
        return (token_index - self.window_tokens) % self.evict_tokens == 0

    def tokens_until_eviction(self, token_index: int) -> int | None:
        """Tokens that can enter, `token_index` the first, before a block leaves again; None when none ever does.

        Args:
            token_index: Index of the reasoning token that enters next; an eviction before it has happened already.
        """
        if self.window_tokens is None:
            return None
        if token_index < self.window_tokens:
            return self.window_tokens - token_index
        assert self.evict_tokens is not None
        return self.evict_tokens - (token_index - self.window_tokens) % self.evict_tokens

    def num_evictions(self, completion_tokens: int) -> int:
        """Evictions over a completion; its last token is sampled and never enters as input."""
        return self.evictions_before(completion_tokens - 2) if completion_tokens >= 2 else 0

    def kept_tokens(self, completion_tokens: int) -> int:
        """Most reasoning tokens that the cache holds at once over a completion."""
        entered = max(completion_tokens - 1, 0)
        return entered if self.window_tokens is None else min(entered, self.window_tokens)

    def stretches(self, entered_tokens: int, *, segments_per_stretch: int) -> Iterator[Stretch]:
        """Stretches that cover reasoning tokens 0 .. entered_tokens - 1 in order.

        Args:
            entered_tokens: Reasoning tokens that enter as input.
            segments_per_stretch: How many consecutive evictions of the policy only touch tokens written before the
                first of them (`EvictionPolicy.segments_per_stretch`).
        """
        first = entered_tokens if self.window_tokens is None else min(self.window_tokens, entered_tokens)
        yield Stretch(start=0, stop=first, first_eviction=0, num_evictions=0)
        if self.window_tokens is None:
            return
        assert self.evict_tokens is not None
        start, eviction = self.window_tokens, 0
        while start < entered_tokens:
            stop = min(start + segments_per_stretch * self.evict_tokens, entered_tokens)
            segments = -(-(stop - start) // self.evict_tokens)
            yield Stretch(start=start, stop=stop, first_eviction=eviction, num_evictions=segments)
            start, eviction = stop, eviction + segments


@dataclass(frozen=True)
class Stretch:
    """Consecutive reasoning tokens that one parallel forward computes.

    Args:
        start: First reasoning token of the stretch.
        stop: One past its last token.
        first_eviction: Index of the eviction before its first segment.
        num_evictions: Evictions inside it, one before each of its segments; 0 in the first stretch, which also holds
            the prompt and is one segment under the first state.
    """

    start: int
    stop: int
    first_eviction: int
    num_evictions: int

    @property
    def num_segments(self) -> int:
        """Parts of constant state."""
        return max(self.num_evictions, 1)
