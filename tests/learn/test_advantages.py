"""Advantages against the formula by hand, and the properties that the update relies on."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.learn.advantages import group_advantages, mixed_accuracy_groups, tied_groups


def rewards_of(*groups):
    return torch.tensor(groups, dtype=torch.float64)


def test_std_advantages_of_one_right_in_four_by_hand():
    # mean 1/4; deviations 3/4, -1/4, -1/4, -1/4; squares 9/16 + 3/16 = 12/16; divisor 4 - 1: variance 1/4, std 1/2.
    advantages = group_advantages(rewards_of([1, 0, 0, 0]), scale="std")
    torch.testing.assert_close(advantages, rewards_of([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))


def test_scale_none_only_subtracts_the_mean():
    # mean (3 + 1 + 2) / 3 = 2
    assert group_advantages(rewards_of([3, 1, 2]), scale="none").tolist() == [[1, -1, 0]]


def test_a_group_is_normalised_by_itself_alone():
    first, second = [1.0, 0.0, 0.0, 1.0], [5.0, 9.0, -3.0, 0.0]
    together = group_advantages(rewards_of(first, second))
    torch.testing.assert_close(together[:1], group_advantages(rewards_of(first)))
    torch.testing.assert_close(together[1:], group_advantages(rewards_of(second)))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.sampled_from(["std", "none"]))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(rewards, scale):
    advantages = group_advantages(rewards_of(rewards), scale=scale)[0]
    assert abs(advantages.sum().item()) < 1e-9
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    assert advantages[best] >= advantages[worst]


@given(st.floats(-10, 10), st.integers(2, 9), st.sampled_from(["std", "none"]))
def test_a_tied_group_gets_exact_zeros(reward, group_size, scale):
    rewards = torch.full((1, group_size), reward, dtype=torch.float32)
    assert tied_groups(rewards).tolist() == [True]
    assert group_advantages(rewards, scale=scale).tolist() == [[0.0] * group_size]


def test_tied_groups_marks_only_groups_without_any_difference():
    assert tied_groups(rewards_of([1, 1, 1], [0, 0, 0], [0, 0, 1e-9])).tolist() == [True, True, False]


def test_dynamic_sampling_drops_all_right_and_all_wrong_and_keeps_the_rest():
    accuracies = rewards_of([1, 1, 1], [0, 0, 0], [1, 0, 0], [0.5, 0.5, 0.5])
    assert mixed_accuracy_groups(accuracies).tolist() == [False, False, True, True]


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=9))
def test_dynamic_sampling_is_a_mean_accuracy_strictly_between_0_and_1(accuracies):
    mean = sum(accuracies) / len(accuracies)  # quarters add without rounding
    assert mixed_accuracy_groups(rewards_of(accuracies)).item() == (0 < mean < 1)


@pytest.mark.parametrize("function", [group_advantages, tied_groups, mixed_accuracy_groups])
def test_a_group_of_one_is_refused(function):
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        function(rewards_of([1.0], [0.0]))


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale must be .* got 'batch'"):
        inspect.unwrap(group_advantages)(rewards_of([1, 0]), scale="batch")


@pytest.mark.parametrize("value", [1.5, -0.5, float("nan")])
def test_an_accuracy_outside_0_to_1_is_refused(value):
    with pytest.raises(ValueError, match="accuracies must be between 0 and 1"):
        mixed_accuracy_groups(rewards_of([1.0, value]))
