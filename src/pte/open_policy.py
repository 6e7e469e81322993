"""From a configuration to a policy: the base, whole or in shards, a fresh adapter, and what leaves its cache.

Decides: how the model, adapter and cache sections of an experiment become objects. Does not know: tasks, saved adapters
(`session`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pte.method.adapter import ThoughtAdapter
from pte.method.eviction.registry import make_policy
from pte.model.load import dtype_named, load_base
from pte.model.policy import BoundedPolicy, attach_adapter, layer_sizes, query_maps
from pte.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pte.config import AdapterConfig, CacheConfig, ExperimentConfig
    from pte.method.eviction.policy import EvictionPolicy


def load_policy(path: str, config: ExperimentConfig, device: torch.device) -> BoundedPolicy:
    """The policy of a configuration, its adapter fresh.

    Args:
        path: Of the base.
        config: Model, adapter, cache.
        device: Of the base.
    """
    base = load_base(
        path,
        dtype=dtype_named(config.model.dtype),
        device=device,
        trust_remote_code=config.model.trust_remote_code,
    )
    adapter = None
    if config.adapter.kind != "none":
        adapter = new_adapter(config.adapter, base, seed=config.run.seed)
        attach_adapter(base, adapter)
    return BoundedPolicy(base, adapter, config.cache.schedule, eviction_policy(config.cache))


def sharded_policy(path: str, config: ExperimentConfig, ranks: Ranks, *, device: torch.device) -> BoundedPolicy:
    """The same with the base's layers in shards on the ranks' devices.

    The ranks of a machine load in turns: its memory holds one whole base at a time.
    """
    from pte.model.sharding import ShardedLayers, place_sharded

    sharded, policy = ShardedLayers(ranks, device=device), None
    for _ in ranks.turns():
        policy = load_policy(path, config, torch.device("cpu"))
        place_sharded(policy.base, sharded, device=device)
        if policy.adapter is not None:
            policy.adapter.to(device)
    assert policy is not None, "every rank has its turn"
    sharded.begin()
    return replace(policy, sharded=sharded)


def new_adapter(options: AdapterConfig, base: PreTrainedModel, *, seed: int) -> ThoughtAdapter:
    """A fresh adapter for a base, of a kind that has one.

    Args:
        options: What it is; `checkpoint` is not looked at.
        base: The base it is made for.
        seed: Of the initial values.
    """
    assert options.kind != "none"
    adapter = ThoughtAdapter(
        layer_sizes(base),
        kind=options.kind,
        rank=options.rank,
        targets=options.targets,
        layers=options.layers or None,
        scale=options.scale,
        update_rule=options.update_rule,
        key_space=options.key_space,
        global_tokens=options.global_tokens,
        seed=seed,
    )
    if options.down_start == "queries" and adapter.encoder is not None:
        adapter.start_from_queries(query_maps(base))
    return adapter


def eviction_policy(cache: CacheConfig) -> EvictionPolicy:
    """The eviction policy of a configuration; the full cache never asks it."""
    return make_policy(cache.registered, option=cache.policy_option)
