"""Law 1: the log-probs recorded while sampling are those of the replay."""

import pytest
import torch

from pte.model.policy import BoundedPolicy
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import collate_rollouts, logprob_gap
from pte.rollout.replay import Replay
from sampled import SETTINGS, gap, recorded, replay_of, requests_for, sample
from tiny import ARCHITECTURES, VOCAB, random_sequences, tiny_base, tiny_policy

MAX_GAP = 1e-5
PROMPTS = [(5,), *random_sequences(10, prompt=(2, 9))[0]]


def float32_policy(architecture: str) -> BoundedPolicy:
    """Weights small enough that float32 itself, whose error grows with the logits, rounds by about 2e-6."""
    base = tiny_base(architecture, dtype=torch.float32, initializer_range=0.2)
    return tiny_policy(base=base, dtype=torch.float32, up_std=0.1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_and_replay_are_one_policy(architecture: str, temperature: float) -> None:
    policy = float32_policy(architecture)
    rollouts = sample(policy, requests_for(PROMPTS), slots=3, temperature=temperature, stop=(7,), max_new_tokens=26)
    reasons = [rollout.finish_reason for rollout in rollouts]
    # Ragged prompts, early stops, cut-offs, evictions and refilled slots: all are in here.
    assert len({len(prompt) for prompt in PROMPTS}) >= 4 and {"stop", "length"} == set(reasons)
    assert max(rollout.evictions for rollout in rollouts) >= 5
    assert gap(policy, rollouts) < MAX_GAP


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_one_policy_to_the_last_digits_of_float64(setting: str) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    rollouts = sample(policy, requests_for(PROMPTS[:5]), slots=3, temperature=0.7, stop=(5,))
    assert gap(policy, rollouts) < 1e-10


def test_greedy_rollouts_record_the_logprobs_of_temperature_one() -> None:
    policy = float32_policy("llama")
    rollouts = sample(policy, requests_for(PROMPTS[:3]), temperature=0.0)
    batch, output = replay_of(policy, rollouts)
    assert batch.temperature == 0
    assert (output.policy_logprobs - recorded(rollouts)).abs().max() < MAX_GAP


def test_the_gap_shows_when_the_replay_is_another_policy() -> None:
    # A stock recompute (full cache), another temperature, another block: each is far outside the tolerance.
    policy = tiny_policy("qwen2", dtype=torch.float32)
    rollouts = sample(policy, requests_for(PROMPTS), temperature=0.7)
    batch = collate_rollouts(rollouts)
    others = {
        "full cache": tiny_policy("qwen2", dtype=torch.float32, window=None),
        "another block": tiny_policy("qwen2", dtype=torch.float32, block=2),
        "no fold": tiny_policy("qwen2", dtype=torch.float32, kind="global_only"),
    }
    for name, other in others.items():
        found = logprob_gap(
            Replay(other)(batch).policy_logprobs, recorded(rollouts), completion_mask=batch.completion_mask
        )
        assert found.max > 0.1, name
        assert found.mean > 0.01 and found.kl > 1e-4, name


@pytest.mark.parametrize("kind", ["thought", "lora"])
def test_changing_the_last_token_changes_the_last_logprob_only(kind: str) -> None:
    policy = tiny_policy("qwen2", kind=kind)
    (rollout,) = sample(policy, requests_for([(5, 6, 7)]), max_new_tokens=21)
    other = rollout.completion_ids[-1] % 20 + 3
    changed = type(rollout)(**{**vars(rollout), "completion_ids": (*rollout.completion_ids[:-1], other)})
    _, before = replay_of(policy, [rollout])
    _, after = replay_of(policy, [changed])
    assert torch.equal(before.policy_logprobs[0, :-1], after.policy_logprobs[0, :-1])
    assert (before.policy_logprobs[0, -1] - after.policy_logprobs[0, -1]).abs() > 1e-3
    assert torch.equal(before.entropies, after.entropies)


def test_changing_a_token_leaves_everything_before_it_alone() -> None:
    policy = tiny_policy("qwen3")
    (rollout,) = sample(policy, requests_for([(5, 6, 7)]), max_new_tokens=24)
    _, before = replay_of(policy, [rollout])
    for place in (0, 7, 8, 12, 22):
        tokens = list(rollout.completion_ids)
        tokens[place] = tokens[place] % 20 + 3
        changed = type(rollout)(**{**vars(rollout), "completion_ids": tuple(tokens)})
        _, after = replay_of(policy, [changed])
        different = (before.policy_logprobs != after.policy_logprobs)[0]
        assert not different[:place].any()
        # Its own log-prob, and every later one: through the cache and, once evicted, through the state.
        assert different[place:].all()


def test_a_completion_s_logprobs_are_a_distribution_over_its_last_token() -> None:
    # Off by one token anywhere, and these would not be the probabilities of alternatives at one place.
    policy = tiny_policy("mistral")
    (rollout,) = sample(policy, requests_for([(5, 6)]), max_new_tokens=13)
    completions = [
        type(rollout)(**{**vars(rollout), "completion_ids": (*rollout.completion_ids[:-1], token)})
        for token in range(VOCAB)
    ]
    _, output = replay_of(policy, completions)
    assert output.policy_logprobs[:, -1].exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_evictions_and_the_state_norm_are_recorded() -> None:
    policy = tiny_policy("qwen2", update_rule="paper")
    engine = RolloutEngine(policy, slots=2, max_new_tokens=26, temperature=1.0, stop_token_ids=(3,))
    finished = []
    rollouts = engine.run(requests_for(PROMPTS[:5]), on_finish=finished.append)
    assert sorted(map(id, finished)) == sorted(map(id, rollouts))
    for rollout in rollouts:
        entered = len(rollout.completion_ids) - 1
        assert rollout.evictions == sum(t >= 8 and t % 4 == 0 for t in range(entered))
        assert rollout.state_norm == pytest.approx(2.0, abs=1e-6)  # sqrt of rank 4
        assert rollout.finish_reason == ("stop" if rollout.completion_ids[-1] == 3 else "length")
        assert 3 not in rollout.completion_ids[:-1]
    without = sample(tiny_policy("qwen2", kind="lora"), requests_for(PROMPTS[:1]))
    assert without[0].state_norm == 0
