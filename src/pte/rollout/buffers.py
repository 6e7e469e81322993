"""The device side of the sequences that run: one row each, every tensor of fixed size, nothing read by the host.

Decides: what a row holds between two tokens, how a drawn token is recorded, and when a row stops by itself, so that a
step needs no answer of the host and can be captured once and replayed. A row that has stopped still computes; it
records nothing and its cache does not move on. Does not know: prompts in text, requests, when to evict.

Paper: Section 3, rollouts from pi^D.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

from pte.method.cache import BoundedCache
from pte.model.segment import read_state
from pte.rollout.sampling import draw_tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from pte.model.policy import BoundedPolicy


@dataclass
class DecodeBuffers:
    """Everything that a step reads and writes.

    Args:
        cache: Keys, values and positions.
        current: The token of each row that enters next.
        entered: Reasoning tokens of each row that have entered; the newest drawn token has this index.
        live: True while a row runs.
        tokens: Completion so far.
        logprobs: Their log-probs when they were drawn, float32 or wider.
        uniforms: The random stream of each row.
        stream_seeds: Where the stream comes from; policies that evict at random take it too.
        states: Running states, or None without a state.
        reads: What the adapters read of them, or None.
    """

    cache: BoundedCache
    current: Int[Tensor, " rows"]
    entered: Int[Tensor, " rows"]
    live: Bool[Tensor, " rows"]
    tokens: Int[Tensor, "rows completion"]
    logprobs: Float[Tensor, "rows completion"]
    uniforms: Float[Tensor, "rows completion"]
    stream_seeds: Int[Tensor, " rows"]
    states: Float[Tensor, "layers rows rank rank"] | None
    reads: Float[Tensor, "layers rows rank rank"] | None

    @classmethod
    def allocate(
        cls,
        policy: BoundedPolicy,
        *,
        rows: int,
        prompt_slots: int,
        max_new_tokens: int,
        first: Float[Tensor, "layers rank rank"] | None,
    ) -> DecodeBuffers:
        """Empty rows.

        Args:
            policy: Sizes, dtype and device.
            rows: Sequences at once.
            prompt_slots: Longest prompt.
            max_new_tokens: Longest completion.
            first: The state before any eviction, or None.
        """
        device = policy.device
        cache = BoundedCache.allocate(
            policy.cache_shape,
            batch=rows,
            prompt_slots=prompt_slots,
            window_slots=policy.schedule.kept_tokens(max_new_tokens),
            dtype=policy.dtype,
            device=device,
        )
        states = None if first is None else first[:, None].repeat(1, rows, 1, 1)
        reads = read_state(policy, states)
        return cls(
            cache=cache,
            current=torch.zeros(rows, dtype=torch.int64, device=device),
            entered=torch.zeros(rows, dtype=torch.int64, device=device),
            live=torch.zeros(rows, dtype=torch.bool, device=device),
            tokens=torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device),
            logprobs=torch.zeros(
                rows, max_new_tokens, dtype=torch.promote_types(policy.dtype, torch.float32), device=device
            ),
            uniforms=torch.zeros(rows, max_new_tokens, device=device),
            stream_seeds=torch.zeros(rows, dtype=torch.int64, device=device),
            states=states,
            reads=reads,
        )

    @property
    def rows(self) -> int:
        """Sequences at once."""
        return self.current.shape[0]

    def first_token(
        self,
        rows: Int[Tensor, " admitted"],
        logprobs: Float[Tensor, "admitted vocab"],
        *,
        greedy: bool,
        stops: Int[Tensor, " stops"],
    ) -> None:
        """Draws the first token of sequences that have just been put into rows.

        Args:
            rows: Where they are; their uniforms are set.
            logprobs: Of the token after their prompts.
            greedy: Take the likeliest.
            stops: Tokens that end a completion.
        """
        drawn = draw_tokens(logprobs, self.uniforms[rows, 0], greedy=greedy)
        self.current[rows] = drawn
        self.entered[rows] = 0
        self.tokens[rows, 0] = drawn
        self.logprobs[rows, 0] = logprobs.gather(1, drawn[:, None])[:, 0]
        self.live[rows] = self.goes_on(drawn, stops) & (self.tokens.shape[1] > 1)

    def next_token(self, logprobs: Float[Tensor, "rows vocab"], *, greedy: bool, stops: Int[Tensor, " stops"]) -> None:
        """Draws and records the token after the one that has just entered, in every row that runs; in place.

        Args:
            logprobs: Of the next token.
            greedy: Take the likeliest.
            stops: Tokens that end a completion.
        """
        self.entered += self.live
        column = self.entered[:, None]
        drawn = draw_tokens(logprobs, self.uniforms.gather(1, column)[:, 0], greedy=greedy)[:, None]
        live = self.live[:, None]
        self.tokens.scatter_(1, column, torch.where(live, drawn, self.tokens.gather(1, column)))
        found = logprobs.gather(1, drawn)
        self.logprobs.scatter_(1, column, torch.where(live, found, self.logprobs.gather(1, column)))
        self.current.copy_(drawn[:, 0])
        self.live &= self.goes_on(drawn[:, 0], stops) & (self.entered + 1 < self.tokens.shape[1])

    @staticmethod
    def goes_on(drawn: Int[Tensor, " rows"], stops: Int[Tensor, " stops"]) -> Bool[Tensor, " rows"]:
        """True where a drawn token does not end its completion."""
        return (drawn[:, None] != stops).all(1)

    def set_states(
        self, policy: BoundedPolicy, rows: Int[Tensor, " some"], states: Float[Tensor, "layers _ rank rank"]
    ) -> None:
        """Gives rows new running states."""
        assert self.states is not None and self.reads is not None
        self.states[:, rows] = states
        reads = read_state(policy, states)
        assert reads is not None
        self.reads[:, rows] = reads

    def compact(self, rows: Int[Tensor, " kept"]) -> DecodeBuffers:
        """The given rows alone, ascending; what the others held is lost."""
        kept = {
            one.name: value[:, rows] if one.name in ("states", "reads") else value[rows]
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), torch.Tensor)
        }
        return replace(self, cache=self.cache.compact(rows), **kept)
