"""What is said of a rollout's evictions and states is what a token-by-token computation finds."""

from __future__ import annotations

import pytest
import torch

from pte.method.eviction.random import UniformRandom
from pte.rollout.inspect import inspect_rollouts
from reference import Reference
from sampled import SETTINGS, requests_for, sample
from tiny import random_sequences, tiny_policy

pytestmark = pytest.mark.system

PROMPTS, _ = random_sequences(3, seed=4)


class NotingReference(Reference):
    """The reference, with a note of every eviction: who left, the states' norms and changes per layer."""

    def evict(self, window, chain, blocks, evictions):
        before, states = set(window[0]), [layer[-1] for layer in chain]
        super().evict(window, chain, blocks, evictions)
        if evictions == 0:
            self.notes, self.first = [], None if states[0] is None else [state.norm().item() for state in states]
        norm = change = None
        if states[0] is not None:
            norm = [layer[-1].norm().item() for layer in chain]
            change = [(layer[-1] - state).norm().item() for layer, state in zip(chain, states, strict=True)]
        self.notes.append((max(before) + 1, sorted(before - set(window[0])), norm, change))


@pytest.mark.parametrize("setting", SETTINGS)
def test_evictions_and_states_are_those_of_the_token_by_token_walk(setting: str) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    # Lengths differ, so that sequences end in different stretches; the longest one is not the first.
    rollouts = [
        sample(policy, [request], max_new_tokens=length)[0]
        for request, length in zip(requests_for(PROMPTS), (18, 30, 5), strict=True)
    ]
    for rollout, inspected in zip(rollouts, inspect_rollouts(policy, rollouts), strict=True):
        reference = NotingReference(policy, stream_seed=rollout.stream_seed)
        reference.notes = []
        with torch.no_grad():
            reference.logprobs(rollout.prompt_ids, rollout.completion_ids)
        assert len(inspected.evictions) == rollout.evictions == len(reference.notes)
        for eviction, (before_token, left, norm, change) in zip(inspected.evictions, reference.notes, strict=True):
            assert (eviction.before_token, list(eviction.evicted_tokens)) == (before_token, left)
            for found, expected in ((eviction.state_norm, norm), (eviction.state_change, change)):
                assert (found is None) == (expected is None)
                if found is not None:
                    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
        if reference.notes and reference.first is not None:
            assert inspected.first_state_norm == pytest.approx(reference.first, rel=1e-5)


def test_the_bytes_of_a_state_are_layers_times_rank_squared() -> None:
    policy = tiny_policy()
    (inspected,) = inspect_rollouts(policy, sample(policy, requests_for(PROMPTS[:1])))
    # 2 layers, rank 4, eight bytes a number in these float64 models.
    assert inspected.state_bytes == 2 * 4 * 4 * 8
    policy = tiny_policy(kind="lora", eviction=UniformRandom())
    (inspected,) = inspect_rollouts(policy, sample(policy, requests_for(PROMPTS[:1])))
    assert inspected.state_bytes is None and inspected.first_state_norm is None


def test_nothing_to_inspect_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 rollout, got none; run the engine first"):
        inspect_rollouts(tiny_policy(), [])
