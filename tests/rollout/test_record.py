"""The spine: what a rollout holds, how rollouts become a batch, how the gap is measured."""

import math

import pytest
import torch

from pte.rollout.record import Rollout, RolloutRequest, collate, collate_rollouts, logprob_gap, right_pad


def rollout(prompt: tuple[int, ...], completion: tuple[int, ...], *, temperature: float = 1, seed: int = 0) -> Rollout:
    return Rollout(
        prompt_ids=prompt,
        completion_ids=completion,
        rollout_logprobs=torch.zeros(len(completion)),
        finish_reason="stop",
        stream_seed=seed,
        temperature=temperature,
        evictions=0,
        state_norm=0.0,
    )


def test_a_batch_is_padded_on_the_right_and_says_where() -> None:
    batch = collate_rollouts([rollout((5, 6), (7,), seed=3), rollout((8,), (9, 10, 11), seed=4)])
    assert batch.prompt_ids.tolist() == [[5, 6], [8, 0]] and batch.prompt_lengths.tolist() == [2, 1]
    assert batch.completion_ids.tolist() == [[7, 0, 0], [9, 10, 11]] and batch.completion_lengths.tolist() == [1, 3]
    assert batch.completion_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.stream_seeds.tolist() == [3, 4] and batch.temperature == 1
    swapped = batch.take(torch.tensor([1, 0]))
    assert swapped.completion_mask.tolist() == [[True, True, True], [True, False, False]]
    assert swapped.prompt_ids.tolist() == [[8, 0], [5, 6]] and swapped.stream_seeds.tolist() == [4, 3]
    assert swapped.prompt_lengths.tolist() == [1, 2]


def test_a_63_bit_seed_survives_the_batch() -> None:
    seed = 2**63 - 25
    assert collate([(1,)], [(2,)], stream_seeds=[seed], temperature=1.0).stream_seeds.tolist() == [seed]


def test_padding_keeps_every_token() -> None:
    assert right_pad([(1, 2, 3), (4,), (5, 6)]).tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]


def test_a_worked_gap() -> None:
    # Differences 0.2, -0.1 on real tokens; the padded place differs by 9 and must not count.
    policy = torch.tensor([[-1.0, -9.0], [-2.1, -3.0]])
    recorded = torch.tensor([[-1.2, 0.0], [-2.0, -3.0]])
    mask = torch.tensor([[True, False], [True, True]])
    found = logprob_gap(policy, recorded, completion_mask=mask)
    assert found.max == pytest.approx(0.2, abs=1e-6)
    assert found.mean == pytest.approx(0.1, abs=1e-6)
    expected = ((math.exp(0.2) - 0.2 - 1) + (math.exp(-0.1) + 0.1 - 1)) / 3
    assert found.kl == pytest.approx(expected, abs=1e-6)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        RolloutRequest((), 0)
    assert str(caught.value) == "a prompt must have at least 1 token, got none; check the problem and its template"


def test_a_batch_that_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        collate([(1,)], [(2,), (3,)], stream_seeds=[0], temperature=1.0)
    assert str(caught.value) == (
        "prompts, completions and stream_seeds must be as many, got 1, 2 and 1; give one of each per sequence"
    )
    with pytest.raises(ValueError, match="every completion must have at least 1 token, completion 1 has none; leave"):
        collate([(1,), (1,)], [(2,), ()], stream_seeds=[0, 1], temperature=1.0)
    with pytest.raises(ValueError, match="every prompt must have at least 1 token, prompt 0 has none; leave it out"):
        collate([()], [(2,)], stream_seeds=[0], temperature=1.0)
    with pytest.raises(ValueError) as caught:
        collate_rollouts([rollout((1,), (2,)), rollout((1,), (2,), temperature=0.5)])
    assert str(caught.value) == "rollouts of one batch must share a temperature, got [0.5, 1]; split the batch"
