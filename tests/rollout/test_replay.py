"""The replay as a module: what it refuses, its entropies, and how a loss sits on it."""

import pytest
import torch

from pte.rollout.likelihood import likelihood
from pte.rollout.record import collate, collate_rollouts
from pte.rollout.replay import Replay
from sampled import gap, replay_of, requests_for, sample
from tiny import random_sequences, tiny_base, tiny_policy


def small_batch(count: int = 4, **options: object):
    prompts, completions = random_sequences(count, completion=(1, 26))
    return collate(prompts, completions, stream_seeds=range(count), temperature=1.0)


@pytest.mark.parametrize(
    ("mode", "horizon"), [("chain", 2), ("exact", 1), ("horizon", None), ("horizon", 0), ("horizon", -1)]
)
def test_a_horizon_belongs_to_its_mode(mode: str, horizon: int | None) -> None:
    with pytest.raises(ValueError) as caught:
        Replay(tiny_policy(kind=None), gradient_mode=mode, horizon=horizon)
    assert str(caught.value) == (
        f"horizon must be at least 1 with gradient_mode 'horizon' and absent otherwise, got {horizon} with '{mode}'; "
        f"use gradient_mode='horizon', horizon=4"
    )


def test_all_modes_say_the_same_of_a_batch() -> None:
    policy = tiny_policy()
    batch = small_batch()
    chain = Replay(policy)(batch)
    for options in ({"gradient_mode": "exact"}, {"gradient_mode": "horizon", "horizon": 1}):
        other = Replay(policy, **options)(batch)
        torch.testing.assert_close(other.policy_logprobs, chain.policy_logprobs, rtol=0, atol=1e-12)
        torch.testing.assert_close(other.entropies, chain.entropies, rtol=0, atol=1e-12)
    with torch.no_grad():
        silent = Replay(policy)(batch)
    assert not silent.policy_logprobs.requires_grad and chain.policy_logprobs.requires_grad
    assert torch.equal(silent.policy_logprobs, chain.policy_logprobs)


@pytest.mark.parametrize("mode", ["chain", "exact"])
def test_entropies_are_those_of_the_distribution_and_carry_no_gradient(mode: str) -> None:
    policy = tiny_policy(window=None, kind="lora")
    batch = small_batch()
    output = Replay(policy, gradient_mode=mode)(batch)
    assert not output.entropies.requires_grad
    # The full cache of an unadapted twin gives the logits; the adapter is switched on by the replay alone.
    bare = Replay(policy.without_adapter())(batch)
    for row in range(4):
        prompt, length = int(batch.prompt_lengths[row]), int(batch.completion_lengths[row])
        tokens = torch.cat((batch.prompt_ids[row, :prompt], batch.completion_ids[row, :length]))
        logits = policy.base(tokens[None]).logits[0, prompt - 1 : -1]
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(bare.entropies[row, :length], expected, rtol=0, atol=1e-9)
    assert not output.entropies[~batch.completion_mask].any()
    assert (output.entropies - bare.entropies)[batch.completion_mask].abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"gradient_mode": "horizon", "horizon": 2}], ids=["chain", "horizon"])
def test_any_loss_can_sit_on_top(options: dict[str, object]) -> None:
    # A loss that is not linear: its gradient needs the values, so the two walks must meet in autograd.
    policy = tiny_policy()
    batch = small_batch()
    parameters = list(policy.adapter.parameters())
    logprobs = Replay(policy, **options)(batch).policy_logprobs
    ours = torch.autograd.grad((logprobs.exp().square() * batch.completion_mask).sum(), parameters)
    weights = (2 * logprobs.exp().square() * batch.completion_mask).detach()
    linear = torch.autograd.grad((Replay(policy, **options)(batch).policy_logprobs * weights).sum(), parameters)
    for mine, theirs in zip(ours, linear, strict=True):
        assert mine.any()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["chain", "horizon", "exact"])
def test_frozen_adapter_parameters_get_no_gradient_and_change_nobody_else_s(mode: str) -> None:
    policy = tiny_policy()
    replay = Replay(policy, gradient_mode=mode, horizon=2 if mode == "horizon" else None)
    batch = small_batch()
    replay(batch).policy_logprobs.sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.adapter.named_parameters()}
    for name, parameter in policy.adapter.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(not name.startswith("encoder.key_map") and "q_proj" not in name)
    replay(batch).policy_logprobs.sum().backward()
    for name, parameter in policy.adapter.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10)


def test_the_module_s_parameters_are_the_adapter_s() -> None:
    policy = tiny_policy()
    names = {name.removeprefix("adapter.") for name, _ in Replay(policy).named_parameters()}
    assert names == {name for name, _ in policy.adapter.named_parameters()}


@pytest.mark.parametrize("kind", ["thought", "lora"])
def test_a_bfloat16_base_trains_float32_adapters(kind: str) -> None:
    policy = tiny_policy(base=tiny_base(dtype=torch.bfloat16, initializer_range=0.1), dtype=torch.bfloat16, kind=kind)
    rollouts = sample(policy, requests_for(random_sequences(4)[0]), temperature=1.0)
    assert max(rollout.evictions for rollout in rollouts) >= 4
    assert {rollout.rollout_logprobs.dtype for rollout in rollouts} == {torch.float32}
    # Products in bfloat16 have 8 bits, and a token at a time rounds otherwise than a stretch at once.
    assert gap(policy, rollouts) < 5e-2
    _, output = replay_of(policy, rollouts)
    assert output.policy_logprobs.dtype == torch.float32
    output.policy_logprobs.sum().backward()
    for name, parameter in policy.adapter.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_bfloat16_gradient_points_where_the_float64_one_does() -> None:
    exact = tiny_policy(base=tiny_base(initializer_range=0.1))
    rough = tiny_policy(base=tiny_base(dtype=torch.bfloat16, initializer_range=0.1), dtype=torch.bfloat16)
    gradients = []
    for policy in (exact, rough):
        Replay(policy)(small_batch()).policy_logprobs.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten().double() for parameter in policy.adapter.parameters()]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98


@pytest.mark.parametrize(("mode", "horizon"), [("chain", None), ("horizon", 2), ("exact", None)])
def test_a_second_backward_walks_again_and_finds_the_same(mode: str, horizon: int | None) -> None:
    policy, batch = tiny_policy(), small_batch()
    parameters = list(policy.adapter.parameters())
    logprobs = Replay(policy, gradient_mode=mode, horizon=horizon)(batch).policy_logprobs
    first = torch.autograd.grad(logprobs.sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(logprobs.sum(), parameters)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(("mode", "horizon"), [("chain", None), ("horizon", 2)])
def test_an_adapter_that_changed_since_the_forward_is_refused(mode: str, horizon: int | None) -> None:
    policy, batch = tiny_policy(), small_batch()
    logprobs = Replay(policy, gradient_mode=mode, horizon=horizon)(batch).policy_logprobs
    with torch.no_grad():
        next(policy.adapter.parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="must not change between a replay's forward and its backward"):
        logprobs.sum().backward()


@pytest.mark.parametrize("window", [8, None])
def test_autocast_is_refused_because_it_would_make_another_policy(window: int | None) -> None:
    policy = tiny_policy(window=window, dtype=torch.float32, base=tiny_base(dtype=torch.float32))
    prompts, _ = random_sequences(4, completion=(1, 2))
    rollouts = sample(policy, requests_for(prompts))
    batch = collate_rollouts(rollouts)
    message = r"base's own dtype, torch.float32, got autocast to torch.bfloat16; .*autocast\('cpu', enabled=False\)"
    walks = (
        lambda: Replay(policy)(batch),
        lambda: likelihood(policy, batch),
        lambda: sample(policy, requests_for(prompts)),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for walk in walks:
            with pytest.raises(ValueError, match=message):
                walk()
        with torch.autocast("cpu", enabled=False):
            replayed = Replay(policy)(batch).policy_logprobs
    for row, rollout in zip(replayed, rollouts, strict=True):
        torch.testing.assert_close(row[: len(rollout.completion_ids)], rollout.rollout_logprobs, rtol=0, atol=1e-5)
