"""The same walk as the rollout, a stretch at a time: what enters, who is kept, what is evicted, which state is read.

Decides: how a padded batch becomes the inputs of each stretch's parallel forward, and what happens between stretches:
rows that have ended leave, blocks are evicted and folded, new keys and values take their slots. Does not know
gradients: `replay` drives it, and what is folded or stored under a graph carries that graph on.
Sequences come sorted by length, longest first, so that those still running are the first rows.

Paper: pi^D(y|p) = prod_t pi(y_t | C_t^D), walked from the first token to the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pte.method.attention import stretch_mask
from pte.method.cache import BoundedCache, EvictedTokens
from pte.model.policy import check_no_autocast
from pte.model.segment import first_state, fold_blocks
from pte.rollout.choices import EvictionChoices, note_attention
from pte.rollout.stretch import StretchInputs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from pte.method.schedule import Stretch
    from pte.model.policy import BoundedPolicy
    from pte.rollout.record import ReplayBatch


@dataclass(frozen=True)
class StretchStart:
    """A stretch whose evictions are done and whose tokens have not entered yet.

    Args:
        stretch: Which one.
        inputs: Of its forward.
        evicted: What left the cache, one eviction behind the other; None in the first stretch.
        before: Running state before these evictions, of the sequences that are still active; None without a state.
        states: Running state of each segment; None without a state.
    """

    stretch: Stretch
    inputs: StretchInputs
    evicted: EvictedTokens | None
    before: Float[Tensor, "layers sequences rank rank"] | None
    states: Float[Tensor, "layers sequences segments rank rank"] | None


class Walk:
    """The cache, the state and the bookkeeping of a batch on its way through the stretches.

    Args:
        policy: The bounded policy.
        batch: Sorted by completion length, longest first.

    Raises:
        ValueError: Autocast is on.
    """

    def __init__(self, policy: BoundedPolicy, batch: ReplayBatch) -> None:
        check_no_autocast(policy)
        self.policy = policy
        self.batch = batch
        self.lengths: list[int] = batch.completion_lengths.tolist()
        self.prompt_lengths: list[int] = batch.prompt_lengths.tolist()
        # The last token of a completion never enters.
        self.stretches = tuple(
            policy.schedule.stretches(self.lengths[0] - 1, segments_per_stretch=policy.segments_per_stretch)
        )
        self.cache = BoundedCache.allocate(
            policy.cache_shape,
            batch=len(self.lengths),
            prompt_slots=batch.prompt_ids.shape[1] if len(self.stretches) > 1 else 0,
            window_slots=policy.schedule.kept_tokens(self.lengths[0]) if len(self.stretches) > 1 else 0,
            dtype=policy.dtype,
            device=batch.prompt_ids.device,
        )
        self.cache.prompt_lengths = batch.prompt_lengths
        self.state = expanded_first_state(policy, len(self.lengths))
        self.choices = EvictionChoices(policy, batch)
        if self.choices.observed_queries is not None and len(self.stretches) > 1:
            self.cache.track_attention(self.choices.observed_queries)

    def active(self, stretch: Stretch) -> int:
        """Sequences that still have tokens in a stretch; they are the first rows."""
        if stretch.start == 0:
            return len(self.lengths)
        return sum(length - 1 > stretch.start for length in self.lengths)

    def enter(self, stretch: Stretch) -> StretchStart:
        """Goes on to the next stretch: keeps the rows that are still active, evicts and folds."""
        active = self.active(stretch)
        if active < self.cache.batch:
            self.cache = self.cache.first(active)
            self.state = None if self.state is None else self.state[:, :active]
        inputs = self.first_inputs(stretch) if stretch.start == 0 else self.later_inputs(stretch, active)
        before = self.state
        evicted = self.evict(inputs)
        adapter, states = self.policy.adapter, None
        if before is not None:
            if evicted is not None and adapter is not None and adapter.folds:
                states = fold_blocks(self.policy, before, evicted, block=inputs.evicted_slots[0].shape[1])
                self.state = states[:, :, -1]
            else:
                states = before[:, :, None].expand(-1, -1, inputs.segments, -1, -1)
        return StretchStart(stretch=stretch, inputs=inputs, evicted=evicted, before=before, states=states)

    def first_inputs(self, stretch: Stretch) -> StretchInputs:
        """Prompts, their first reasoning tokens directly behind them: one segment under the first state."""
        batch = self.batch
        entered = [min(length - 1, stretch.stop) for length in self.lengths]
        width = max(prompt + tokens for prompt, tokens in zip(self.prompt_lengths, entered, strict=True))
        index = torch.arange(width, device=batch.prompt_ids.device).expand(len(entered), -1)
        prompt_lengths = batch.prompt_lengths[:, None]
        from_prompt = batch.prompt_ids.gather(1, index.clamp(max=batch.prompt_ids.shape[1] - 1))
        completed = (index - prompt_lengths).clamp(0, batch.completion_ids.shape[1] - 1)
        token_ids = torch.where(index < prompt_lengths, from_prompt, batch.completion_ids.gather(1, completed))
        reasoning = prompt_lengths + torch.arange(stretch.stop, device=index.device)
        return self.inputs(
            stretch,
            token_ids,
            positions=index,
            mask=None,
            evicted_slots=[],
            reasoning=reasoning.clamp(max=width - 1),
            scored=self.scored_tokens(
                [length - 1 for length in self.prompt_lengths],
                first_target=0,
                counts=[tokens + 1 for tokens in entered],
                width=width,
            ),
        )

    def later_inputs(self, stretch: Stretch, active: int) -> StretchInputs:
        """Reasoning tokens of several segments; before each of them a block leaves."""
        batch, block = self.batch, self.policy.schedule.evict_tokens
        assert block is not None
        device = batch.prompt_ids.device
        segments = stretch.num_segments
        width = segments * block
        reasoning = torch.arange(stretch.start, stretch.start + width, device=device)
        inside = reasoning.clamp(max=batch.completion_ids.shape[1] - 1)
        evicted_slots, kept = self.choices.plan(self.cache, stretch)
        everyone = torch.ones(active, width, dtype=torch.bool, device=device)
        return self.inputs(
            stretch,
            batch.completion_ids[:active, inside].reshape(active * segments, block),
            positions=(batch.prompt_lengths[:active, None] + reasoning).reshape(active * segments, block),
            mask=stretch_mask(kept, everyone, dtype=self.policy.dtype),
            evicted_slots=evicted_slots,
            reasoning=torch.arange(stretch.stop - stretch.start, device=device).expand(active, -1),
            scored=self.scored_tokens(
                [0] * active,
                first_target=stretch.start + 1,
                counts=[min(length - 1, stretch.stop) - stretch.start for length in self.lengths[:active]],
                width=width,
            ),
        )

    def scored_tokens(
        self, first_tokens: list[int], *, first_target: int, counts: list[int], width: int
    ) -> tuple[Int[Tensor, " scored"], Int[Tensor, " scored"]]:
        """Flat indices of the tokens that are scored, and of the completion tokens that they predict.

        Args:
            first_tokens: Of each sequence, the first token of its row that is scored.
            first_target: Completion token that it predicts.
            counts: Of each sequence, how many tokens in a row are scored.
            width: Tokens of a row.
        """
        steps = torch.arange(max(counts))
        inside = steps < torch.tensor(counts)[:, None]
        rows = torch.arange(len(counts))[:, None]
        tokens = rows * width + torch.tensor(first_tokens)[:, None] + steps
        places = rows * self.batch.completion_ids.shape[1] + first_target + steps
        device = self.batch.prompt_ids.device
        return tokens[inside].to(device), places[inside].to(device)

    def inputs(
        self,
        stretch: Stretch,
        token_ids: Int[Tensor, "rows segment_tokens"],
        *,
        positions: Int[Tensor, "rows segment_tokens"],
        mask: Float[Tensor, "sequences 1 tokens keys"] | None,
        evicted_slots: list[Int[Tensor, "sequences evicted"]],
        reasoning: Int[Tensor, "sequences kept"],
        scored: tuple[Int[Tensor, " scored"], Int[Tensor, " scored"]],
    ) -> StretchInputs:
        """Stretch inputs with the scored tokens' targets looked up."""
        tokens, places = scored
        return StretchInputs(
            token_ids=token_ids,
            positions=positions,
            mask=mask,
            segments=stretch.num_segments,
            evicted_slots=evicted_slots,
            reasoning=reasoning,
            observer=None if stretch == self.stretches[-1] else self.choices.observer(reasoning),
            scored=tokens,
            targets=self.batch.completion_ids.reshape(-1)[places],
            places=places,
        )

    def evict(self, inputs: StretchInputs) -> EvictedTokens | None:
        """Takes the blocks of a stretch out of the cache."""
        if not inputs.evicted_slots:
            return None
        rows = torch.arange(self.cache.batch, device=inputs.positions.device)
        return self.cache.evict(rows, torch.cat(inputs.evicted_slots, dim=1))

    def store(
        self,
        start: StretchStart,
        *,
        keys: Float[Tensor, "layers sequences kv_heads tokens head_dim"],
        values: Float[Tensor, "layers sequences kv_heads tokens head_dim"],
    ) -> None:
        """Writes what a stretch added into the cache; the last stretch's need not be.

        Where a graph is recorded they are written out of place: gradients flow through what is stored, and what a
        backward pass computes again finds the cache as it was.

        Args:
            start: Of the stretch.
            keys: Post-rotary keys of its tokens.
            values: Likewise.
        """
        stretch, inputs, cache = start.stretch, start.inputs, self.cache
        if stretch == self.stretches[-1]:
            return
        prompt_lengths, first = cache.prompt_lengths[:, None], inputs.mask is None
        slots = cache.take_slots(prompt_lengths + torch.arange(stretch.start, stretch.stop, device=keys.device))
        if inputs.observer is not None:
            behind = 0 if inputs.mask is None else inputs.mask.shape[3] - keys.shape[3]
            columns = behind + inputs.reasoning
            note_attention(cache, inputs.observer.take(), slots=slots, columns=columns, first=first)
        if first:
            prompt = torch.arange(cache.prompt_slots, device=keys.device).expand(cache.batch, -1)
            cache.positions[:, : cache.prompt_slots] = torch.where(prompt < prompt_lengths, prompt, -1)
            slots = torch.cat((prompt, slots), dim=1)
            tokens = torch.cat((prompt.clamp(max=keys.shape[3] - 1), inputs.reasoning), dim=1)
            keys, values = (x.gather(3, over_heads(tokens, x)) for x in (keys, values))
        where = over_heads(slots, keys)
        if torch.is_grad_enabled():
            cache.keys, cache.values = cache.keys.scatter(3, where, keys), cache.values.scatter(3, where, values)
        else:
            cache.keys.scatter_(3, where, keys)
            cache.values.scatter_(3, where, values)


def over_heads(
    index: Int[Tensor, "sequences tokens"], like: Float[Tensor, "layers sequences kv_heads any head_dim"]
) -> Int[Tensor, "layers sequences kv_heads tokens head_dim"]:
    """The same tokens in every layer, head and number."""
    layers, _, kv_heads, _, head_dim = like.shape
    return index[None, :, None, :, None].expand(layers, -1, kv_heads, -1, head_dim)


def expanded_first_state(policy: BoundedPolicy, batch: int) -> Float[Tensor, "layers batch rank rank"] | None:
    """The first state for every sequence."""
    first = first_state(policy)
    return None if first is None else first[:, None].expand(-1, batch, -1, -1)
