"""Prompts to completions under the bounded policy, in fixed slots that are refilled as sequences finish.

Decides: the order of work of one token (`step`: evict and fold where due, one forward, one draw), prefilling a
group's prompt once, refilling finished slots, and dropping idle rows once no prompt is left. The cache never grows.
Does not know: rewards, gradients, text.

Paper: Section 3, rollouts from pi^D. Deviation: evictions happen before the token that needs the room, which already
reads the new state.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from pte.method.attention import DecodeAttention, StretchAttention, stretch_mask
from pte.method.cache import BoundedCache
from pte.method.eviction.policy import kept_tokens
from pte.method.observe import AttentionObserver
from pte.model.decode import DecodeStep
from pte.model.load import check_positions
from pte.model.segment import adapter_weights, first_state, fold, read_state, run_layers
from pte.rollout.record import Rollout, RolloutRequest, right_pad
from pte.rollout.sampling import draw_tokens, stream_uniforms, token_logprobs
from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from pte.model.policy import BoundedPolicy

StateControl = Literal["own", "zeroed", "shuffled"]
PREFILL_TOKENS = 16384
COMPACT_BELOW_FRACTION = 0.75


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been read once for all sequences that share it."""

    keys: Float[Tensor, "layers kv_heads tokens head_dim"]
    values: Float[Tensor, "layers kv_heads tokens head_dim"]
    logprobs: Float[Tensor, " vocab"]


@dataclass
class RunningSequence:
    """Host-side account of the sequence in one slot; its first token is drawn as it is admitted."""

    order: int
    request: RolloutRequest
    tokens: list[int]
    evicted: list[Tensor] = field(default_factory=list)

    @property
    def entering(self) -> int:
        """Reasoning index of the token that enters next."""
        return len(self.tokens) - 1


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
        self.start(min(self.slots, len(requests)), prompt_slots=longest)
        self.queue = deque(enumerate(requests))
        self.waiting = Counter(request.prompt_ids for request in requests)
        self.prefilled: dict[tuple[int, ...], Prefilled] = {}
        self.results: dict[int, Rollout] = {}
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
        for name in ("cache", "states", "reads", "first", "uniforms", "logprobs", "weights", "decode"):
            delattr(self, name)
        self.prefilled = {}

    def start(self, rows: int, *, prompt_slots: int) -> None:
        """Allocates the slots."""
        policy, device = self.policy, self.policy.device
        self.cache = BoundedCache.allocate(
            policy.cache_shape,
            batch=rows,
            prompt_slots=prompt_slots,
            window_slots=policy.schedule.kept_tokens(self.max_new_tokens),
            dtype=policy.dtype,
            device=device,
        )
        needs = policy.eviction.needs
        self.observes = needs.attention is not None and policy.schedule.num_evictions(self.max_new_tokens) > 0
        if self.observes and needs.attention is not None:
            self.cache.track_attention(needs.attention)
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache.kv_bytes)
        self.running: list[RunningSequence | None] = [None] * rows
        self.current = torch.zeros(rows, dtype=torch.int64, device=device)
        self.entered = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(rows, self.max_new_tokens, device=device)
        self.logprobs = torch.zeros(rows, self.max_new_tokens, dtype=torch.float32, device=device)
        if policy.dtype == torch.float64:
            self.logprobs = self.logprobs.double()
        self.stream_seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.weights = adapter_weights(policy)
        self.decode = DecodeStep(policy, self.weights, num_positions=prompt_slots + self.max_new_tokens)
        first = first_state(policy)
        self.first = first
        self.states = None if first is None else first[:, None].repeat(1, rows, 1, 1)
        self.reads = read_state(policy, self.states)
        self.peak_state_bytes = max(self.peak_state_bytes, 0 if self.states is None else self.states.nbytes)

    def refill(self) -> None:
        """Puts waiting requests into free slots until no slot or no request is left."""
        while self.queue and (free := [row for row, sequence in enumerate(self.running) if sequence is None]):
            admitted = [(row, *self.queue.popleft()) for row in free[: len(self.queue)]]
            self.prefill([request.prompt_ids for _, _, request in admitted])
            self.admit(admitted)

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Reads prompts that have not been read yet, a bounded number of tokens at a time."""
        unread = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prefilled]
        while unread:
            count = max(1, PREFILL_TOKENS // max(map(len, unread)))
            self.prefill_batch(unread[:count])
            unread = unread[count:]

    @timed("prefill")
    def prefill_batch(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Reads right-padded prompts in one forward under the first state."""
        policy, device = self.policy, self.policy.device
        tokens = right_pad(prompts).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        nothing = torch.zeros(len(prompts), 1, 0, dtype=torch.bool, device=device)
        mask = stretch_mask(nothing, positions < lengths[:, None], dtype=policy.dtype)
        attention = StretchAttention(None, None, mask=mask, segments=1)
        first = None if self.first is None else self.first[:, None].expand(-1, len(prompts), -1, -1)
        reads = self.controlled(read_state(policy, first))
        hidden = run_layers(
            policy, tokens, positions=positions, attention=attention, states=reads, weights=self.weights
        )
        last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
        logprobs = token_logprobs(policy.base.get_output_embeddings()(last), self.temperature)
        layers = range(len(attention.new_keys))
        keys = torch.stack([attention.new_keys[layer] for layer in layers])
        values = torch.stack([attention.new_values[layer] for layer in layers])
        for index, prompt in enumerate(prompts):
            end = len(prompt)
            self.prefilled[prompt] = Prefilled(
                keys=keys[:, index, :, :end], values=values[:, index, :, :end], logprobs=logprobs[index]
            )

    def admit(self, admitted: Sequence[tuple[int, int, RolloutRequest]]) -> None:
        """Starts sequences in free slots and draws their first tokens.

        Args:
            admitted: Slot, order and request of each.
        """
        device = self.policy.device
        rows = torch.tensor([row for row, _, _ in admitted], device=device)
        prompts = [self.prefilled[request.prompt_ids] for _, _, request in admitted]
        for row, (_, _, request), prompt in zip(rows.tolist(), admitted, prompts, strict=True):
            self.cache.place_prompt(
                torch.tensor([row], device=device),
                prompt.keys[:, None],
                prompt.values[:, None],
                lengths=torch.tensor([len(request.prompt_ids)], device=device),
            )
            self.uniforms[row] = stream_uniforms(request.stream_seed, self.max_new_tokens).to(device)
            self.stream_seeds[row] = request.stream_seed
            self.waiting[request.prompt_ids] -= 1
            if not self.waiting[request.prompt_ids]:
                del self.prefilled[request.prompt_ids]
        self.entered[rows] = 0
        if self.states is not None and self.first is not None and self.reads is not None:
            self.states[:, rows] = self.first[:, None]
            self.reads[:, rows] = self.read(self.first[:, None])
        logprobs = torch.stack([prompt.logprobs for prompt in prompts])
        drawn = draw_tokens(logprobs, self.uniforms[rows, 0], greedy=self.temperature == 0)
        self.current[rows] = drawn
        self.logprobs[rows, 0] = logprobs.gather(1, drawn[:, None])[:, 0]
        for (row, order, request), token in zip(admitted, drawn.tolist(), strict=True):
            self.running[row] = RunningSequence(order=order, request=request, tokens=[token])
            self.finish_if_done(row)

    @timed("decode")
    def step(self) -> None:
        """One token for every running sequence."""
        policy = self.policy
        live = [sequence is not None for sequence in self.running]
        self.evict_where_due()
        alive = None if all(live) else torch.tensor(live, device=self.current.device).long()
        positions = self.cache.prompt_lengths + self.entered
        slots = self.cache.take_slots(positions[:, None], live=alive)[:, 0]
        longest = max(sequence.entering for sequence in self.running if sequence is not None)
        observed = [
            sequence is not None and self.observes and policy.observes(sequence.entering) for sequence in self.running
        ]
        observer = AttentionObserver(below_average=policy.eviction.needs.below_average) if any(observed) else None
        attention = DecodeAttention(
            self.cache,
            slots,
            attended_slots=min(self.cache.prompt_slots + longest + 1, self.cache.positions.shape[1]),
            dtype=policy.dtype,
            observer=observer,
        )
        states = self.controlled(self.reads)
        hidden = self.decode(self.current, positions=positions, attention=attention, states=states)
        if observer is not None:
            received = observer.take()[:, self.cache.prompt_slots :]
            missing = self.cache.free_slots.shape[1] - received.shape[1]
            counts = torch.tensor(observed, device=received.device)
            received = torch.where(counts[:, None], received, 0)
            self.cache.add_attention(functional.pad(received, (0, missing)))
        logprobs = token_logprobs(policy.base.get_output_embeddings()(hidden), self.temperature)
        self.entered += 1 if alive is None else alive
        column = self.entered[:, None]
        drawn = draw_tokens(logprobs, self.uniforms.gather(1, column)[:, 0], greedy=self.temperature == 0)
        self.current = drawn
        self.logprobs.scatter_(1, column, logprobs.gather(1, drawn[:, None]))
        self.decode_steps += 1
        for row, token in enumerate(drawn.tolist()):
            sequence = self.running[row]
            if sequence is not None:
                sequence.tokens.append(token)
                self.finish_if_done(row)

    def evict_where_due(self) -> None:
        """Folds and evicts a block in every sequence whose next token needs the room."""
        schedule = self.policy.schedule
        due = [
            row
            for row, sequence in enumerate(self.running)
            if sequence is not None and schedule.evicts_at(sequence.entering)
        ]
        if not due:
            return
        assert schedule.evict_tokens is not None
        device = self.current.device
        rows = torch.tensor(due, device=device)
        indices = [
            schedule.evictions_before(sequence.entering) - 1
            for row in due
            if (sequence := self.running[row]) is not None
        ]
        eviction = self.policy.eviction
        kept = kept_tokens(
            self.cache,
            eviction.needs,
            rows=rows,
            eviction_index=torch.tensor(indices, device=device),
            stream_seeds=self.stream_seeds[rows],
        )
        evicted = self.cache.evict(rows, eviction.evicted_slots(kept, evict_tokens=schedule.evict_tokens))
        if self.policy.records_evictions:
            left = (evicted.positions - self.cache.prompt_lengths[rows, None]).cpu()
            for row, tokens in zip(due, left, strict=True):
                if (sequence := self.running[row]) is not None:
                    sequence.evicted.append(tokens)
        if self.states is not None and self.reads is not None and self.folds:
            updated = fold(self.policy, self.states[:, rows], evicted)
            self.states[:, rows] = updated
            self.reads[:, rows] = self.read(updated)

    def read(self, states: Float[Tensor, "layers rows rank rank"]) -> Float[Tensor, "layers rows rank rank"]:
        """What the adapters read of running states."""
        reads = read_state(self.policy, states)
        assert reads is not None
        return reads

    @property
    def folds(self) -> bool:
        """True when evictions change the state."""
        return self.policy.adapter is not None and self.policy.adapter.folds

    def controlled(
        self, reads: Float[Tensor, "layers rows rank rank"] | None
    ) -> Float[Tensor, "layers rows rank rank"] | None:
        """The states that the adapters read, under the control that is set."""
        if reads is None or self.state_control == "own":
            return reads
        return torch.zeros_like(reads) if self.state_control == "zeroed" else reads.roll(1, dims=1)

    def finish_if_done(self, row: int) -> None:
        """Ends the sequence in a slot after a stop token or at the longest completion, and frees the slot."""
        sequence = self.running[row]
        assert sequence is not None
        stopped = sequence.tokens[-1] in self.stop_token_ids
        count = len(sequence.tokens)
        if not stopped and count < self.max_new_tokens:
            return
        norm = 0.0 if self.states is None else self.states[:, row].float().norm(dim=(1, 2)).mean().item()
        rollout = Rollout(
            prompt_ids=sequence.request.prompt_ids,
            completion_ids=tuple(sequence.tokens),
            rollout_logprobs=self.logprobs[row, :count].clone().cpu(),
            finish_reason="stop" if stopped else "length",
            stream_seed=sequence.request.stream_seed,
            temperature=self.temperature,
            evictions=self.policy.schedule.num_evictions(count),
            state_norm=norm,
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
        if not kept or len(kept) > COMPACT_BELOW_FRACTION * len(self.running):
            return
        rows: Int[Tensor, " rows"] = torch.tensor(kept, device=self.current.device)
        self.cache = self.cache.compact(rows)
        self.running = [self.running[row] for row in kept]
        self.current, self.entered = self.current[rows], self.entered[rows]
        self.uniforms, self.logprobs = self.uniforms[rows], self.logprobs[rows]
        self.stream_seeds = self.stream_seeds[rows]
        if self.states is not None and self.reads is not None:
            self.states, self.reads = self.states[:, rows], self.reads[:, rows]
