"""A stretch's forward: what a backward pass computes again leaves no trace."""

from __future__ import annotations

import torch

from pte.method.eviction.h2o import HeavyHitters
from pte.rollout.record import collate
from pte.rollout.stretch import run_stretch
from pte.rollout.walk import Walk
from tiny import random_sequences, tiny_policy


def test_layers_that_a_backward_pass_computes_again_are_observed_once() -> None:
    policy = tiny_policy(eviction=HeavyHitters(4), block=2)
    prompts, completions = random_sequences(3)
    completions.sort(key=len, reverse=True)
    walk = Walk(policy, collate(prompts, completions, stream_seeds=[0, 1, 2], temperature=1.0))
    start = walk.enter(walk.stretches[0])
    assert start.inputs.observer is not None and start.states is not None
    hidden, _, _ = run_stretch(
        policy,
        start.inputs,
        cache_keys=walk.cache.keys,
        cache_values=walk.cache.values,
        states=start.states,
        recompute_layers=True,
    )
    assert start.inputs.observer.received is not None
    seen = start.inputs.observer.received.clone()
    hidden.sum().backward()
    assert torch.equal(start.inputs.observer.take(), seen)
