"""Prompts to completions under the bounded policy, in fixed slots that are refilled as sequences finish.

Decides: the order of work (`step`: evict and fold where due, then tokens until the host has to look again), prefilling
a group's prompt once, refilling finished slots, and dropping idle rows once no prompt is left. The cache never grows.
`run` completes given requests; between `open` and `close`, requests come and go while others run.
The schedule is a function of indices that the host counts by itself; what it cannot know is which rows have stopped,
so it looks before every eviction and, on CUDA, at least every `LOOK_EVERY_TOKENS` tokens.
Does not know: rewards, gradients, text, how a token is computed (`token_step`).

Paper: Section 3, rollouts from pi^D. Deviation: evictions happen before the token that needs the room, which already
reads the new state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pte.model.load import check_positions
from pte.model.policy import check_no_autocast
from pte.model.segment import adapter_weights, first_state
from pte.rollout.admit import admit_sequences
from pte.rollout.buffers import DecodeBuffers
from pte.rollout.evict import evict_where_due
from pte.rollout.prefill import PromptReader
from pte.rollout.record import Rollout, RolloutRequest, check_fits
from pte.rollout.sampling import check_temperature
from pte.rollout.sequences import NewTokens, RunningSequence, look, new_tokens, whole_rollouts
from pte.rollout.token_step import StateControl, TokenStep, decode_forward, decode_path
from pte.timing import timed

if TYPE_CHECKING:
    from pte.model.policy import BoundedPolicy

LOOK_EVERY_TOKENS = 8
COMPACT_BELOW_FRACTION = {"cpu": 0.75, "cuda": 0.5}
"""On CUDA a new size costs a new graph, and a step of half the rows more than half the time."""


class RolloutEngine:
    """Completes prompts under one policy, at most `slots` at a time.

    Args:
        policy: The bounded policy.
        slots: Sequences that run at once; the cache is `slots` x (longest prompt + window) tokens, for ever.
        max_new_tokens: Completion tokens at most; a completion that reaches it is cut off.
        temperature: At least 1e-4, or 0 for greedy decoding.
        stop_token_ids: Tokens that end a completion; they belong to it.
        state_control: `own` state; or, as a control, all states `zeroed`, or each sequence reading its neighbour's
            (`shuffled`).
        allow_beyond_trained_positions: Run past the positions that the base was trained on.

    Raises:
        ValueError: Slots or max_new_tokens below 1, a temperature that nothing can be drawn at, or `shuffled` with
            fewer than 2 slots.
    """

    def __init__(
        self,
        policy: BoundedPolicy,
        *,
        slots: int,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
        state_control: StateControl = "own",
        allow_beyond_trained_positions: bool = False,
    ) -> None:
        for name, value in (("slots", slots), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; use for example 64")
        check_temperature(temperature)
        if state_control == "shuffled" and slots < 2:
            raise ValueError(f"state_control 'shuffled' needs at least 2 slots, got {slots}; use for example 64")
        self.policy = policy
        self.slots = slots
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.stop_token_ids = frozenset(stop_token_ids)
        self.state_control: StateControl = state_control
        self.allow_beyond_trained_positions = allow_beyond_trained_positions
        self.peak_cache_bytes = 0
        self.peak_state_bytes = 0
        self.decode_steps = 0
        self.look_every_tokens = LOOK_EVERY_TOKENS if policy.device.type == "cuda" else 1
        self.path = decode_path(policy)

    @torch.no_grad()
    def run(
        self, requests: Sequence[RolloutRequest], *, on_finish: Callable[[Rollout], None] | None = None
    ) -> list[Rollout]:
        """Completes every request; the result is in the order of the requests.

        Args:
            requests: Prompts with their streams; neighbours that share a prompt share its prefill.
            on_finish: Called with each rollout as it ends, for progress.

        Raises:
            ValueError: A prompt plus max_new_tokens exceeds the trained positions, one request is to be shuffled, or a
                request asks for more tokens than max_new_tokens.
        """
        if not requests:
            return []
        if self.state_control == "shuffled" and len(requests) < 2:
            raise ValueError(
                f"state_control 'shuffled' needs 2 sequences or more, got {len(requests)}; give more prompts"
            )
        results: dict[int, Rollout] = {}

        def keep(order: int, rollout: Rollout) -> None:
            results[order] = rollout
            if on_finish is not None:
                on_finish(rollout)

        self.open(
            rows=min(self.slots, len(requests)),
            prompt_slots=max(len(request.prompt_ids) for request in requests),
            on_finish=keep,
            own_temperatures=any(request.temperature is not None for request in requests),
        )
        try:
            for request in requests:
                self.submit(request)
            self.drain()
            return [results[order] for order in range(len(requests))]
        finally:
            self.close()

    @torch.no_grad()
    def open(
        self,
        *,
        rows: int,
        prompt_slots: int,
        on_finish: Callable[[int, Rollout], None],
        on_tokens: Callable[[NewTokens], None] | None = None,
        top_logprobs: int = 0,
        own_temperatures: bool = False,
    ) -> None:
        """Allocates the slots and what every step needs; then requests can be submitted.

        Args:
            rows: Sequences at once.
            prompt_slots: Longest prompt.
            on_finish: Called with a request's order and its rollout when it ends.
            on_tokens: Called with new tokens as the host sees them, before `on_finish`; it may cancel requests.
            top_logprobs: Likeliest tokens that are recorded in the place of every token.
            own_temperatures: Whether requests have temperatures of their own.

        Raises:
            ValueError: The longest prompt plus max_new_tokens exceeds the trained positions, or autocast is on.
            RuntimeError: It is open already.
        """
        policy = self.policy
        check_no_autocast(policy)
        check_positions(
            policy.base.config,
            prompt_tokens=prompt_slots,
            completion_tokens=self.max_new_tokens,
            allow_beyond_trained_positions=self.allow_beyond_trained_positions,
        )
        if self.opened:
            raise RuntimeError("an engine runs one set of requests at a time, and this one is open; call close first")
        try:
            weights = adapter_weights(policy)
            self.on_finish, self.on_tokens = on_finish, on_tokens
            self.submitted = 0
            self.queue: deque[tuple[int, RolloutRequest]] = deque()
            self.running: list[RunningSequence | None] = [None] * rows
            self.first = first_state(policy)
            self.buffers = DecodeBuffers.allocate(
                policy,
                rows=rows,
                prompt_slots=prompt_slots,
                max_new_tokens=self.max_new_tokens,
                first=self.first,
            )
            if own_temperatures:
                self.buffers.track_temperatures()
            if top_logprobs:
                self.buffers.track_top(top_logprobs)
            needs = policy.eviction.needs
            self.observes = needs.attention is not None and policy.schedule.num_evictions(self.max_new_tokens) > 0
            if self.observes and needs.attention is not None:
                self.buffers.cache.track_attention(needs.attention)
            self.reader = PromptReader(policy, weights=weights, first=self.first, state_control=self.state_control)
            self.decode = decode_forward(policy, weights, num_positions=prompt_slots + self.max_new_tokens + 1)
            self.make_token_step()
            self.peak_cache_bytes = max(self.peak_cache_bytes, self.buffers.cache.kv_bytes)
            states = self.buffers.states
            self.peak_state_bytes = max(self.peak_state_bytes, 0 if states is None else states.nbytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Frees what `open` allocated, so that nothing of a rollout is held while an update runs."""
        for name in ("buffers", "first", "reader", "decode", "token_step", "on_finish", "on_tokens"):
            self.__dict__.pop(name, None)

    @property
    def opened(self) -> bool:
        """True between `open` and `close`."""
        return hasattr(self, "buffers")

    def submit(self, request: RolloutRequest) -> int:
        """The order of a request that waits for a row from now on: how many came before it.

        Raises:
            ValueError: The engine has no room for it, or it has a temperature of its own and the engine one for all.
            RuntimeError: The engine is not open.
        """
        if not self.opened:
            raise RuntimeError("requests are submitted to an open engine, and this one is closed; call open first")
        check_fits(
            request,
            prompt_slots=self.buffers.cache.prompt_slots,
            max_new_tokens=self.max_new_tokens,
            own_temperatures=self.buffers.temperatures is not None,
        )
        order = self.submitted
        self.submitted += 1
        self.queue.append((order, request))
        self.reader.expect(request.prompt_ids)
        return order

    def cancel(self, order: int) -> None:
        """Drops a request wherever it is, and frees its row; one that has ended is left alone."""
        for row, sequence in enumerate(self.running):
            if sequence is not None and sequence.order == order:
                self.running[row] = None
        for waiting in [one for one in self.queue if one[0] == order]:
            self.queue.remove(waiting)
            self.reader.forget(waiting[1].prompt_ids)

    @torch.no_grad()
    def drain(self) -> None:
        """Completes every request that was submitted; rows that are no longer needed are dropped on the way."""
        self.refill()
        while self.busy:
            self.step()
            self.refill()
            self.compact()

    @property
    def busy(self) -> bool:
        """True while a sequence runs, so that `step` has work."""
        return any(sequence is not None for sequence in self.running)

    @property
    def free_rows(self) -> int:
        """Rows that neither a running nor a waiting request will take."""
        return max(0, self.running.count(None) - len(self.queue))

    def make_token_step(self) -> None:
        """The step over the rows that there are."""
        self.token_step = TokenStep(
            self.policy,
            self.buffers,
            forward=self.decode,
            temperature=self.temperature,
            state_control=self.state_control,
        )

    @torch.no_grad()
    def refill(self) -> None:
        """Puts waiting requests into free rows until no row or no request is left."""
        while self.queue and (free := [row for row, sequence in enumerate(self.running) if sequence is None]):
            admitted = [(row, self.sequence(*self.queue.popleft())) for row in free[: len(self.queue)]]
            self.reader.read([sequence.request.prompt_ids for _, sequence in admitted])
            admit_sequences(
                self.policy,
                self.buffers,
                admitted,
                reader=self.reader,
                first=self.first,
                temperature=self.temperature,
            )
            for row, sequence in admitted:
                self.running[row] = sequence
            self.finish_stopped()

    def sequence(self, order: int, request: RolloutRequest) -> RunningSequence:
        """A request that starts, with the engine's limit and temperature where it has none of its own."""
        return RunningSequence(
            order=order,
            request=request,
            max_new_tokens=request.max_new_tokens or self.max_new_tokens,
            temperature=self.temperature if request.temperature is None else request.temperature,
        )

    @torch.no_grad()
    def step(self) -> None:
        """Evictions that are due, then tokens for every running sequence until the host has to look again."""
        evict_where_due(self.policy, self.buffers, self.running)
        self.decode_tokens()
        self.finish_stopped()

    @timed("decode")
    def decode_tokens(self) -> None:
        """As many tokens as need no eviction and no look; none runs past its last."""
        running = [sequence for sequence in self.running if sequence is not None]
        longest = max(sequence.entering for sequence in running)
        tokens = min(self.look_every_tokens, *(one.max_new_tokens - 1 - one.entering for one in running))
        for sequence in running:
            due = self.policy.schedule.tokens_until_eviction(sequence.entering)
            tokens = tokens if due is None else min(tokens, due)
        self.token_step.claim()
        for offset in range(tokens):
            self.token_step(longest=longest + offset, observed_rows=self.observed_rows(offset))
        for sequence in running:
            sequence.entering += tokens
        self.decode_steps += tokens

    def observed_rows(self, offset: int) -> list[bool]:
        """True for each row whose query of the token after `offset` more is asked about at its next eviction."""
        return [
            self.observes and sequence is not None and self.policy.observes(sequence.entering + offset)
            for sequence in self.running
        ]

    def finish_stopped(self) -> None:
        """Looks at what was drawn, hands new tokens and whole rollouts over, and frees the rows that have stopped."""
        seen = look(self.buffers, self.running, stop_token_ids=self.stop_token_ids)
        if self.on_tokens is not None:
            rows = {one.sequence.order: one.row for one in seen}
            for tokens in new_tokens(self.buffers, seen):
                # An earlier call may have cancelled this one.
                if self.running[rows[tokens.order]] is not None:
                    self.on_tokens(tokens)
        whole = [one for one in seen if one.ended and self.running[one.row] is one.sequence]
        if not whole:
            return
        rollouts = whole_rollouts(self.policy, self.buffers, whole, stop_token_ids=self.stop_token_ids)
        for one, rollout in zip(whole, rollouts, strict=True):
            self.running[one.row] = None
            self.on_finish(one.sequence.order, rollout)

    def compact(self) -> None:
        """Drops idle rows once no request waits, so that finished sequences stop costing."""
        if self.queue or self.state_control == "shuffled":
            return
        kept = [row for row, sequence in enumerate(self.running) if sequence is not None]
        fraction = COMPACT_BELOW_FRACTION["cuda" if self.policy.device.type == "cuda" else "cpu"]
        if not kept or len(kept) > fraction * len(self.running):
            return
        self.buffers = self.buffers.compact(torch.tensor(kept, device=self.policy.device))
        self.running = [self.running[row] for row in kept]
        self.make_token_step()
