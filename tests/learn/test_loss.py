"""The policy loss against a slow one that walks the tokens, in float64, and the properties of its parts."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.learn.loss import BatchTotals, PolicyObjective, kl_penalty, policy_loss

KINDS = ("grpo", "dr_grpo", "dapo", "gspo")
LENGTHS = (5, 1, 7, 3, 4)
WIDTH = 8


def objective_of(kind, **changes):
    settings = {"clip_low": 0.2, "clip_high": 0.28, "kl_beta": 0.1, "max_completion_tokens": WIDTH}
    return PolicyObjective(kind=kind, **{**settings, **changes})


def batch_of(lengths=LENGTHS, *, seed=0):
    """Log-probs half a nat apart, so that a good part of the ratios is clipped; NaN outside the completions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(std):
        return torch.randn(len(lengths), WIDTH, generator=generator, dtype=torch.float64) * std

    rollout = -draw(1).abs()
    mask = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
    return {
        "policy_logprobs": (rollout + draw(0.5)).masked_fill(~mask, math.nan).requires_grad_(),
        "rollout_logprobs": rollout.masked_fill(~mask, math.nan),
        "reference_logprobs": (rollout + draw(0.5)).masked_fill(~mask, math.nan),
        "advantages": draw(1)[:, 0],
        "completion_mask": mask,
    }


def loss_of(batch, *, objective, totals=None):
    batch = dict(batch)
    totals = totals or BatchTotals(len(batch["advantages"]), int(batch["completion_mask"].sum()))
    policy, rollout = batch.pop("policy_logprobs"), batch.pop("rollout_logprobs")
    return policy_loss(policy, rollout, objective=objective, totals=totals, **batch)


def slow_loss(batch, *, objective):
    """One sequence and one token at a time, as the papers write it; nothing is padded or masked."""
    sequence_sums, lengths = [], []
    for row, advantage in enumerate(batch["advantages"]):
        length = int(batch["completion_mask"][row].sum())
        policy, rollout, reference = (
            batch[f"{whose}_logprobs"][row, :length] for whose in ("policy", "rollout", "reference")
        )
        sequence_ratio = torch.exp(sum(policy[t] - rollout[t] for t in range(length)) / length)
        total = 0.0
        for t in range(length):
            ratio = sequence_ratio if objective.kind == "gspo" else torch.exp(policy[t] - rollout[t])
            bounded = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
            kl = torch.exp(reference[t] - policy[t]) - (reference[t] - policy[t]) - 1
            total = total - min(ratio * advantage, bounded * advantage) + objective.kl_beta * kl
        sequence_sums.append(total)
        lengths.append(length)
    if objective.kind == "dapo":
        return sum(sequence_sums) / sum(lengths)
    if objective.kind == "dr_grpo":
        return sum(sequence_sums) / (len(lengths) * objective.max_completion_tokens)
    return sum(total / length for total, length in zip(sequence_sums, lengths, strict=True)) / len(lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_the_slow_token_by_token_loss(kind, seed):
    batch, objective = batch_of(seed=seed), objective_of(kind)
    fast, slow = loss_of(batch, objective=objective).loss, slow_loss(batch, objective=objective)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    policy = batch["policy_logprobs"]
    fast_gradient, slow_gradient = (torch.autograd.grad(loss, policy)[0] for loss in (fast, slow))
    torch.testing.assert_close(fast_gradient, slow_gradient.nan_to_num(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [(1, 4), (2, 3), (1, 1, 1, 1, 1)])
def test_losses_of_unequal_micro_batches_add_up_to_the_loss_of_the_batch(kind, parts):
    batch, objective = batch_of(), objective_of(kind)
    totals = BatchTotals(sequences=len(LENGTHS), tokens=sum(LENGTHS))
    whole = loss_of(batch, objective=objective, totals=totals).loss
    policy = batch["policy_logprobs"]
    (whole_gradient,) = torch.autograd.grad(whole, policy)
    pieces = {name: values.split(parts) for name, values in batch.items()}
    micro_losses = [
        loss_of({name: pieces[name][i] for name in pieces}, objective=objective, totals=totals).loss
        for i in range(len(parts))
    ]
    torch.testing.assert_close(sum(micro_losses), whole, rtol=1e-13, atol=1e-13)
    (summed_gradient,) = torch.autograd.grad(sum(micro_losses), policy)
    torch.testing.assert_close(summed_gradient, whole_gradient, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_outside_the_completions_reaches_neither_loss_nor_gradient_nor_diagnostics(kind, garbage):
    results = []
    for filler in (0.0, garbage):
        batch = batch_of()
        for whose in ("policy", "rollout", "reference"):
            filled = batch[f"{whose}_logprobs"].detach().masked_fill(~batch["completion_mask"], filler)
            batch[f"{whose}_logprobs"] = filled.requires_grad_(whose == "policy")
        outcome = loss_of(batch, objective=objective_of(kind))
        outcome.loss.backward()
        numbers = (outcome.loss, outcome.clip_fraction, outcome.ratio_mean, outcome.ratio_max, outcome.kl_mean)
        results.append(([number.item() for number in numbers], batch["policy_logprobs"].grad.tolist()))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wholly_masked_completion_adds_nothing(kind):
    batch = batch_of((4, 0, 2))
    kept = {name: values[[0, 2]] for name, values in batch.items()}
    totals, objective = BatchTotals(sequences=3, tokens=6), objective_of(kind)
    with_it, without_it = (loss_of(some, objective=objective, totals=totals).loss for some in (batch, kept))
    torch.testing.assert_close(with_it, without_it, rtol=1e-13, atol=0)


def one_token(log_ratio, advantage, **changes):
    """Loss and gradient of one token under DAPO."""
    policy = torch.tensor([[log_ratio - 1.0]], dtype=torch.float64, requires_grad=True)
    outcome = policy_loss(
        policy,
        torch.tensor([[-1.0]], dtype=torch.float64),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        completion_mask=torch.tensor([[True]]),
        objective=PolicyObjective(kind="dapo", clip_low=0.2, clip_high=0.28, **changes),
        totals=BatchTotals(1, 1),
    )
    outcome.loss.backward()
    return outcome, policy.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.27, 1.0, -1.27, False),  # inside 0.8 to 1.28
        (1.5, 1.0, -1.28, True),  # better than average and raised enough: min(1.5, 1.28)
        (1.5, -1.0, 1.5, False),  # worse than average and raised: min(-1.5, -1.28), the gradient pulls it back
        (0.5, 1.0, -0.5, False),  # better than average and lowered: min(0.5, 0.8), the gradient pushes it up
        (0.5, -1.0, 0.8, True),  # worse than average and lowered enough: min(-0.5, -0.8)
    ],
)
def test_clipping_is_asymmetric_and_only_stops_moves_that_went_far_enough(ratio, advantage, loss, is_clipped):
    outcome, gradient = one_token(math.log(ratio), advantage)
    assert outcome.loss.item() == pytest.approx(loss, abs=1e-12)
    assert outcome.clip_fraction.item() == float(is_clipped)
    # d(-w A)/d(log-prob) = -w A
    assert gradient == pytest.approx(0.0 if is_clipped else -ratio * advantage, abs=1e-12)


def test_gspo_shares_one_ratio_so_every_token_of_a_sequence_gets_the_same_gradient():
    batch = batch_of((4,))
    objective = objective_of("gspo", kl_beta=0.0, clip_low=0.9, clip_high=9.0)
    (gradient,) = torch.autograd.grad(loss_of(batch, objective=objective).loss, batch["policy_logprobs"])
    ratio = (batch["policy_logprobs"] - batch["rollout_logprobs"])[0, :4].mean().exp()
    expected = (-ratio * batch["advantages"][0] / 4).expand(4)  # d exp(mean) = exp(mean) / length
    torch.testing.assert_close(gradient[0, :4], expected.detach())


def test_diagnostics_are_token_averages_without_a_graph():
    # ratios 1.5 (clipped), 1, 1 at A = 1; log-prob of the reference one nat below the policy's at each token
    policy = torch.tensor([[math.log(1.5), 0.0], [0.0, 7.0]], dtype=torch.float64, requires_grad=True)
    outcome = policy_loss(
        policy,
        torch.zeros(2, 2, dtype=torch.float64),
        advantages=torch.ones(2, dtype=torch.float64),
        completion_mask=torch.tensor([[True, True], [True, False]]),
        objective=PolicyObjective(kind="dapo"),
        totals=BatchTotals(2, 3),
        reference_logprobs=policy.detach() - 1,
    )
    assert outcome.clip_fraction.item() == pytest.approx(1 / 3)
    assert outcome.ratio_mean.item() == pytest.approx(3.5 / 3)
    assert outcome.ratio_max.item() == pytest.approx(1.5)
    assert outcome.kl_mean.item() == pytest.approx(math.exp(-1) + 1 - 1)  # d = -1: e^-1 - (-1) - 1
    for number in (outcome.clip_fraction, outcome.ratio_mean, outcome.ratio_max, outcome.kl_mean):
        assert not number.requires_grad
    assert outcome.loss.requires_grad


def test_without_a_reference_there_is_no_kl():
    assert one_token(0.1, 1.0)[0].kl_mean is None


def test_rollout_and_reference_logprobs_get_no_gradient():
    batch = batch_of()
    for whose in ("rollout", "reference"):
        batch[f"{whose}_logprobs"].requires_grad_()
    loss_of(batch, objective=objective_of("grpo")).loss.backward()
    assert batch["rollout_logprobs"].grad is None
    assert batch["reference_logprobs"].grad is None


LOGPROBS = st.floats(-20, 0)


@given(LOGPROBS, LOGPROBS)
def test_kl_is_never_negative_and_zero_only_where_the_two_agree(policy, reference):
    kl = kl_penalty(torch.tensor(policy).double(), torch.tensor(reference).double()).item()
    assert kl >= 0
    if policy == reference:
        assert kl == 0
    if abs(policy - reference) > 1e-6:
        assert kl > 0


def test_expected_kl_over_samples_of_the_policy_is_the_exact_divergence():
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * kl_penalty(policy.log(), reference.log())).sum(), exact)


@given(LOGPROBS, LOGPROBS)
def test_descending_the_kl_moves_the_policy_towards_the_reference(policy, reference):
    logprob = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    kl_penalty(logprob, torch.tensor(reference, dtype=torch.float64)).backward()
    # The gradient is 1 - exp(reference - policy): one that ignores the reference would be constant.
    assert logprob.grad.item() == pytest.approx(1 - math.exp(reference - policy), rel=1e-9, abs=1e-12)
    assert -logprob.grad.item() * (reference - policy) >= 0


def test_the_gradient_of_the_loss_changes_with_the_reference():
    gradients = []
    for shift in (0.0, 0.5):
        batch = batch_of()
        batch["reference_logprobs"] = batch["reference_logprobs"] + shift
        gradients.append(
            torch.autograd.grad(loss_of(batch, objective=objective_of("grpo")).loss, batch["policy_logprobs"])[0]
        )
    changed = (gradients[0] - gradients[1]).abs() > 1e-6
    assert changed.equal(batch["completion_mask"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "ppo"}, "kind must be one of grpo, dr_grpo, dapo, gspo, got 'ppo'"),
        ({"clip_low": 0.0}, "clip_low must be above 0 and at most 1, got 0.0"),
        ({"clip_low": 1.5}, "clip_low must be above 0 and at most 1, got 1.5"),
        ({"clip_high": 0.0}, "clip_high must be above 0, got 0.0"),
        ({"kl_beta": -0.1}, "kl_beta must not be negative, got -0.1"),
        ({"kind": "dr_grpo"}, "max_completion_tokens must be at least 1 for dr_grpo, got None"),
    ],
)
def test_an_objective_out_of_range_is_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        PolicyObjective(**changes)


@pytest.mark.parametrize(("sequences", "tokens", "name"), [(0, 4, "sequences"), (4, 0, "tokens")])
def test_empty_totals_are_refused(sequences, tokens, name):
    with pytest.raises(ValueError, match=f"BatchTotals.{name} must be at least 1, got 0"):
        BatchTotals(sequences=sequences, tokens=tokens)


def test_totals_smaller_than_the_micro_batch_are_refused():
    with pytest.raises(ValueError, match="totals.sequences must count the whole optimizer batch, got 2"):
        loss_of(batch_of(), objective=objective_of("grpo"), totals=BatchTotals(2, 20))


def test_a_kl_term_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="reference_logprobs must be given when kl_beta is above 0"):
        one_token(0.0, 1.0, kl_beta=0.1)


@pytest.mark.parametrize("name", ["rollout_logprobs", "reference_logprobs", "completion_mask", "advantages"])
def test_a_shape_that_would_broadcast_is_refused(name):
    batch = batch_of()
    batch[name] = batch[name][:1]
    policy, rollout = batch.pop("policy_logprobs"), batch.pop("rollout_logprobs")
    # Without the shape checks of the tests, which would refuse it first.
    unchecked = inspect.unwrap(policy_loss)
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        unchecked(policy, rollout, objective=objective_of("grpo"), totals=BatchTotals(5, 20), **batch)
