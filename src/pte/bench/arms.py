"""Our side: the rollout of the bounded policy, and one whole training step.

Decides: the policy that is measured (thought adapters on all seven maps, A not zero) and what a step holds: rollout,
replay with its backward, loss, optimizer. Does not know the baseline.

Paper: Section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from pte.bench.workload import descend, grpo_loss, make_optimizer, prompts, random_base, randomize_ups
from pte.method.adapter import LowRankPair, ThoughtAdapter
from pte.method.schedule import EvictionSchedule
from pte.model.policy import BoundedPolicy, attach_adapter, layer_sizes
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest, collate_rollouts
from pte.rollout.replay import Replay
from pte.rollout.sampling import stream_seed

if TYPE_CHECKING:
    from pte.bench.presets import Preset

TrainMode = Literal["chain", "horizon"]


def thought_policy(preset: Preset) -> BoundedPolicy:
    """PTE on a random base, with an adapter that has been trained a little."""
    base = random_base(preset)
    adapter = ThoughtAdapter(layer_sizes(base), rank=preset.rank, global_tokens=preset.global_tokens)
    randomize_ups(pair.up for pair in adapter.modules() if isinstance(pair, LowRankPair))
    attach_adapter(base, adapter)
    return BoundedPolicy(base, adapter, EvictionSchedule(preset.window_tokens, preset.evict_tokens))


class OurRollout:
    """Completions of the bounded policy, with their log-probs."""

    def __init__(self, preset: Preset) -> None:
        self.policy = thought_policy(preset)
        self.prompts = prompts(preset)

    def run(self, tokens: int, seed: int) -> None:
        """Completes every prompt with `tokens` tokens."""
        self.sample(tokens, seed)

    def sample(self, tokens: int, seed: int) -> list[Rollout]:
        """Rollouts of exactly `tokens` tokens at temperature 1."""
        engine = RolloutEngine(
            self.policy, slots=len(self.prompts), max_new_tokens=tokens, temperature=1.0, stop_token_ids=()
        )
        rollouts = engine.run(
            [
                RolloutRequest(prompt_ids=prompt, stream_seed=stream_seed(seed, row))
                for row, prompt in enumerate(self.prompts)
            ]
        )
        assert all(len(rollout.completion_ids) == tokens for rollout in rollouts)
        return rollouts


class OurStep(OurRollout):
    """Training steps of the bounded policy.

    Args:
        preset: What is measured.
        mode: Gradient mode of the replay.
    """

    def __init__(self, preset: Preset, *, mode: TrainMode) -> None:
        super().__init__(preset)
        horizon = preset.horizon if mode == "horizon" else None
        self.replay = Replay(self.policy, gradient_mode=mode, horizon=horizon)
        assert self.policy.adapter is not None
        self.optimizer = make_optimizer(self.policy.adapter.parameters())

    def run(self, tokens: int, seed: int) -> None:
        """Samples, replays, descends."""
        rollouts = self.sample(tokens, seed)
        batch = collate_rollouts(rollouts)
        recorded = pad_sequence([rollout.rollout_logprobs for rollout in rollouts], batch_first=True)
        logprobs = self.replay(batch, recorded=recorded).policy_logprobs
        descend(grpo_loss(logprobs, recorded, completion_mask=batch.completion_mask), self.optimizer)


def evicted_bytes(preset: Preset, tokens: int) -> int:
    """Bytes of the keys and values that leave the cache over completions of `tokens` tokens, float32."""
    schedule = EvictionSchedule(preset.window_tokens, preset.evict_tokens)
    shape = preset.shape
    kv_dim = shape.hidden_size // shape.heads * shape.kv_heads
    token_bytes = 2 * shape.layers * kv_dim * torch.float32.itemsize
    return preset.batch * schedule.num_evictions(tokens) * preset.evict_tokens * token_bytes
