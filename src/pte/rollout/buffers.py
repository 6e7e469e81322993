"""The device side of the sequences that run: one row each, every tensor of fixed size, nothing read by the host.

Decides: what a row holds between two tokens and how a drawn token is recorded, so that a step needs no answer of the
host and can be captured once and replayed. A row that has stopped still computes, until it is refilled or dropped: what
it records lies behind its stop, or in a spare last column, and is never read.
Does not know: prompts in text, requests, which tokens end a completion, when to evict.

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
        tokens: Completion so far; the last column is spare.
        logprobs: Their log-probs when they were drawn, float32 or wider.
        uniforms: The random stream of each row.
        stream_seeds: Where the stream comes from; policies that evict at random take it too.
        states: Running states, or None without a state.
        reads: What the adapters read of them, or None.
        temperatures: Of each row; None where all share the engine's.
        top_ids: Likeliest tokens in the place of each token, the likeliest first; None where they are not recorded.
        top_logprobs: Their log-probs.
    """

    cache: BoundedCache
    current: Int[Tensor, " rows"]
    entered: Int[Tensor, " rows"]
    tokens: Int[Tensor, "rows columns"]
    logprobs: Float[Tensor, "rows columns"]
    uniforms: Float[Tensor, "rows columns"]
    stream_seeds: Int[Tensor, " rows"]
    states: Float[Tensor, "layers rows rank rank"] | None
    reads: Float[Tensor, "layers rows rank rank"] | None
    temperatures: Float[Tensor, " rows"] | None = None
    top_ids: Int[Tensor, "rows columns top"] | None = None
    top_logprobs: Float[Tensor, "rows columns top"] | None = None

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
            float8=policy.float8,
        )
        states = None if first is None else first[:, None].repeat(1, rows, 1, 1)
        reads = read_state(policy, states)
        return cls(
            cache=cache,
            current=torch.zeros(rows, dtype=torch.int64, device=device),
            entered=torch.zeros(rows, dtype=torch.int64, device=device),
            tokens=torch.zeros(rows, max_new_tokens + 1, dtype=torch.int64, device=device),
            logprobs=torch.zeros(
                rows, max_new_tokens + 1, dtype=torch.promote_types(policy.dtype, torch.float32), device=device
            ),
            uniforms=torch.zeros(rows, max_new_tokens + 1, device=device),
            stream_seeds=torch.zeros(rows, dtype=torch.int64, device=device),
            states=states,
            reads=reads,
        )

    @property
    def rows(self) -> int:
        """Sequences at once."""
        return self.current.shape[0]

    @property
    def last_column(self) -> int:
        """The spare one."""
        return self.tokens.shape[1] - 1

    def track_temperatures(self) -> None:
        """Gives every row a temperature of its own."""
        self.temperatures = torch.ones(self.rows, dtype=self.logprobs.dtype, device=self.tokens.device)

    def track_top(self, count: int) -> None:
        """Starts to record the likeliest tokens in the place of every token."""
        size = (*self.tokens.shape, count)
        self.top_ids = torch.zeros(size, dtype=torch.int64, device=self.tokens.device)
        self.top_logprobs = torch.zeros(size, dtype=self.logprobs.dtype, device=self.tokens.device)

    def admit(
        self,
        rows: Int[Tensor, " admitted"],
        logprobs: Float[Tensor, "admitted vocab"],
        *,
        uniforms: Float[Tensor, "admitted completion"],
        stream_seeds: Int[Tensor, " admitted"],
        greedy: bool | Bool[Tensor, " admitted"],
    ) -> None:
        """Draws the first token of sequences whose prompts have just been put into rows.

        Args:
            rows: Where they are.
            logprobs: Of the token after their prompts.
            uniforms: Their random streams.
            stream_seeds: Where these come from.
            greedy: Take the likeliest, in all of them or in each.
        """
        self.uniforms[rows, :-1] = uniforms
        self.stream_seeds[rows] = stream_seeds
        drawn = draw_tokens(logprobs, uniforms[:, 0], greedy=greedy)
        self.current[rows] = drawn
        self.entered[rows] = 0
        self.tokens[rows, 0] = drawn
        self.logprobs[rows, 0] = logprobs.gather(1, drawn[:, None])[:, 0]
        if self.top_ids is not None and self.top_logprobs is not None:
            self.top_logprobs[rows, 0], self.top_ids[rows, 0] = logprobs.topk(self.top_ids.shape[2])

    def record(self, logprobs: Float[Tensor, "rows vocab"], *, greedy: bool | Bool[Tensor, " rows"]) -> None:
        """Draws and records the token after the one that has just entered, in place.

        Args:
            logprobs: Of the next token.
            greedy: Take the likeliest, in all rows or in each.
        """
        self.entered.add_(1).clamp_(max=self.last_column)
        column = self.entered[:, None]
        drawn = draw_tokens(logprobs, self.uniforms.gather(1, column)[:, 0], greedy=greedy)
        self.current.copy_(drawn)
        token = drawn[:, None]
        self.tokens.scatter_(1, column, token)
        self.logprobs.scatter_(1, column, logprobs.gather(1, token))
        if self.top_ids is not None and self.top_logprobs is not None:
            likeliest = logprobs.topk(self.top_ids.shape[2])
            places = column[:, :, None].expand(-1, 1, self.top_ids.shape[2])
            self.top_ids.scatter_(1, places, likeliest.indices[:, None])
            self.top_logprobs.scatter_(1, places, likeliest.values[:, None])

    def newest_tokens(self, count: int) -> list[list[int]]:
        """The last tokens that each row has drawn, the newest last: one small copy to the host.

        Args:
            count: Of each row; no more than the steps since the last look, which all rows took, idle ones too, or 1.
        """
        if count == 1:
            return [[token] for token in self.current.tolist()]
        columns = self.entered[:, None] + torch.arange(1 - count, 1, device=self.tokens.device)
        return self.tokens.gather(1, columns).tolist()

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
