"""Rollouts of tiny policies, kept with their requests, and the replay of the same completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pte.method.eviction.h2o import HeavyHitters
from pte.method.eviction.keydiff import DistinctKeys
from pte.method.eviction.random import UniformRandom
from pte.method.eviction.rkv import RedundantKeys
from pte.method.eviction.scissorhands import PersistentImportance
from pte.method.eviction.sinks import AttentionSinks
from pte.method.eviction.snapkv import ObservationWindow
from pte.method.eviction.tova import LastQueryAttention
from pte.method.schedule import Stretch
from pte.model.policy import BoundedPolicy
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import ReplayBatch, Rollout, RolloutRequest, collate_rollouts
from pte.rollout.replay import Replay
from pte.rollout.scores import ReplayOutput
from pte.rollout.stretch import run_stretch
from pte.rollout.walk import Walk

# What a policy can be; each is a set of options for `tiny_policy`.
SETTINGS: dict[str, dict[str, object]] = {
    "thought": {},
    "paper rule": {"update_rule": "paper"},
    "read rule": {"update_rule": "read"},
    "one adapted layer": {"layers": (1,)},
    "post-rotary keys": {"key_space": "post_rotary"},
    "no global tokens": {"global_tokens": 0},
    "lora": {"kind": "lora"},
    "global_only": {"kind": "global_only"},
    "no adapter": {"kind": None},
    "some targets, scaled": {"targets": ("o_proj", "v_proj", "up_proj"), "scale": 1.6},
    "random eviction": {"eviction": UniformRandom()},
    "sinks": {"eviction": AttentionSinks(3)},
    "sinks, two blocks a stretch": {"window": 6, "block": 2, "eviction": AttentionSinks(1)},
    "sinks that leave one block": {"eviction": AttentionSinks(4), "update_rule": "paper"},
    "h2o": {"eviction": HeavyHitters(4), "block": 2},
    "h2o, nothing protected, paper rule": {"eviction": HeavyHitters(0), "block": 2, "update_rule": "paper"},
    "h2o, lora": {"eviction": HeavyHitters(2), "kind": "lora"},
    "rkv": {"eviction": RedundantKeys(2)},
    "rkv, no adapter": {"eviction": RedundantKeys(2), "block": 2, "kind": None},
    "scissorhands": {"eviction": PersistentImportance(1), "block": 2},
    "tova": {"eviction": LastQueryAttention(), "block": 2},
    "snapkv": {"eviction": ObservationWindow(2), "window": 12, "block": 2},
    "snapkv that observes a block": {"eviction": ObservationWindow(3), "window": 9, "block": 3, "update_rule": "paper"},
    "keydiff": {"eviction": DistinctKeys(0), "block": 2},
    "block as large as the window": {"window": 8, "block": 8},
    "blocks of one token": {"window": 4, "block": 1},
    "window of one token": {"window": 1, "block": 1},
    "full cache": {"window": None},
}
# Those whose choice depends on what the model computed, so that rollouts record it.
SCORED = [name for name, options in SETTINGS.items() if "eviction" in options and options["eviction"].needs.anything]


def requests_for(prompts: Sequence[tuple[int, ...]], *, first_seed: int = 100) -> list[RolloutRequest]:
    return [RolloutRequest(prompt, first_seed + index) for index, prompt in enumerate(prompts)]


def sample(
    policy: BoundedPolicy,
    requests: Sequence[RolloutRequest],
    *,
    slots: int = 3,
    max_new_tokens: int = 30,
    temperature: float = 0.7,
    stop: Sequence[int] = (),
    **options: object,
) -> list[Rollout]:
    engine = RolloutEngine(
        policy,
        slots=slots,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token_ids=stop,
        **options,
    )
    return engine.run(requests)


def replay_of(policy: BoundedPolicy, rollouts: Sequence[Rollout]) -> tuple[ReplayBatch, ReplayOutput]:
    batch = collate_rollouts(rollouts)
    return batch, Replay(policy)(batch)


def recorded(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Log-probs of the rollouts, padded with 0."""
    return torch.nn.utils.rnn.pad_sequence([rollout.rollout_logprobs for rollout in rollouts], batch_first=True)


def gap(policy: BoundedPolicy, rollouts: Sequence[Rollout]) -> float:
    """Largest difference between recorded and replayed log-probs of a token."""
    _, output = replay_of(policy, rollouts)
    return (output.policy_logprobs - recorded(rollouts)).abs().max().item()


@torch.no_grad()
def replayed_windows(policy: BoundedPolicy, batch: ReplayBatch) -> list[tuple[Stretch, list[list[int]]]]:
    """Reasoning tokens that the window of each sequence holds before each stretch but the first, on a replay's walk."""
    walk = Walk(policy, batch)
    windows = []
    for stretch in walk.stretches:
        held = walk.cache.token_indices()[: walk.active(stretch)].tolist()
        windows.append((stretch, held))
        start = walk.enter(stretch)
        caches = {"cache_keys": walk.cache.keys, "cache_values": walk.cache.values}
        _, keys, values = run_stretch(policy, start.inputs, states=start.states, **caches)
        walk.store(start, keys=keys, values=values)
    return windows[1:]
