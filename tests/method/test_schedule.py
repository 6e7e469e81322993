"""When tokens leave: claims about the schedule alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte.method.schedule import EvictionSchedule, Stretch

budgets = st.tuples(st.integers(1, 6), st.integers(1, 8)).map(lambda b: EvictionSchedule(b[0] * b[1], b[1]))


def kept_by_hand(schedule: EvictionSchedule, tokens: int) -> list[list[int]]:
    """The walk in words: before a token enters a full window, the oldest block leaves."""
    window: list[int] = []
    history = []
    for token in range(tokens):
        if len(window) == schedule.window_tokens:
            window = window[schedule.evict_tokens :]
        window.append(token)
        history.append(list(window))
    return history


def test_a_worked_example() -> None:
    # W = 8, E = 4: tokens 0..7 fill the window; before 8, before 12, before 16 ... four leave.
    schedule = EvictionSchedule(8, 4)
    assert [t for t in range(21) if schedule.evicts_at(t)] == [8, 12, 16, 20]
    assert [schedule.evictions_before(t) for t in (0, 7, 8, 11, 12, 15, 16)] == [0, 0, 1, 1, 2, 2, 3]
    # A completion of 9 tokens enters 8 of them: the ninth is sampled only, so nothing has left yet.
    assert [schedule.num_evictions(n) for n in (1, 2, 8, 9, 10, 13, 14)] == [0, 0, 0, 0, 1, 1, 2]
    assert [schedule.kept_tokens(n) for n in (1, 2, 9, 10, 1000)] == [0, 1, 8, 8, 8]


@given(budgets, st.integers(0, 120))
def test_evictions_come_before_tokens_w_then_every_e(schedule: EvictionSchedule, tokens: int) -> None:
    history = kept_by_hand(schedule, tokens)
    evictions = 0
    for token in range(tokens):
        left = token > 0 and len(history[token]) <= len(history[token - 1])
        evictions += left
        assert schedule.evicts_at(token) == left
        assert schedule.evictions_before(token) == evictions
        first_kept = evictions * schedule.evict_tokens
        assert history[token] == list(range(first_kept, token + 1))


@given(budgets, st.integers(1, 200))
def test_the_window_never_holds_more_than_its_budget(schedule: EvictionSchedule, completion: int) -> None:
    most = max((len(kept) for kept in kept_by_hand(schedule, completion - 1)), default=0)
    assert schedule.kept_tokens(completion) == most <= schedule.window_tokens


@given(budgets, st.integers(1, 200))
def test_evictions_of_a_completion_are_counted_without_its_last_token(
    schedule: EvictionSchedule, completion: int
) -> None:
    assert schedule.num_evictions(completion) == sum(schedule.evicts_at(t) for t in range(completion - 1))


@given(budgets, st.integers(0, 150), st.data())
def test_stretches_and_segments_tile_a_completion(
    schedule: EvictionSchedule, entered: int, data: st.DataObject
) -> None:
    most = schedule.window_tokens // schedule.evict_tokens
    segments_per_stretch = data.draw(st.integers(1, most))
    stretches = list(schedule.stretches(entered, segments_per_stretch=segments_per_stretch))
    assert [t for stretch in stretches for t in range(stretch.start, stretch.stop)] == list(range(entered))
    assert stretches[0].num_evictions == 0
    evictions = 0
    for stretch in stretches:
        assert stretch.first_eviction == evictions
        inside = [t for t in range(stretch.start, stretch.stop) if schedule.evicts_at(t)]
        assert stretch.num_evictions == len(inside) <= segments_per_stretch
        if inside:
            assert inside[0] == stretch.start
            assert inside == [stretch.start + n * schedule.evict_tokens for n in range(len(inside))]
        evictions += len(inside)


@given(budgets, st.integers(1, 60), st.integers(1, 60))
def test_a_longer_batch_mate_changes_no_stretch_of_a_shorter_completion(
    schedule: EvictionSchedule, entered: int, more: int
) -> None:
    alone = list(schedule.stretches(entered, segments_per_stretch=1))
    beside = list(schedule.stretches(entered + more, segments_per_stretch=1))
    assert [s.start for s in alone] == [s.start for s in beside][: len(alone)]
    assert [s.first_eviction for s in alone] == [s.first_eviction for s in beside][: len(alone)]


def test_the_full_cache_never_evicts_and_is_one_stretch() -> None:
    full = EvictionSchedule(None)
    assert full.is_full and not EvictionSchedule(4, 4).is_full
    assert not any(full.evicts_at(t) for t in range(1000))
    assert full.evictions_before(10**9) == full.num_evictions(10**9) == 0
    assert full.kept_tokens(1000) == 999
    assert list(full.stretches(50, segments_per_stretch=1)) == [
        Stretch(start=0, stop=50, first_eviction=0, num_evictions=0)
    ]


@pytest.mark.parametrize(
    ("window", "block", "error", "text"),
    [
        (1000, 256, ValueError, "window_tokens must be a multiple of evict_tokens (256), got 1000; use 1024"),
        (4, 6, ValueError, "window_tokens must be a multiple of evict_tokens (6), got 4; use 6"),
        (8, 0, ValueError, "evict_tokens must be at least 1 token, got 0; use for example 1024"),
        (0, 4, ValueError, "window_tokens must be at least 1 token, got 0; use for example 1024"),
        (-8, 4, ValueError, "window_tokens must be at least 1 token, got -8; use for example 1024"),
        (8, -4, ValueError, "evict_tokens must be at least 1 token, got -4; use for example 1024"),
        (0.5, 4, TypeError, "window_tokens must be an integer number of tokens, got 0.5; use for example 1024"),
        (8, 0.25, TypeError, "evict_tokens must be an integer number of tokens, got 0.25; use for example 1024"),
        (8, None, TypeError, "evict_tokens must be an integer number of tokens, got None; use for example 1024"),
        (True, True, TypeError, "window_tokens must be an integer number of tokens, got True; use for example 1024"),
        (
            None,
            4,
            ValueError,
            "evict_tokens must be None when window_tokens is None (the full cache evicts nothing), got 4; "
            "set window_tokens as well",
        ),
    ],
)
def test_a_budget_that_cannot_work_is_refused_with_its_remedy(
    window: object, block: object, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        EvictionSchedule(window, block)
    assert str(caught.value) == text


@given(window=st.integers(1, 9).map(lambda blocks: 4 * blocks), index=st.integers(0, 99))
def test_tokens_until_an_eviction_count_the_steps_to_the_next_one(window: int, index: int) -> None:
    schedule = EvictionSchedule(window, 4)
    following = next(token for token in range(index + 1, index + 99) if schedule.evicts_at(token))
    assert schedule.tokens_until_eviction(index) == following - index
    assert EvictionSchedule(None).tokens_until_eviction(index) is None
