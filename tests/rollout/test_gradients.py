"""Gradients of a walk in pieces against one graph over all of it, and what waits between the pieces."""

import pytest
import torch

from pte.method.cache import EvictedTokens
from pte.method.eviction.h2o import HeavyHitters
from pte.method.schedule import EvictionSchedule
from pte.model.policy import BoundedPolicy
from pte.rollout import gradients
from pte.rollout.gradients import GradientSum, state_gradients
from pte.rollout.record import ReplayBatch, collate
from pte.rollout.replay import Replay, blank_scores
from pte.rollout.scores import score
from pte.rollout.stretch import run_stretch
from pte.rollout.waiting import WaitingBlocks
from pte.rollout.walk import Walk
from reference import Reference
from sampled import SETTINGS
from tiny import VOCAB, random_sequences, tiny_policy

pytestmark = pytest.mark.system

RAGGED = (61, 3, 47, 1, 30, 13, 2, 62)


def ragged_batch(lengths: tuple[int, ...] = RAGGED, *, seed: int = 0) -> ReplayBatch:
    """Sorted, so that a walk can take it as it is."""
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(lengths, reverse=True)
    completions = [tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist()) for n in ordered]
    prompts = random_sequences(len(ordered), prompt=(1, 9), seed=seed)[0]
    return collate(prompts, completions, stream_seeds=range(len(ordered)), temperature=0.8)


def one_graph_logprobs(policy: BoundedPolicy, batch: ReplayBatch) -> torch.Tensor:
    """Mode `chain` as its definition says: one graph over the whole walk, keys and values detached when stored."""
    walk, logprobs = Walk(policy, batch), blank_scores(policy, batch)
    for stretch in walk.stretches:
        start = walk.enter(stretch)
        caches = {"cache_keys": walk.cache.keys, "cache_values": walk.cache.values}
        hidden, keys, values = run_stretch(policy, start.inputs, states=start.states, **caches)
        walk.store(start, keys=keys.detach(), values=values.detach())
        chosen, _ = score(
            policy,
            hidden.flatten(0, 1)[start.inputs.scored],
            targets=start.inputs.targets,
            temperature=batch.temperature,
            with_entropy=False,
        )
        logprobs = logprobs.view(-1).index_put((start.inputs.places,), chosen).view_as(logprobs)
    return logprobs


def assert_same_gradients(mine: torch.Tensor, theirs: torch.Tensor, policy: BoundedPolicy) -> None:
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parameters = list(policy.adapter.parameters())
    found, expected = (
        torch.autograd.grad((logprobs * weights).sum(), parameters, allow_unused=True) for logprobs in (mine, theirs)
    )
    assert any(gradient is not None and gradient.any() for gradient in expected)
    for (name, _), one, other in zip(policy.adapter.named_parameters(), found, expected, strict=True):
        if other is None or not other.any():
            assert one is None or not one.any(), name
        else:
            assert (one - other).abs().max() <= 1e-10 * other.abs().max(), name


@pytest.mark.parametrize("stretches", [1, 2, 3, 100])
@pytest.mark.parametrize("setting", ["thought", "paper rule", "read rule", "post-rotary keys", "sinks"])
def test_a_chain_in_groups_has_the_gradient_of_one_graph(
    setting: str, stretches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Window 8: up to seven stretches with evictions, in groups that end evenly and unevenly, of ragged sequences.
    monkeypatch.setattr(gradients, "group_stretches", lambda policy: stretches)
    policy, batch = tiny_policy(**SETTINGS[setting]), ragged_batch()
    assert_same_gradients(Replay(policy)(batch).policy_logprobs, one_graph_logprobs(policy, batch), policy)


@pytest.mark.parametrize("setting", ["lora", "global_only", "one adapted layer", "no global tokens", "random eviction"])
def test_every_kind_of_adapter_has_the_gradient_of_one_graph(setting: str) -> None:
    policy, batch = tiny_policy(**SETTINGS[setting]), ragged_batch()
    assert_same_gradients(Replay(policy)(batch).policy_logprobs, one_graph_logprobs(policy, batch), policy)


@pytest.mark.parametrize("lengths", [(1,), (9,), (10,), (10, 1), (14,)])
def test_short_completions_have_the_gradient_of_one_graph(lengths: tuple[int, ...]) -> None:
    # One token; the last before an eviction; the first after one; a stretch that ends in its first segment.
    policy, batch = tiny_policy(), ragged_batch(lengths)
    assert_same_gradients(Replay(policy)(batch).policy_logprobs, one_graph_logprobs(policy, batch), policy)


@pytest.mark.parametrize("stretches", [1, 2])
def test_groups_are_the_token_by_token_reference_over_many_evictions(
    stretches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "group_stretches", lambda policy: stretches)
    policy, batch = tiny_policy(), ragged_batch((45,))
    completion = tuple(batch.completion_ids[0].tolist())
    theirs = Reference(policy, gradient_mode="chain", temperature=0.8).logprobs(
        tuple(batch.prompt_ids[0].tolist()), completion
    )
    ours = Replay(policy)(batch).policy_logprobs[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    parameters = list(policy.adapter.encoder.parameters())
    for mine, other in zip(
        torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(theirs.sum(), parameters), strict=True
    ):
        assert (mine - other).abs().max() < 2e-5 * other.abs().max()


def test_a_horizon_as_long_as_the_completion_is_the_chain() -> None:
    policy, batch = tiny_policy(), ragged_batch()
    far = Replay(policy, gradient_mode="horizon", horizon=100)(batch).policy_logprobs
    assert_same_gradients(far, one_graph_logprobs(policy, batch), policy)


@pytest.mark.parametrize("frozen", ["encoder", "layers"])
def test_with_half_of_the_adapter_frozen_the_other_half_s_gradient_is_the_same(frozen: str) -> None:
    policy, batch = tiny_policy(), ragged_batch()
    Replay(policy)(batch).policy_logprobs.sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.adapter.named_parameters()}
    for name, parameter in policy.adapter.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(not name.startswith(frozen))
    Replay(policy)(batch).policy_logprobs.sum().backward()
    for name, parameter in policy.adapter.named_parameters():
        if name.startswith(frozen):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10)


def test_only_blocks_that_left_before_the_last_group_wait_and_in_few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "group_stretches", lambda policy: 2)
    policy, batch = tiny_policy(), ragged_batch((61,))
    walk = Walk(policy, batch)
    waiting = state_gradients(policy, walk, horizon=None, collected=GradientSum(list(policy.adapter.parameters())))
    with torch.no_grad():
        for stretch in walk.stretches:
            start = walk.enter(stretch)
            caches = {"cache_keys": walk.cache.keys, "cache_values": walk.cache.values}
            _, keys, values = run_stretch(policy, start.inputs, states=start.states, **caches)
            walk.store(start, keys=keys, values=values)
            waiting.add(start, torch.ones_like(start.states))
    # 60 tokens enter: stretches start at 8, 16, ..., 56, two evictions of 4 each (the last has one of them).
    device = torch.device("cpu")
    groups = [[] if group.waiting is None else group.waiting.on_device(device) for group in waiting.groups]
    prompt = walk.prompt_lengths[0]
    assert [[evicted.positions.flatten().tolist() for evicted in group] for group in groups] == [
        [list(range(prompt + 8 * n, prompt + 8 * n + 8)) for n in pair] for pair in ((0, 1), (2, 3), (4, 5), ())
    ]
    assert not waiting.current


def test_blocks_come_back_from_the_host_as_they_went() -> None:
    generator = torch.Generator().manual_seed(0)
    evicted = []
    for rows in (3, 3, 1):
        keys, values = (torch.randn(2, rows, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        evicted.append(EvictedTokens(keys, values, torch.randint(0, 2**31 - 1, (rows, 4), generator=generator)))
    for went, came in zip(evicted, WaitingBlocks(evicted).on_device(torch.device("cpu")), strict=True):
        assert torch.equal(went.keys, came.keys) and torch.equal(went.values, came.values)
        assert torch.equal(went.positions, came.positions.long())


@pytest.mark.parametrize(
    ("window", "rank", "expected"),
    # Two layers, keys and values of 8 numbers of 8 bytes: 256 bytes a token. State and gradient: 2 x 2 layers x 4 bytes
    # x rank^2. At most 1 % of 8 x 256 = 2048 bytes, 20: rank 4 has 256, rank 2 has 64; of 64 x 256, 164.
    [((8, 4), 4, 13), ((8, 4), 2, 4), ((64, 16), 4, 2), ((64, 64), 8, 7)],
)
def test_a_group_is_as_long_as_its_state_and_gradient_are_large(
    window: tuple[int, int], rank: int, expected: int
) -> None:
    policy = tiny_policy(rank=rank, global_tokens=2).with_cache(EvictionSchedule(*window))
    assert gradients.group_stretches(policy) == expected


MODES = [("chain", None), ("horizon", 2), ("exact", None)]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
@pytest.mark.parametrize("setting", ["thought", "paper rule", "lora", "global_only", "h2o", "rkv", "full cache"])
def test_one_pass_with_the_true_log_probs_is_two_passes(setting: str, mode: tuple[str, int | None]) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    replay = Replay(policy, gradient_mode=mode[0], horizon=mode[1])
    batch = ragged_batch().take(torch.tensor([3, 0, 6, 1, 2, 7, 5, 4]))
    two = replay(batch)
    one = replay(batch, recorded=two.policy_logprobs.detach())
    assert torch.equal(one.policy_logprobs, two.policy_logprobs)

    def gradient(logprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not linear, so that the values matter.
        loss = (logprobs.exp().square() * batch.completion_mask).sum()
        return torch.autograd.grad(loss, list(policy.adapter.parameters()), allow_unused=True)

    for (name, _), mine, theirs in zip(
        policy.adapter.named_parameters(), gradient(one.policy_logprobs), gradient(two.policy_logprobs), strict=True
    ):
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            assert (mine - theirs).abs().max() <= 1e-10 * theirs.abs().max(), name
    torch.testing.assert_close(one.replayed_logprobs, two.replayed_logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.entropies, two.entropies, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_whatever_is_recorded_the_walk_says_what_it_found(mode: tuple[str, int | None]) -> None:
    policy, batch = tiny_policy(), ragged_batch()
    replay = Replay(policy, gradient_mode=mode[0], horizon=mode[1])
    true = replay(batch)
    wrong = torch.linspace(-9, -1, batch.completion_ids.numel(), dtype=torch.float64).view(batch.completion_ids.shape)
    output = replay(batch, recorded=wrong)
    assert torch.equal(output.policy_logprobs, wrong * batch.completion_mask)
    parameters = list(policy.adapter.parameters())
    # Linear in the log-probs: the gradient does not depend on what was recorded.
    mine, theirs = (torch.autograd.grad(x.policy_logprobs.sum(), parameters) for x in (output, true))
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-10 * other.abs().max()
    torch.testing.assert_close(output.replayed_logprobs, true.policy_logprobs.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(output.entropies, true.entropies, rtol=0, atol=1e-12)
    assert not output.replayed_logprobs.requires_grad and not output.entropies.requires_grad


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode[0])
def test_what_the_backward_walk_has_yet_to_find_cannot_be_read(mode: tuple[str, int | None]) -> None:
    policy, batch = tiny_policy(), ragged_batch()
    output = Replay(policy, gradient_mode=mode[0], horizon=mode[1])(batch, recorded=torch.zeros(8, 62))
    for name in ("replayed_logprobs", "entropies"):
        with pytest.raises(RuntimeError, match="known after its backward pass, which walks, and was asked for before"):
            getattr(output, name)
    output.policy_logprobs.sum().backward()
    assert output.replayed_logprobs[batch.completion_mask].max() < 0


def test_without_gradients_the_walk_is_done_at_once() -> None:
    policy, batch = tiny_policy(), ragged_batch()
    recorded = torch.full((8, 62), -2.0, dtype=torch.float64)
    with torch.no_grad():
        output = Replay(policy)(batch, recorded=recorded)
    expected = Replay(policy)(batch)
    assert torch.equal(output.policy_logprobs, recorded * batch.completion_mask)
    assert torch.equal(output.replayed_logprobs, expected.policy_logprobs.detach())
    assert torch.equal(output.entropies, expected.entropies)
    bare = Replay(policy.without_adapter())
    assert torch.equal(bare(batch, recorded=recorded).replayed_logprobs, bare(batch).policy_logprobs), (
        "nor where nothing is trained"
    )


def test_one_pass_walks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pte.rollout import replay as module

    walks = []
    monkeypatch.setattr(module, "Walk", lambda *arguments: walks.append(arguments) or Walk(*arguments))
    policy, batch = tiny_policy(), ragged_batch()
    for recorded, forward, whole in ((None, 1, 2), (torch.zeros(8, 62), 0, 1)):
        walks.clear()
        logprobs = Replay(policy)(batch, recorded=recorded).policy_logprobs
        assert len(walks) == forward
        logprobs.sum().backward()
        assert len(walks) == whole


def test_one_pass_of_a_policy_that_looks_at_attention_follows_the_record_or_chooses() -> None:
    policy, batch = tiny_policy(eviction=HeavyHitters(2)), ragged_batch()
    parameters = list(policy.adapter.parameters())
    found = []
    for mode in MODES[:2]:
        replay = Replay(policy, gradient_mode=mode[0], horizon=mode[1])
        two, one = replay(batch), replay(batch, recorded=torch.zeros(8, 62))
        for output in (two, one):
            found.append(torch.autograd.grad(output.policy_logprobs.sum(), parameters))
        torch.testing.assert_close(one.replayed_logprobs, two.replayed_logprobs, rtol=0, atol=1e-12)
        for mine, theirs in zip(found[-1], found[-2], strict=True):
            assert (mine - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode[0])
def test_an_adapter_that_changed_since_the_forward_is_refused_in_one_pass_too(mode: tuple[str, int | None]) -> None:
    policy, batch = tiny_policy(), ragged_batch()
    logprobs = Replay(policy, gradient_mode=mode[0], horizon=mode[1])(
        batch, recorded=torch.zeros(8, 62)
    ).policy_logprobs
    with torch.no_grad():
        next(policy.adapter.parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="must not change between a replay's forward and its backward"):
        logprobs.sum().backward()


def test_recorded_log_probs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        Replay(tiny_policy())(ragged_batch(), recorded=torch.zeros(8, 61))
    assert str(caught.value) == (
        "recorded must hold a log-prob for each completion token, shape (8, 62), got (8, 61); pad the rollouts' "
        "log-probs to the longest completion"
    )
