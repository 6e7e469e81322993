"""The same walk as the rollout, a stretch at a time: what enters, who is kept, what is evicted, what is scored.

Decides: how a padded batch becomes the inputs of each stretch's parallel forward, and the pure forward itself
(`run_stretch`), which takes caches and states as arguments. Does not know gradients: `replay` drives it.
Sequences come sorted by length, longest first, so that those still running are the first rows.

Paper: pi^D(y_t | C_t^D) for all t of a stretch at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from pte.method.attention import StretchAttention, stretch_mask
from pte.method.cache import BoundedCache, EvictedTokens
from pte.model.segment import adapter_weights, fold, read_state, run_layers
from pte.rollout.choices import EvictionChoices, note_attention
from pte.rollout.sampling import token_logprobs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from pte.method.observe import AttentionObserver
    from pte.method.schedule import Stretch
    from pte.model.policy import BoundedPolicy
    from pte.rollout.record import ReplayBatch

LOGITS_PER_CHUNK = 2**24


@dataclass(frozen=True)
class StretchInputs:
    """What one parallel forward of a stretch needs besides keys, values and states.

    Args:
        token_ids: One row per segment of each sequence, in the order sequence, segment.
        positions: Absolute, of the same tokens.
        mask: Over [cache slots | tokens of the stretch], 0 or -inf.
        segments: Segments per sequence.
        prompt_tokens: Leading tokens of each row that belong to the prompt; 0 after the first stretch.
        evicted_slots: Window slots of each eviction in the stretch, in order.
        observer: Sums the attention that the next eviction's choice needs, or None.
        scored: Flat indices (sequence x tokens) of the tokens whose outputs are scored.
        targets: The completion tokens that they predict.
        places: Flat indices (batch row x completion) of those tokens.
    """

    token_ids: Int[Tensor, "rows segment_tokens"]
    positions: Int[Tensor, "rows segment_tokens"]
    mask: Float[Tensor, "sequences 1 tokens keys"]
    segments: int
    prompt_tokens: int
    evicted_slots: list[Int[Tensor, "sequences evicted"]]
    observer: AttentionObserver | None
    scored: Int[Tensor, " scored"]
    targets: Int[Tensor, " scored"]
    places: Int[Tensor, " scored"]


class Walk:
    """The cache and the bookkeeping of a batch on its way through the stretches.

    Args:
        policy: The bounded policy.
        batch: Sorted by completion length, longest first.
    """

    def __init__(self, policy: BoundedPolicy, batch: ReplayBatch) -> None:
        self.policy = policy
        self.batch = batch
        self.lengths: list[int] = batch.completion_lengths.tolist()
        self.stretches = batch_stretches(policy, batch)
        self.cache = BoundedCache.allocate(
            policy.cache_shape,
            batch=len(self.lengths),
            prompt_slots=batch.prompt_ids.shape[1],
            window_slots=policy.schedule.kept_tokens(self.lengths[0]) if len(self.stretches) > 1 else 0,
            dtype=policy.dtype,
            device=batch.prompt_ids.device,
        )
        self.cache.prompt_lengths = batch.prompt_lengths
        self.choices = EvictionChoices(policy, batch)
        if self.choices.observed_queries is not None and len(self.stretches) > 1:
            self.cache.track_attention(self.choices.observed_queries)

    def active(self, stretch: Stretch) -> int:
        """Sequences that still have tokens in a stretch; they are the first rows."""
        if stretch.start == 0:
            return len(self.lengths)
        return sum(length - 1 > stretch.start for length in self.lengths)

    def enter(self, stretch: Stretch) -> StretchInputs:
        """Inputs of a stretch, given the cache at its start; keeps the rows that are still active."""
        active = self.active(stretch)
        if active < self.cache.batch:
            self.cache = self.cache.first(active)
        return self.first_inputs(stretch) if stretch.start == 0 else self.later_inputs(stretch, active)

    def first_inputs(self, stretch: Stretch) -> StretchInputs:
        """Prompt and the first reasoning tokens, one segment under the first state."""
        batch = self.batch
        device = batch.prompt_ids.device
        rows, prompt = batch.prompt_ids.shape
        reasoning = torch.arange(stretch.stop, device=device)
        prompt_index = torch.arange(prompt, device=device).expand(rows, -1)
        real = torch.cat(
            (
                prompt_index < batch.prompt_lengths[:, None],
                torch.ones(rows, stretch.stop, dtype=torch.bool, device=device),
            ),
            dim=1,
        )
        nothing = torch.zeros(rows, 1, 0, dtype=torch.bool, device=device)
        width = prompt + stretch.stop
        scored: list[int] = []
        places: list[int] = []
        prompt_lengths = batch.prompt_lengths.tolist()
        for row, length in enumerate(self.lengths):
            last = min(length - 1, stretch.stop)
            scored.append(row * width + prompt_lengths[row] - 1)
            scored.extend(row * width + prompt + token for token in range(last))
            places.extend(row * batch.completion_ids.shape[1] + token for token in range(last + 1))
        return self.inputs(
            torch.cat((batch.prompt_ids, batch.completion_ids[:, : stretch.stop]), dim=1),
            torch.cat((prompt_index, batch.prompt_lengths[:, None] + reasoning), dim=1),
            mask=stretch_mask(nothing, real, dtype=self.policy.dtype),
            segments=1,
            stretch=stretch,
            evicted_slots=[],
            scored=scored,
            places=places,
        )

    def later_inputs(self, stretch: Stretch, active: int) -> StretchInputs:
        """Reasoning tokens of several segments; before each of them a block leaves."""
        batch, schedule = self.batch, self.policy.schedule
        assert schedule.evict_tokens is not None
        device = batch.prompt_ids.device
        segments, block = stretch.num_segments, schedule.evict_tokens
        width = segments * block
        reasoning = torch.arange(stretch.start, stretch.start + width, device=device)
        inside = reasoning.clamp(max=batch.completion_ids.shape[1] - 1)
        evicted_slots, kept = self.choices.plan(self.cache, stretch)
        scored: list[int] = []
        places: list[int] = []
        for row, length in enumerate(self.lengths[:active]):
            last = min(length - 1, stretch.stop)
            scored.extend(row * width + token - stretch.start for token in range(stretch.start, last))
            places.extend(row * batch.completion_ids.shape[1] + token + 1 for token in range(stretch.start, last))
        return self.inputs(
            batch.completion_ids[:active, inside].reshape(active * segments, block),
            (batch.prompt_lengths[:active, None] + reasoning).reshape(active * segments, block),
            mask=stretch_mask(
                kept, torch.ones(active, width, dtype=torch.bool, device=device), dtype=self.policy.dtype
            ),
            segments=segments,
            stretch=stretch,
            evicted_slots=evicted_slots,
            scored=scored,
            places=places,
        )

    def inputs(
        self,
        token_ids: Int[Tensor, "rows segment_tokens"],
        positions: Int[Tensor, "rows segment_tokens"],
        *,
        mask: Float[Tensor, "sequences 1 tokens keys"],
        segments: int,
        stretch: Stretch,
        evicted_slots: list[Int[Tensor, "sequences evicted"]],
        scored: list[int],
        places: list[int],
    ) -> StretchInputs:
        """Stretch inputs with the scored tokens' targets looked up."""
        device = token_ids.device
        where = torch.tensor(places, device=device, dtype=torch.int64)
        prompt_tokens = self.batch.prompt_ids.shape[1] if stretch.start == 0 else 0
        return StretchInputs(
            token_ids=token_ids,
            positions=positions,
            mask=mask,
            segments=segments,
            prompt_tokens=prompt_tokens,
            evicted_slots=evicted_slots,
            observer=None if stretch == self.stretches[-1] else self.choices.observer(prompt_tokens),
            scored=torch.tensor(scored, device=device, dtype=torch.int64),
            targets=self.batch.completion_ids.reshape(-1)[where],
            places=where,
        )

    def evict(self, inputs: StretchInputs) -> list[EvictedTokens]:
        """Takes the blocks of a stretch out of the cache."""
        if not inputs.evicted_slots:
            return []
        rows = torch.arange(self.cache.batch, device=inputs.positions.device)
        evicted = self.cache.evict(rows, torch.cat(inputs.evicted_slots, dim=1))
        block = inputs.evicted_slots[0].shape[1]
        return [
            EvictedTokens(keys=keys, values=values, positions=positions)
            for keys, values, positions in zip(
                evicted.keys.split(block, dim=2),
                evicted.values.split(block, dim=2),
                evicted.positions.split(block, dim=1),
                strict=True,
            )
        ]

    def store(self, stretch: Stretch, inputs: StretchInputs, *, keys: Tensor, values: Tensor, graph: bool) -> None:
        """Writes what a stretch added into the cache; the last stretch's need not be.

        Args:
            stretch: The stretch.
            inputs: Its inputs.
            keys: Post-rotary keys of its tokens, (layers, sequences, kv_heads, tokens, head_dim).
            values: Values, likewise.
            graph: Write out of place, so that gradients flow through what is stored (gradient mode `exact`).
        """
        if stretch == self.stretches[-1]:
            return
        cache, prompt = self.cache, inputs.prompt_tokens
        sequences = cache.batch
        if prompt:
            index = torch.arange(prompt, device=keys.device)
            cache.positions[:, :prompt] = torch.where(index < self.batch.prompt_lengths[:, None], index, -1)
        reasoning = self.batch.prompt_lengths[:sequences, None] + torch.arange(
            stretch.start, stretch.stop, device=keys.device
        )
        slots = cache.take_slots(reasoning)
        if inputs.observer is not None:
            note_attention(cache, inputs.observer.take(), slots=slots, first=bool(prompt))
        if prompt:
            index = torch.arange(prompt, device=keys.device).expand(sequences, -1)
            slots = torch.cat((index, slots), dim=1)
        where = slots[None, :, None, :, None].expand_as(keys)
        if graph:
            cache.keys, cache.values = (
                cache.keys.scatter(3, where, keys),
                cache.values.scatter(3, where, values),
            )
        else:
            cache.keys.scatter_(3, where, keys)
            cache.values.scatter_(3, where, values)


def batch_stretches(policy: BoundedPolicy, batch: ReplayBatch) -> tuple[Stretch, ...]:
    """Stretches of a batch's longest completion, whose last token never enters."""
    entered = int(batch.completion_lengths.max()) - 1
    return tuple(policy.schedule.stretches(entered, segments_per_stretch=policy.segments_per_stretch))


def run_stretch(
    policy: BoundedPolicy,
    inputs: StretchInputs,
    *,
    cache_keys: Float[Tensor, "layers sequences kv_heads slots head_dim"],
    cache_values: Float[Tensor, "layers sequences kv_heads slots head_dim"],
    states: Float[Tensor, "layers sequences segments rank rank"] | None,
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
    """
    first = inputs.prompt_tokens > 0
    attention = StretchAttention(
        None if first else cache_keys,
        None if first else cache_values,
        mask=inputs.mask,
        segments=inputs.segments,
        observer=inputs.observer,
    )
    reads = read_state(policy, None if states is None else states.flatten(1, 2))
    hidden = run_layers(
        policy,
        inputs.token_ids,
        positions=inputs.positions,
        attention=attention,
        states=reads,
        weights=adapter_weights(policy),
    )
    layers = range(policy.cache_shape.layers)
    return (
        hidden.reshape(inputs.mask.shape[0], -1, hidden.shape[-1]),
        torch.stack([attention.new_keys[layer] for layer in layers]),
        torch.stack([attention.new_values[layer] for layer in layers]),
    )


def segment_states(
    policy: BoundedPolicy, state: Float[Tensor, "layers sequences rank rank"], evicted: list[EvictedTokens]
) -> list[Float[Tensor, "layers sequences rank rank"]]:
    """Running state of each segment of a stretch; the last one is the state after the stretch."""
    if not evicted:
        return [state]
    states = []
    for block in evicted:
        if policy.adapter is not None and policy.adapter.folds:
            state = fold(policy, state, block)
        states.append(state)
    return states


def score(
    policy: BoundedPolicy,
    hidden: Float[Tensor, "scored hidden"],
    *,
    targets: Int[Tensor, " scored"],
    temperature: float,
    with_entropy: bool,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"]]:
    """Log-probs of target tokens and entropies, a chunk of tokens at a time: no (batch, tokens, vocab) tensor.

    Equals: token_logprobs(lm_head(hidden)) gathered at the targets. With gradients, a chunk's logits are computed
    again in the backward pass when there is more than one chunk.

    Args:
        policy: Whose language-model head is used.
        hidden: Final hidden states.
        targets: Token ids.
        temperature: Of the distribution.
        with_entropy: Compute entropies (nats, without gradient); zeros otherwise.
    """
    head = policy.base.get_output_embeddings()

    def score_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = token_logprobs(head(hidden), temperature)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        if not with_entropy:
            return chosen, torch.zeros_like(chosen)
        return chosen, -(logprobs.exp() * logprobs).sum(-1).detach()

    size = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    pieces = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        scores = [score_chunk(*piece) for piece in pieces]
    else:
        scores = [checkpoint(score_chunk, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat([chosen for chosen, _ in scores]), torch.cat([entropy for _, entropy in scores])
