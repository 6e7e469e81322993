"""Prompts to completions under the bounded policy, in fixed slots that are refilled as sequences finish.

Decides: the order of work (`step`: evict and fold where due, then tokens until the host has to look again), prefilling
a group's prompt once, refilling finished slots, and dropping idle rows once no prompt is left. The cache never grows.
The schedule is a function of indices that the host counts by itself; what it cannot know is which rows have stopped,
so it looks before every eviction and, on CUDA, at least every `LOOK_EVERY_TOKENS` tokens.
Does not know: rewards, gradients, text, how a token is computed (`token_step`).

Paper: Section 3, rollouts from pi^D. Deviation: evictions happen before the token that needs the room, which already
reads the new state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pte.method.eviction.policy import kept_tokens
from pte.model.decode import DecodeStep
from pte.model.load import check_positions
from pte.model.segment import adapter_weights, first_state, fold
from pte.rollout.buffers import DecodeBuffers
from pte.rollout.prefill import PromptReader
from pte.rollout.record import Rollout, RolloutRequest
from pte.rollout.sampling import stream_uniforms
from pte.rollout.token_step import StateControl, TokenStep
from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

    from pte.model.policy import BoundedPolicy

LOOK_EVERY_TOKENS = 8
EVICTED_NUMBERS = 2**26
"""Keys that one fold takes at most, over layers, rows and tokens: they and what is made of them need about 1 GB."""
COMPACT_BELOW_FRACTION = {"cpu": 0.75, "cuda": 0.5}
"""On CUDA a new size costs a new graph, and a step of half the rows more than half the time."""


@dataclass
class RunningSequence:
    """Host-side account of the sequence in one row.

    Args:
        order: Of its request.
        request: What it completes.
        entering: Reasoning index of the token that enters next, if it still runs.
        evicted: Reasoning indices that left at each eviction, where they are recorded.
    """

    order: int
    request: RolloutRequest
    entering: int = 0
    evicted: list[Tensor] = field(default_factory=list)


class RolloutEngine:
    """Completes prompts under one policy, at most `slots` at a time.

    Args:
        policy: The bounded policy.
        slots: Sequences that run at once; the cache is `slots` x (longest prompt + window) tokens, for ever.
        max_new_tokens: Completion tokens at most; a completion that reaches it is cut off.
        temperature: Above 0, or 0 for greedy decoding.
        stop_token_ids: Tokens that end a completion; they belong to it.
        state_control: `own` state; or, as a control, all states `zeroed`, or each sequence reading its neighbour's
            (`shuffled`).
        allow_beyond_trained_positions: Run past the positions that the base was trained on.

    Raises:
        ValueError: Slots or max_new_tokens below 1, a negative temperature, or `shuffled` with fewer than 2 slots.
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
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}; use for example 1.0")
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
        self.path = ""

    @torch.no_grad()
    def run(
        self, requests: Sequence[RolloutRequest], *, on_finish: Callable[[Rollout], None] | None = None
    ) -> list[Rollout]:
        """Completes every request; the result is in the order of the requests.

        Args:
            requests: Prompts with their streams; neighbours that share a prompt share its prefill.
            on_finish: Called with each rollout as it ends, for progress.

        Raises:
            ValueError: A prompt plus max_new_tokens exceeds the trained positions, or one request is to be shuffled.
        """
        if not requests:
            return []
        if self.state_control == "shuffled" and len(requests) < 2:
            raise ValueError(
                f"state_control 'shuffled' needs 2 sequences or more, got {len(requests)}; give more prompts"
            )
        longest = max(len(request.prompt_ids) for request in requests)
        check_positions(
            self.policy.base.config,
            prompt_tokens=longest,
            completion_tokens=self.max_new_tokens,
            allow_beyond_trained_positions=self.allow_beyond_trained_positions,
        )
        self.start(min(self.slots, len(requests)), requests)
        self.on_finish = on_finish
        try:
            self.refill()
            while any(sequence is not None for sequence in self.running):
                self.step()
                self.refill()
                self.compact()
            return [self.results[order] for order in range(len(requests))]
        finally:
            self.release()

    def release(self) -> None:
        """Frees what `start` allocated, so that nothing of a rollout is held while an update runs."""
        for name in ("buffers", "first", "reader", "decode", "token_step"):
            delattr(self, name)

    def start(self, rows: int, requests: Sequence[RolloutRequest]) -> None:
        """Allocates the slots and what every step needs."""
        policy = self.policy
        prompts = [request.prompt_ids for request in requests]
        prompt_slots = max(map(len, prompts))
        weights = adapter_weights(policy)
        self.queue = deque(enumerate(requests))
        self.results: dict[int, Rollout] = {}
        self.running: list[RunningSequence | None] = [None] * rows
        self.first = first_state(policy)
        self.buffers = DecodeBuffers.allocate(
            policy,
            rows=rows,
            prompt_slots=prompt_slots,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            first=self.first,
        )
        needs = policy.eviction.needs
        self.observes = needs.attention is not None and policy.schedule.num_evictions(self.max_new_tokens) > 0
        if self.observes and needs.attention is not None:
            self.buffers.cache.track_attention(needs.attention)
        self.reader = PromptReader(
            policy,
            prompts,
            weights=weights,
            first=self.first,
            state_control=self.state_control,
            temperature=self.temperature,
        )
        self.decode = DecodeStep(policy, weights, num_positions=prompt_slots + self.max_new_tokens + 1)
        self.make_token_step()
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.buffers.cache.kv_bytes)
        states = self.buffers.states
        self.peak_state_bytes = max(self.peak_state_bytes, 0 if states is None else states.nbytes)

    def make_token_step(self) -> None:
        """The step over the rows that there are."""
        self.token_step = TokenStep(
            self.policy,
            self.buffers,
            forward=self.decode,
            temperature=self.temperature,
            state_control=self.state_control,
            observes=self.observes,
        )
        self.path = self.token_step.path

    def refill(self) -> None:
        """Puts waiting requests into free rows until no row or no request is left."""
        while self.queue and (free := [row for row, sequence in enumerate(self.running) if sequence is None]):
            admitted = [(row, *self.queue.popleft()) for row in free[: len(self.queue)]]
            self.reader.read([request.prompt_ids for _, _, request in admitted])
            self.admit(admitted)
            self.finish_stopped()

    def admit(self, admitted: Sequence[tuple[int, int, RolloutRequest]]) -> None:
        """Starts sequences in free rows and draws their first tokens.

        Args:
            admitted: Row, order and request of each.
        """
        buffers, device = self.buffers, self.policy.device
        rows = torch.tensor([row for row, _, _ in admitted], device=device)
        requests = [request for _, _, request in admitted]
        logprobs = []
        for row, order, request in admitted:
            prompt = self.reader.take(request.prompt_ids)
            buffers.cache.place_prompt(
                torch.tensor([row], device=device),
                prompt.keys[:, None],
                prompt.values[:, None],
                lengths=torch.tensor([len(request.prompt_ids)], device=device),
            )
            logprobs.append(prompt.logprobs)
            self.running[row] = RunningSequence(order=order, request=request)
        if self.first is not None:
            buffers.set_states(self.policy, rows, self.first[:, None].expand(-1, len(admitted), -1, -1))
        uniforms = [stream_uniforms(request.stream_seed, self.max_new_tokens) for request in requests]
        buffers.admit(
            rows,
            torch.stack(logprobs),
            uniforms=torch.stack(uniforms).to(device),
            stream_seeds=torch.tensor([request.stream_seed for request in requests], device=device),
            greedy=self.temperature == 0,
        )

    def step(self) -> None:
        """Evictions that are due, then tokens for every running sequence until the host has to look again."""
        self.evict_where_due()
        self.decode_tokens()
        self.finish_stopped()

    @timed("decode")
    def decode_tokens(self) -> None:
        """As many tokens as need no eviction and no look."""
        running = [sequence for sequence in self.running if sequence is not None]
        longest = max(sequence.entering for sequence in running)
        ends_in = self.max_new_tokens - 1 - min(sequence.entering for sequence in running)
        tokens = min(self.look_every_tokens, ends_in)
        for sequence in running:
            due = self.policy.schedule.tokens_until_eviction(sequence.entering)
            tokens = tokens if due is None else min(tokens, due)
        for offset in range(tokens):
            self.token_step(longest=longest + offset, observed=self.observed_rows(offset))
        for sequence in running:
            sequence.entering += tokens
        self.decode_steps += tokens

    def observed_rows(self, offset: int) -> Bool[Tensor, " rows"] | None:
        """Rows whose query of the token after `offset` more is asked about at their next eviction; None for none."""
        if not self.observes:
            return None
        observed = [
            sequence is not None and self.policy.observes(sequence.entering + offset) for sequence in self.running
        ]
        return torch.tensor(observed, device=self.policy.device) if any(observed) else None

    def evict_where_due(self) -> None:
        """Folds and evicts a block in every sequence whose next token needs the room, some rows at a time."""
        schedule, shape = self.policy.schedule, self.policy.cache_shape
        due = [
            (row, sequence)
            for row, sequence in enumerate(self.running)
            if sequence is not None and schedule.evicts_at(sequence.entering)
        ]
        if due and schedule.evict_tokens is not None:
            size = max(1, EVICTED_NUMBERS // (shape.layers * schedule.evict_tokens * shape.kv_dim))
            for start in range(0, len(due), size):
                self.evict(due[start : start + size], evict_tokens=schedule.evict_tokens)

    def evict(self, due: Sequence[tuple[int, RunningSequence]], *, evict_tokens: int) -> None:
        """Folds and evicts a block in each of the given rows."""
        schedule, eviction, buffers = self.policy.schedule, self.policy.eviction, self.buffers
        device = self.policy.device
        rows = torch.tensor([row for row, _ in due], device=device)
        indices = [schedule.evictions_before(sequence.entering) - 1 for _, sequence in due]
        kept = kept_tokens(
            buffers.cache,
            eviction.needs,
            rows=rows,
            eviction_index=torch.tensor(indices, device=device),
            stream_seeds=buffers.stream_seeds[rows],
        )
        evicted = buffers.cache.evict(rows, eviction.evicted_slots(kept, evict_tokens=evict_tokens))
        if self.policy.records_evictions:
            left = (evicted.positions - buffers.cache.prompt_lengths[rows, None]).cpu()
            for (_, sequence), tokens in zip(due, left, strict=True):
                sequence.evicted.append(tokens)
        if buffers.states is not None and self.folds:
            buffers.set_states(self.policy, rows, fold(self.policy, buffers.states[:, rows], evicted))

    @property
    def folds(self) -> bool:
        """True when evictions change the state."""
        return self.policy.adapter is not None and self.policy.adapter.folds

    def finish_stopped(self) -> None:
        """Looks which rows have stopped, hands their rollouts over, and frees them."""
        buffers = self.buffers
        stops = buffers.stopped_at.tolist() if self.stop_token_ids else [-1] * len(self.running)
        stopped = [
            (row, sequence, (sequence.entering if stop < 0 else stop) + 1)
            for row, (sequence, stop) in enumerate(zip(self.running, stops, strict=True))
            if sequence is not None and (stop >= 0 or sequence.entering + 1 == self.max_new_tokens)
        ]
        if not stopped:
            return
        rows = torch.tensor([row for row, _, _ in stopped], device=self.policy.device)
        longest = max(count for _, _, count in stopped)
        tokens, logprobs = buffers.tokens[rows, :longest].tolist(), buffers.logprobs[rows, :longest].cpu()
        states = buffers.states
        norms = [0.0] * len(stopped) if states is None else states[:, rows].float().norm(dim=(2, 3)).mean(0).tolist()
        for place, (row, sequence, count) in enumerate(stopped):
            completion = tuple(tokens[place][:count])
            rollout = Rollout(
                prompt_ids=sequence.request.prompt_ids,
                completion_ids=completion,
                rollout_logprobs=logprobs[place, :count].clone(),
                finish_reason="stop" if completion[-1] in self.stop_token_ids else "length",
                stream_seed=sequence.request.stream_seed,
                temperature=self.temperature,
                evictions=self.policy.schedule.num_evictions(count),
                state_norm=norms[place],
                evicted_tokens=self.recorded(sequence),
            )
            self.results[sequence.order] = rollout
            self.running[row] = None
            if self.on_finish is not None:
                self.on_finish(rollout)

    def recorded(self, sequence: RunningSequence) -> Int[Tensor, "evictions evicted"] | None:
        """What left a sequence at each of its evictions, where the replay cannot know it."""
        if not self.policy.records_evictions:
            return None
        if sequence.evicted:
            return torch.stack(sequence.evicted)
        return torch.zeros(0, self.policy.schedule.evict_tokens or 0, dtype=torch.int64)

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
