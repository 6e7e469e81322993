"""The engine: where tokens lie and at which positions, its controls, and what it refuses."""

import pytest
import torch

from pte.method.eviction.policy import KeptTokens
from pte.method.eviction.random import UniformRandom
from pte.method.eviction.sinks import AttentionSinks
from pte.method.eviction.window import OldestFirst
from pte.model.policy import BoundedPolicy
from pte.rollout.evict import evict_rows
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest, collate_rollouts
from sampled import SETTINGS, replayed_windows, requests_for, sample
from tiny import tiny_base, tiny_policy

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13), (14, 15)]


class WatchedEngine(RolloutEngine):
    """Notes, after every step, what the cache of every running sequence holds."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.seen: dict[int, list[list[int]]] = {}

    def step(self) -> None:
        before, caches = list(self.running), self.buffers.cache
        super().step()
        for row, sequence in enumerate(before):
            if sequence is not None:
                positions = caches.positions[row]
                self.seen.setdefault(sequence.order, []).append(sorted(positions[positions >= 0].tolist()))


def watch(policy: BoundedPolicy, *, max_new_tokens: int = 60) -> tuple[WatchedEngine, list[Rollout]]:
    engine = WatchedEngine(policy, slots=2, max_new_tokens=max_new_tokens, temperature=1.0, stop_token_ids=(3,))
    return engine, engine.run(requests_for(PROMPTS))


def kept_by_hand(policy: BoundedPolicy, tokens: int, seed: int) -> list[list[int]]:
    """Reasoning tokens held after each token has entered, oldest first, with the policy asked on a sorted list."""
    schedule = policy.schedule
    kept: list[int] = []
    history = []
    evictions = 0
    for token in range(tokens):
        if len(kept) == schedule.window_tokens:
            seen = KeptTokens(torch.tensor([kept]), torch.tensor([evictions]), torch.tensor([seed]))
            chosen = policy.eviction.evicted_slots(seen, evict_tokens=schedule.evict_tokens)[0].tolist()
            kept = [other for place, other in enumerate(kept) if place not in chosen]
            evictions += 1
        kept.append(token)
        history.append(list(kept))
    return history


@pytest.mark.parametrize("eviction", [OldestFirst(), AttentionSinks(3), UniformRandom()], ids=lambda e: e.name)
def test_the_cache_holds_the_prompt_and_exactly_the_tokens_that_survive(eviction: object) -> None:
    policy = tiny_policy(eviction=eviction)
    engine, rollouts = watch(policy)
    assert max(rollout.evictions for rollout in rollouts) >= 8
    for order, (prompt, rollout) in enumerate(zip(PROMPTS, rollouts, strict=True)):
        entered = len(rollout.completion_ids) - 1
        history = kept_by_hand(policy, entered, rollout.stream_seed)
        expected = [list(range(len(prompt))) + [len(prompt) + token for token in kept] for kept in history]
        # Positions go on after an eviction, none is ever given twice, and the prompt never leaves.
        assert engine.seen.get(order, []) == expected


def test_under_the_window_the_newest_tokens_survive() -> None:
    # W = 8, E = 4 and the longest completion: before token t the oldest block left at 8, 12, 16, ...
    engine, rollouts = watch(tiny_policy())
    longest = max(range(4), key=lambda order: len(rollouts[order].completion_ids))
    prompt = len(PROMPTS[longest])
    for token, held in enumerate(engine.seen[longest]):
        oldest = 0 if token < 8 else 4 * ((token - 8) // 4 + 1)
        assert held[prompt:] == list(range(prompt + oldest, prompt + token + 1))


@pytest.mark.parametrize("eviction", [OldestFirst(), AttentionSinks(3), UniformRandom()], ids=lambda e: e.name)
def test_the_replay_s_window_is_the_rollout_s_at_every_stretch(eviction: object) -> None:
    policy = tiny_policy(eviction=eviction)
    _, rollouts = watch(policy)
    rollouts = sorted(rollouts, key=lambda rollout: -len(rollout.completion_ids))
    windows = replayed_windows(policy, collate_rollouts(rollouts))
    assert len(windows) >= 3
    for stretch, windows_held in windows:
        running = [rollout for rollout in rollouts if len(rollout.completion_ids) - 1 > stretch.start]
        for rollout, held in zip(running, windows_held, strict=True):
            assert sorted(held) == kept_by_hand(policy, stretch.start, rollout.stream_seed)[-1]


def test_random_evictions_differ_between_streams_of_one_batch() -> None:
    policy = tiny_policy(eviction=UniformRandom())
    kept = [kept_by_hand(policy, 40, seed)[-1] for seed in range(8)]
    assert len({tuple(held) for held in kept}) == 8


def test_a_zeroed_state_is_the_base_under_the_window() -> None:
    base = tiny_base()
    policy = tiny_policy(base=base, kind="thought")
    zeroed = sample(policy, requests_for(PROMPTS), temperature=1.0, state_control="zeroed")
    bare = sample(policy.without_adapter(), requests_for(PROMPTS), temperature=1.0)
    own = sample(policy, requests_for(PROMPTS), temperature=1.0)
    assert [r.completion_ids for r in zeroed] == [r.completion_ids for r in bare]
    for mine, theirs in zip(zeroed, bare, strict=True):
        torch.testing.assert_close(mine.rollout_logprobs, theirs.rollout_logprobs, rtol=0, atol=1e-12)
    assert [r.completion_ids for r in own] != [r.completion_ids for r in bare]


def test_a_shuffled_state_is_a_neighbour_s() -> None:
    policy = tiny_policy()
    # Two rows: each reads the other's, so that swapping the states back gives the first row the second's.
    requests = requests_for(PROMPTS[:2])
    options = {"slots": 2, "temperature": 1.0, "max_new_tokens": 24}
    own = sample(policy, requests, **options)
    shuffled = sample(policy, requests, state_control="shuffled", **options)
    for mine, theirs in zip(own, shuffled, strict=True):
        # Before any eviction all states are the first state; from the token after the first eviction on they differ.
        torch.testing.assert_close(mine.rollout_logprobs[:9], theirs.rollout_logprobs[:9], rtol=0, atol=1e-12)
        assert mine.rollout_logprobs[9] != theirs.rollout_logprobs[9]
    # Under one state for all, a neighbour's is one's own.
    fixed = tiny_policy(kind="global_only")
    same = sample(fixed, requests, state_control="shuffled", **options)
    for mine, theirs in zip(sample(fixed, requests, **options), same, strict=True):
        assert torch.equal(mine.rollout_logprobs, theirs.rollout_logprobs)


def test_a_shuffled_state_of_a_single_request_is_refused() -> None:
    with pytest.raises(ValueError, match="shuffled"):
        sample(tiny_policy(), requests_for(PROMPTS[:1]), slots=2, state_control="shuffled")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"slots": 0}, "slots must be at least 1, got 0; use for example 64"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0; use for example 64"),
        ({"temperature": 5e-5}, "temperature must be 0 (greedy) or at least 0.0001, got 5e-05; use for example 1.0"),
        ({"temperature": -0.5}, "temperature must be 0 (greedy) or at least 0.0001, got -0.5; use for example 1.0"),
        (
            {"slots": 1, "state_control": "shuffled"},
            "state_control 'shuffled' needs at least 2 slots, got 1; use for example 64",
        ),
    ],
)
def test_an_engine_that_cannot_work_is_refused(options: dict[str, object], text: str) -> None:
    settings = {"slots": 2, "max_new_tokens": 4, "temperature": 1.0, "stop_token_ids": (), **options}
    with pytest.raises(ValueError) as caught:
        RolloutEngine(tiny_policy(kind=None), **settings)
    assert str(caught.value) == text


def test_a_run_beyond_the_trained_positions_is_refused_before_any_work() -> None:
    policy = tiny_policy(base=tiny_base(max_position_embeddings=20), kind=None)
    requests = [RolloutRequest((5,) * 8, 0), RolloutRequest((5,), 1)]
    engine = RolloutEngine(policy, slots=2, max_new_tokens=13, temperature=1.0, stop_token_ids=())
    with pytest.raises(ValueError, match=r"within the model's 20 trained positions, got 8 \+ 13 tokens; lower "):
        engine.run(requests)
    assert engine.peak_cache_bytes == engine.decode_steps == 0
    assert len(sample(policy, requests, max_new_tokens=12)) == 2
    allowed = sample(policy, requests, max_new_tokens=13, allow_beyond_trained_positions=True)
    assert {len(rollout.completion_ids) for rollout in allowed} == {13}


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_the_shortest_completions_work(max_new_tokens: int) -> None:
    policy = tiny_policy()
    rollouts = sample(policy, requests_for(PROMPTS), slots=2, max_new_tokens=max_new_tokens)
    assert [len(rollout.completion_ids) for rollout in rollouts] == [max_new_tokens] * 4
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}


def test_no_requests_make_no_rollouts() -> None:
    assert sample(tiny_policy(kind=None), []) == []


def test_a_second_run_of_an_engine_is_the_first() -> None:
    engine = RolloutEngine(tiny_policy(), slots=2, max_new_tokens=20, temperature=1.0, stop_token_ids=(3,))
    first, second = engine.run(requests_for(PROMPTS)), engine.run(requests_for(PROMPTS))
    for mine, theirs in zip(first, second, strict=True):
        assert mine.completion_ids == theirs.completion_ids
        assert torch.equal(mine.rollout_logprobs, theirs.rollout_logprobs)


def test_nothing_of_a_rollout_is_held_after_it() -> None:
    engine = RolloutEngine(tiny_policy(), slots=3, max_new_tokens=12, temperature=1.0, stop_token_ids=())
    engine.run(requests_for(PROMPTS[:3]))
    held = [
        name
        for name, value in vars(engine).items()
        if isinstance(value, torch.Tensor) or name in ("buffers", "reader", "token_step")
    ]
    assert not held
    assert engine.peak_cache_bytes > 0


@pytest.mark.parametrize("setting", ["thought", "no adapter", "random eviction", "full cache", "h2o", "rkv"])
@pytest.mark.parametrize("look_every_tokens", [2, 3, 64])
def test_a_host_that_looks_rarely_changes_no_rollout(setting: str, look_every_tokens: int) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    requests = requests_for(PROMPTS + PROMPTS, first_seed=20)

    def rollouts(look: int) -> list[Rollout]:
        engine = RolloutEngine(policy, slots=3, max_new_tokens=30, temperature=1.0, stop_token_ids=(3, 4, 5))
        engine.look_every_tokens = look
        return engine.run(requests)

    rare, often = rollouts(look_every_tokens), rollouts(1)
    assert len({len(rollout.completion_ids) for rollout in often}) > 3
    for mine, theirs in zip(rare, often, strict=True):
        # Rows that stopped between two looks go on computing: it shows nowhere.
        assert mine.completion_ids == theirs.completion_ids and mine.finish_reason == theirs.finish_reason
        torch.testing.assert_close(mine.rollout_logprobs, theirs.rollout_logprobs, rtol=0, atol=1e-12)
        assert mine.state_norm == pytest.approx(theirs.state_norm, rel=1e-6)
        if theirs.evicted_tokens is not None:
            assert torch.equal(mine.evicted_tokens, theirs.evicted_tokens)


def test_the_host_looks_before_every_eviction_and_no_later_than_it_has_to() -> None:
    # W = 8, E = 4: with a look at most every 6 tokens, tokens enter as 6, 2 | 4 | 4 | 3: of 20 sampled tokens 19 enter.
    class Counting(RolloutEngine):
        def decode_tokens(self) -> None:
            before = self.decode_steps
            super().decode_tokens()
            bursts.append(self.decode_steps - before)

    bursts: list[int] = []
    engine = Counting(tiny_policy(), slots=1, max_new_tokens=20, temperature=1.0, stop_token_ids=())
    engine.look_every_tokens = 6
    engine.run(requests_for(PROMPTS[:1]))
    assert bursts == [6, 2, 4, 4, 3]
    assert engine.decode_steps == 19


@pytest.mark.parametrize("setting", ["thought", "random eviction", "h2o"])
def test_evicting_a_few_rows_at_a_time_changes_no_rollout(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    together = sample(policy, requests_for(PROMPTS), slots=4)
    folded: list[int] = []

    def watched(policy: BoundedPolicy, buffers: object, due: list[object], *, evict_tokens: int) -> None:
        folded.append(len(due))
        evict_rows(policy, buffers, due, evict_tokens=evict_tokens)

    monkeypatch.setattr("pte.rollout.evict.evict_rows", watched)
    shape = policy.cache_shape
    numbers = 3 * shape.layers * policy.schedule.evict_tokens * shape.kv_dim
    monkeypatch.setattr("pte.rollout.evict.EVICTED_NUMBERS", numbers)
    parts = sample(policy, requests_for(PROMPTS), slots=4)
    assert set(folded) == {3, 1}
    for mine, theirs in zip(parts, together, strict=True):
        assert mine.completion_ids == theirs.completion_ids
        torch.testing.assert_close(mine.rollout_logprobs, theirs.rollout_logprobs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("look_every_tokens", [1, 4, 5])
def test_a_row_at_its_last_token_waits_unharmed_for_a_refilled_one(look_every_tokens: int) -> None:
    policy = tiny_policy(window=None)
    requests = requests_for(PROMPTS[:3], first_seed=7)
    alone = [sample(policy, [request], max_new_tokens=12, temperature=1.0)[0] for request in requests]
    # The second request ends with a token that the others never draw; the third takes its row and ends last.
    stop = next(
        token
        for token in alone[1].completion_ids[2:6]
        if all(token not in other.completion_ids for other in (alone[0], alone[2]))
    )
    engine = RolloutEngine(
        policy, slots=2, max_new_tokens=12, temperature=1.0, stop_token_ids=(stop,), state_control="shuffled"
    )
    engine.look_every_tokens = look_every_tokens
    first, second, third = engine.run(requests)
    assert second.finish_reason == "stop" and len(second.completion_ids) < 8
    for mine, expected in ((first, alone[0]), (third, alone[2])):
        assert mine.finish_reason == "length"
        assert mine.completion_ids == expected.completion_ids
        torch.testing.assert_close(mine.rollout_logprobs, expected.rollout_logprobs, rtol=0, atol=1e-9)
