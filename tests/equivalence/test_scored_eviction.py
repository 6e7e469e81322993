"""Policies that look at attention and keys: what they choose, what is recorded, and that the replay follows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from live_bytes import LiveBytes
from pte.method import observe
from pte.method.eviction.h2o import HeavyHitters
from pte.method.eviction.keydiff import DistinctKeys
from pte.method.eviction.policy import KeptTokens, Needs
from pte.method.eviction.rkv import RedundantKeys
from pte.method.eviction.scissorhands import PersistentImportance
from pte.method.eviction.scored import LowestScore, needed
from pte.method.eviction.snapkv import ObservationWindow
from pte.method.eviction.tova import LastQueryAttention
from pte.method.schedule import EvictionSchedule
from pte.model.policy import BoundedPolicy
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import ReplayBatch, Rollout, RolloutRequest, collate, collate_rollouts
from pte.rollout.replay import Replay
from reference import Reference
from sampled import SCORED, SETTINGS, gap, recorded, replay_of, replayed_windows, requests_for, sample
from tiny import random_sequences, tiny_base, tiny_policy

pytestmark = pytest.mark.system

PROMPTS = [(5,), (6,) * 14, *random_sequences(5, prompt=(2, 9), seed=3)[0]]
MODES = [("chain", None), ("horizon", 2), ("exact", None)]


class SmallValues(LowestScore):
    """Of the tests: the tokens with the smallest values leave."""

    name = "values"
    needs = Needs(values=True)

    def scores(self, kept: KeptTokens) -> torch.Tensor:
        return needed(kept.values).norm(dim=-1).mean((0, 2))


class ManyQueries(SmallValues):
    """Of the tests: asks for more queries than a block has."""

    needs = Needs(attention="last", last_queries=5)


RANKED = [
    HeavyHitters(2),
    PersistentImportance(2),
    LastQueryAttention(),
    ObservationWindow(2),
    RedundantKeys(2),
    DistinctKeys(2),
]
PLUG_INS = [LastQueryAttention(), DistinctKeys(2), ObservationWindow(2), PersistentImportance(1), SmallValues(1)]


def rollouts_of(policy: BoundedPolicy, *, slots: int = 3, tokens: int = 26, **options: object) -> list[Rollout]:
    return sample(
        policy, requests_for(PROMPTS, first_seed=62), slots=slots, max_new_tokens=tokens, temperature=1.0, **options
    )


def newest_only(rollout: Rollout) -> list[list[int]]:
    """What the window would have evicted: the record of a policy that never looked."""
    assert rollout.evicted_tokens is not None
    evictions, block = rollout.evicted_tokens.shape
    return torch.arange(evictions * block).view(evictions, block).tolist()


@pytest.mark.parametrize("setting", SCORED)
def test_a_record_names_a_block_of_kept_tokens_for_every_eviction(setting: str) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    window, block = policy.schedule.window_tokens, policy.schedule.evict_tokens
    differing = 0
    for rollout in rollouts_of(policy, stop=(3,)):
        assert rollout.evicted_tokens.shape == (rollout.evictions, block)
        kept = set(range(window))
        for index, leaving in enumerate(rollout.evicted_tokens.tolist()):
            assert set(leaving) <= kept and len(set(leaving)) == block and leaving == sorted(leaving)
            newest = sorted(kept)[len(kept) - policy.eviction.recent_tokens :]
            assert not set(leaving) & set(newest), "the newest are protected"
            kept = kept - set(leaving) | set(range(window + index * block, window + (index + 1) * block))
        differing += rollout.evicted_tokens.tolist() != newest_only(rollout)
    assert differing >= 3, "scores must matter, or this would be the window"


@pytest.mark.parametrize("setting", [None, "random eviction", "sinks"])
def test_policies_that_need_nothing_record_nothing_and_nobody_observes(
    setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("nobody asked for probabilities")

    monkeypatch.setattr(observe, "received_attention", refused)
    policy = tiny_policy(**({} if setting is None else SETTINGS[setting]))
    rollouts = rollouts_of(policy)
    assert all(rollout.evicted_tokens is None for rollout in rollouts)
    batch, output = replay_of(policy, rollouts)
    assert batch.evicted_tokens is None
    output.policy_logprobs.sum().backward()


def test_a_full_cache_records_nothing_and_nobody_observes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "received_attention", None)
    policy = tiny_policy(window=None, eviction=HeavyHitters(2))
    rollouts = rollouts_of(policy, tokens=12)
    assert {rollout.evicted_tokens for rollout in rollouts} == {None}
    assert gap(policy, rollouts) < 1e-10


def test_a_replay_with_a_record_does_not_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(eviction=RedundantKeys(2))
    rollouts = rollouts_of(policy)
    monkeypatch.setattr(observe, "received_attention", None)
    monkeypatch.setattr(RedundantKeys, "scores", None)
    assert gap(policy, rollouts) < 1e-10


@pytest.mark.parametrize("eviction", PLUG_INS, ids=lambda e: e.name)
def test_a_new_policy_is_one_class(eviction: LowestScore) -> None:
    policy = tiny_policy("qwen3", eviction=eviction)
    rollouts = rollouts_of(policy, stop=(3, 4))
    assert gap(policy, rollouts) < 1e-10
    batch = collate_rollouts(rollouts)
    chosen = Replay(policy)(replace(batch, evicted_tokens=None)).policy_logprobs
    torch.testing.assert_close(chosen.detach(), recorded(rollouts), rtol=0, atol=1e-10)
    for request, together in zip(requests_for(PROMPTS, first_seed=62), rollouts, strict=True):
        (alone,) = sample(policy, [request], slots=1, max_new_tokens=26, temperature=1.0, stop=(3, 4))
        assert alone.evicted_tokens.tolist() == together.evicted_tokens.tolist()


@pytest.mark.parametrize("eviction", PLUG_INS, ids=lambda e: e.name)
def test_what_a_policy_does_not_need_it_does_not_get(eviction: LowestScore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[KeptTokens] = []
    scores = type(eviction).scores
    monkeypatch.setattr(type(eviction), "scores", lambda self, kept: seen.append(kept) or scores(self, kept))
    rollouts_of(tiny_policy(eviction=eviction))
    assert len(seen) >= 4
    for kept in seen:
        assert (kept.attention_received is not None) == (eviction.needs.attention is not None)
        assert (kept.keys is not None) == eviction.needs.keys
        assert (kept.values is not None) == eviction.needs.values


@pytest.mark.parametrize("setting", SCORED)
def test_what_leaves_is_what_the_slow_reference_chooses(setting: str) -> None:
    policy = tiny_policy("qwen2", **SETTINGS[setting])
    rollouts = rollouts_of(policy)
    assert all(len(rollout.evicted_tokens) >= 4 for rollout in rollouts)
    for rollout in rollouts[:3]:
        reference = Reference(policy, stream_seed=rollout.stream_seed)
        with torch.no_grad():
            reference.logprobs(rollout.prompt_ids, rollout.completion_ids)
        assert reference.left == rollout.evicted_tokens.tolist()


@pytest.mark.parametrize("setting", SCORED)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_without_a_record_the_walk_chooses_what_the_rollout_chose(setting: str, mode: tuple[str, int | None]) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    rollouts = rollouts_of(policy, stop=(3, 4))
    batch = collate_rollouts(rollouts)
    replay = Replay(policy, gradient_mode=mode[0], horizon=mode[1])
    results = [replay(one).policy_logprobs for one in (batch, replace(batch, evicted_tokens=None))]
    torch.testing.assert_close(results[1].detach(), recorded(rollouts), rtol=0, atol=1e-10)
    if policy.adapter is None:
        return
    parameters = list(policy.adapter.parameters())
    followed, chosen = (torch.autograd.grad(x.square().sum(), parameters, allow_unused=True) for x in results)
    for mine, theirs in zip(followed, chosen, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_a_backward_repeats_the_choices_of_its_forward(
    mode: tuple[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(eviction=HeavyHitters(2))
    prompts, completions = random_sequences(3, completion=(22, 26))
    batch = collate(prompts, completions, stream_seeds=range(3), temperature=1.0)
    calls = []
    choose = HeavyHitters.evicted_slots

    def counted(self: HeavyHitters, kept: KeptTokens, *, evict_tokens: int) -> torch.Tensor:
        calls.append(int(kept.eviction_index[0]))
        return choose(self, kept, evict_tokens=evict_tokens)

    monkeypatch.setattr(HeavyHitters, "evicted_slots", counted)
    logprobs = Replay(policy, gradient_mode=mode[0], horizon=mode[1])(batch).policy_logprobs
    evictions = policy.schedule.num_evictions(max(map(len, completions)))
    assert calls == list(range(evictions)) and evictions >= 4
    # Another choice now would be another policy: scores turned round must change nothing.
    monkeypatch.setattr(HeavyHitters, "scores", lambda self, kept: -kept.attention_received)
    mine = torch.autograd.grad(logprobs.sum(), list(policy.adapter.parameters()))
    assert calls == list(range(evictions))
    monkeypatch.undo()
    again = Replay(policy, gradient_mode=mode[0], horizon=mode[1])(batch).policy_logprobs
    for one, other in zip(mine, torch.autograd.grad(again.sum(), list(policy.adapter.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def made_up_record(length: int, generator: torch.Generator) -> torch.Tensor:
    """Blocks of 4 at random among 8 kept tokens: what no policy chose."""
    kept, entering, blocks = list(range(8)), 8, []
    while entering < length - 1:
        order = torch.randperm(8, generator=generator)[:4].tolist()
        blocks.append(sorted(kept[place] for place in order))
        kept = sorted(set(kept) - set(blocks[-1])) + list(range(entering, entering + 4))
        entering += 4
    return torch.tensor(blocks, dtype=torch.int64).reshape(-1, 4)


@pytest.mark.parametrize("kind", ["thought", "lora"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_a_replay_follows_any_record_and_its_gradient_is_autograd_s(kind: str, mode: tuple[str, int | None]) -> None:
    policy = tiny_policy("qwen2", eviction=HeavyHitters(2), kind=kind)
    generator = torch.Generator().manual_seed(11)
    lengths = (19, 3, 10, 26)
    prompts = [(3, 4, 5), (8,), (9, 10), (14, 15, 16, 17)]
    completions = [tuple(torch.randint(3, 29, (n,), generator=generator).tolist()) for n in lengths]
    records = [made_up_record(n, generator) for n in lengths]
    weights = torch.randn(4, 26, generator=generator, dtype=torch.float64)
    batch = collate(prompts, completions, stream_seeds=range(4), temperature=0.7, evicted_tokens=records)
    ours = Replay(policy, gradient_mode=mode[0], horizon=mode[1])(batch).policy_logprobs
    expected = [
        Reference(policy, gradient_mode=mode[0], horizon=mode[1], temperature=0.7, evicted=record.tolist()).logprobs(
            prompt, completion
        )
        for prompt, completion, record in zip(prompts, completions, records, strict=True)
    ]
    for row, theirs in enumerate(expected):
        torch.testing.assert_close(ours[row, : len(theirs)], theirs, rtol=0, atol=1e-5)
    chosen = Replay(policy)(replace(batch, evicted_tokens=None)).policy_logprobs
    assert (chosen - ours).abs().max() > 0.01, "the policy itself chooses otherwise"
    parameters = list(policy.adapter.parameters())
    mine = torch.autograd.grad((ours * weights).sum(), parameters, allow_unused=True)
    loss = sum((theirs * weights[row, : len(theirs)]).sum() for row, theirs in enumerate(expected))
    for one, other in zip(mine, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if other is None or not other.any():
            assert one is None or not one.any()
            continue
        assert (one - other).abs().max() < 2e-5 * other.abs().max()


@pytest.mark.parametrize("eviction", RANKED, ids=lambda e: e.name)
def test_in_float32_rollout_and_replay_are_one_policy(eviction: LowestScore) -> None:
    base = tiny_base("qwen3", dtype=torch.float32, initializer_range=0.2)
    policy = tiny_policy(base=base, dtype=torch.float32, up_std=0.1, eviction=eviction)
    assert gap(policy, rollouts_of(policy, tokens=40, stop=(3,))) < 1e-5


def test_in_bfloat16_the_record_keeps_rollout_and_replay_one_policy() -> None:
    base = tiny_base(dtype=torch.bfloat16, initializer_range=0.15)
    # Rule `read` doubles a rounding error where `delta` would correct it.
    policy = tiny_policy(
        base=base, dtype=torch.bfloat16, window=32, block=8, eviction=RedundantKeys(2), update_rule="read"
    )
    prompts = random_sequences(6, prompt=(2, 9), seed=3)[0]
    rollouts = sample(policy, requests_for(prompts), max_new_tokens=90, temperature=1.0)
    assert gap(policy, rollouts) < 5e-2
    # Rounded otherwise, other tokens would leave at one eviction in eight, and the log-probs be 0.13 off.
    batch = collate_rollouts(rollouts)
    with torch.no_grad():
        chosen = Replay(policy)(replace(batch, evicted_tokens=None)).policy_logprobs
    assert (chosen - recorded(rollouts)).abs().max() > 5e-2


@pytest.mark.parametrize("eviction", RANKED, ids=lambda e: e.name)
def test_the_replay_s_window_is_what_the_record_leaves(eviction: LowestScore) -> None:
    policy = tiny_policy(eviction=eviction)
    rollouts = sorted(rollouts_of(policy, tokens=40, stop=(3,)), key=lambda rollout: -len(rollout.completion_ids))
    for stretch, windows in replayed_windows(policy, collate_rollouts(rollouts)):
        running = [rollout for rollout in rollouts if len(rollout.completion_ids) - 1 > stretch.start]
        for rollout, held in zip(running, windows, strict=True):
            left = set(rollout.evicted_tokens[: stretch.first_eviction].flatten().tolist())
            assert sorted(held) == sorted(set(range(stretch.start)) - left)


@pytest.mark.parametrize(
    ("eviction", "observed"),
    [
        # Evictions come before tokens 8, 12, 16 and 20; token 24 is drawn and never enters.
        (LastQueryAttention(), [7, 11, 15, 19, 23]),
        (ObservationWindow(2), [6, 7, 10, 11, 14, 15, 18, 19, 22, 23]),
        (HeavyHitters(2), list(range(24))),
        (PersistentImportance(2), list(range(24))),
        (DistinctKeys(2), []),
    ],
    ids=lambda case: case.name if isinstance(case, LowestScore) else "",
)
def test_only_the_queries_that_a_policy_asks_for_are_observed(
    eviction: LowestScore, observed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, steps = tiny_policy(eviction=eviction), []
    observe_layer, take = observe.AttentionObserver.observe, observe.AttentionObserver.take
    monkeypatch.setattr(observe.AttentionObserver, "take", lambda self: steps.append(engine.decode_steps) or take(self))
    engine = RolloutEngine(policy, slots=1, max_new_tokens=25, temperature=1.0, stop_token_ids=())
    (rollout,) = engine.run([RolloutRequest((3, 4, 5), 1)])
    assert steps == observed
    # A replay that chooses for itself observes the same ones, but for those that no eviction follows, and once.
    seen = []

    def counted(self: observe.AttentionObserver, query: torch.Tensor, key: torch.Tensor, **rest: object) -> None:
        seen.append(query.shape[2] if self.queries is None else self.queries.shape[1])
        observe_layer(self, query, key, **rest)

    monkeypatch.setattr(observe.AttentionObserver, "observe", counted)
    Replay(policy)(replace(collate_rollouts([rollout]), evicted_tokens=None)).policy_logprobs.sum().backward()
    assert sum(seen) == policy.cache_shape.layers * len([index for index in observed if index < 20])


def test_queries_before_the_last_eviction_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError) as caught:
        tiny_policy(eviction=ManyQueries(1))
    assert str(caught.value) == (
        "last_queries must be from 1 to evict_tokens (4), got 5 of policy 'values'; observe fewer"
    )


def refused_batch(change: str) -> tuple[BoundedPolicy, ReplayBatch]:
    policy = tiny_policy(eviction=HeavyHitters(2))
    batch = collate_rollouts(rollouts_of(policy))
    record = batch.evicted_tokens.clone()
    if change == "another block":
        return policy.with_cache(EvictionSchedule(8, 2), HeavyHitters(2)), batch
    if change == "too few evictions":
        record = record[:, :-1]
    elif change == "a token that left before":
        record[2, 1, 0] = record[2, 0, 0]
    elif change == "a token twice":
        record[2, 1, 0] = record[2, 1, 1]
    return policy, replace(batch, evicted_tokens=record)


@pytest.mark.parametrize("change", ["another block", "too few evictions", "a token that left before", "a token twice"])
def test_a_record_that_does_not_fit_is_refused(change: str) -> None:
    policy, batch = refused_batch(change)
    with pytest.raises(ValueError, match="evicted_tokens must name . kept reasoning tokens at eviction . of every .*"):
        Replay(policy)(batch)


def test_rollouts_with_and_without_a_record_do_not_share_a_batch() -> None:
    rollouts = rollouts_of(tiny_policy(eviction=HeavyHitters(2)))
    with pytest.raises(ValueError) as caught:
        collate_rollouts([rollouts[0], replace(rollouts[1], evicted_tokens=None)])
    assert str(caught.value) == (
        "rollouts of one batch must all record evicted_tokens or none, got 1 of 2; split the batch by the policy that "
        "made them"
    )


def test_a_scored_policy_with_several_segments_a_stretch_is_refused() -> None:
    class Hasty(HeavyHitters):
        def segments_per_stretch(self, window_tokens: int, evict_tokens: int) -> int:
            return 2

    with pytest.raises(ValueError, match="segments_per_stretch must be 1 for an eviction policy that needs attention"):
        tiny_policy(eviction=Hasty(2))


def peak(policy: BoundedPolicy, tokens: int) -> int:
    engine = RolloutEngine(policy, slots=2, max_new_tokens=tokens, temperature=1.0, stop_token_ids=())
    with LiveBytes() as probe:
        rollouts = engine.run([RolloutRequest((3, 4, 5), seed) for seed in range(2)])
        batch = replace(collate_rollouts(rollouts), evicted_tokens=None)
        loss = Replay(policy, gradient_mode="horizon", horizon=2)(batch).policy_logprobs.sum()
        torch.autograd.grad(loss, list(policy.adapter.parameters()))
    return probe.peak


@pytest.mark.parametrize("eviction", RANKED, ids=lambda e: e.name)
def test_memory_does_not_grow_with_the_completion(eviction: LowestScore) -> None:
    base = tiny_base(dtype=torch.float32, hidden_size=32, max_position_embeddings=4096)
    policy = tiny_policy(base=base, dtype=torch.float32, eviction=eviction, targets=("q_proj", "v_proj"))
    # Per token 100 bytes of bookkeeping and the record: 8 bytes where it is chosen, 8 where it is followed.
    assert (peak(policy, 90) - peak(policy, 26)) / (2 * 64) < 100 + 2 * 8
