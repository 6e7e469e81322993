"""Who leaves: exactly which tokens survive, for every policy, after many evictions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.method.eviction import rkv
from pte.method.eviction.h2o import HeavyHitters
from pte.method.eviction.keydiff import DistinctKeys
from pte.method.eviction.policy import EvictionPolicy, KeptTokens
from pte.method.eviction.random import UniformRandom, mix64
from pte.method.eviction.rkv import RedundantKeys
from pte.method.eviction.scissorhands import PersistentImportance
from pte.method.eviction.sinks import AttentionSinks
from pte.method.eviction.snapkv import ObservationWindow
from pte.method.eviction.tova import LastQueryAttention
from pte.method.eviction.window import OldestFirst

POLICIES = [
    OldestFirst(),
    UniformRandom(),
    AttentionSinks(2),
    HeavyHitters(3),
    PersistentImportance(3),
    LastQueryAttention(),
    ObservationWindow(2),
    RedundantKeys(2),
    DistinctKeys(2),
]


def survivors(
    policy: EvictionPolicy, *, window: int, block: int, evictions: int, seed: int = 0, shuffle: int | None = None
) -> list[list[int]]:
    """Kept reasoning tokens after each eviction, newest included, by a walk over a plain list of slots.

    Args:
        shuffle: Seed of a permutation of the slots, to show that only tokens count and not where they lie.
    """
    slots = list(range(window))
    if shuffle is not None:
        order = torch.randperm(window, generator=torch.Generator().manual_seed(shuffle)).tolist()
        slots = [slots[place] for place in order]
    history = []
    entering = window
    for eviction in range(evictions):
        kept = KeptTokens(torch.tensor([slots]), torch.tensor([eviction]), torch.tensor([seed]))
        chosen = policy.evicted_slots(kept, evict_tokens=block)[0].tolist()
        assert len(set(chosen)) == block
        history.append(sorted(token for place, token in enumerate(slots) if place not in chosen))
        for place in chosen:
            slots[place] = entering
            entering += 1
    return history


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_the_window_keeps_exactly_the_newest_tokens(blocks: int, block: int, shuffle: int) -> None:
    window = blocks * block
    history = survivors(OldestFirst(), window=window, block=block, evictions=12, shuffle=shuffle)
    assert history == [list(range(block * (n + 1), window + block * n)) for n in range(12)]


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_sinks_keep_exactly_the_first_and_the_newest_tokens(blocks: int, block: int, data: st.DataObject) -> None:
    window = (blocks + 1) * block
    sinks = data.draw(st.integers(1, window - block))
    history = survivors(AttentionSinks(sinks), window=window, block=block, evictions=12, shuffle=3)
    for n, kept in enumerate(history):
        newest_kept = list(range(sinks + block * (n + 1), window + block * n))
        assert kept == list(range(sinks)) + newest_kept


def test_the_oldest_leave_first_and_in_order() -> None:
    # New tokens take the slots in this order, so that the ring stays a ring.
    indices = torch.tensor([[9, 4, 7, 5], [0, 1, 2, 3]])
    kept = KeptTokens(indices, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert OldestFirst().evicted_slots(kept, evict_tokens=2).tolist() == [[1, 3], [0, 1]]
    assert AttentionSinks(1).evicted_slots(kept, evict_tokens=2).tolist() == [[1, 3], [1, 2]]


def test_random_eviction_is_the_same_again_wherever_the_tokens_lie() -> None:
    arguments = {"window": 12, "block": 4, "evictions": 20}
    first = survivors(UniformRandom(), seed=5, **arguments)
    assert survivors(UniformRandom(), seed=5, **arguments) == first
    # Slots decide nothing: the first choice is among the same tokens, and what enters later is the same too.
    assert survivors(UniformRandom(), seed=5, shuffle=9, **arguments) == first


def test_random_choices_depend_on_tokens_and_not_on_where_they_lie() -> None:
    tokens = torch.arange(30, 42)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))

    def chosen(tokens: torch.Tensor) -> torch.Tensor:
        kept = KeptTokens(tokens[None], torch.tensor([7]), torch.tensor([11]))
        return tokens[UniformRandom().evicted_slots(kept, evict_tokens=4)[0]]

    straight, mixed = chosen(tokens), chosen(tokens[order])
    assert straight.tolist() == mixed.tolist()


def test_random_eviction_differs_between_streams_and_between_evictions() -> None:
    streams = [tuple(survivors(UniformRandom(), window=16, block=8, evictions=1, seed=s)[0]) for s in range(60)]
    assert len(set(streams)) > 55
    # The same kept tokens at another eviction of the same stream: another draw.
    kept = KeptTokens(torch.arange(16).expand(60, -1), torch.arange(60), torch.full((60,), 3))
    draws = UniformRandom().evicted_slots(kept, evict_tokens=8)
    assert len({tuple(sorted(row)) for row in draws.tolist()}) > 55


def test_random_eviction_is_uniform_over_the_kept_tokens() -> None:
    kept = KeptTokens(torch.arange(100, 116).expand(8000, -1), torch.zeros(8000, dtype=torch.int64), torch.arange(8000))
    draws = UniformRandom().evicted_slots(kept, evict_tokens=4)
    counts = torch.bincount(draws.flatten(), minlength=16).double()
    # Each of 16 slots leaves with probability 1/4: 2000 times, standard deviation 38.7.
    assert (counts - 2000).abs().max() < 4.5 * 38.7


@given(st.integers(-(2**63), 2**63 - 1))
def test_the_hash_is_splitmix64(x: int) -> None:
    mask = 2**64 - 1
    z = x & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    assert mix64(torch.tensor([x])).item() & mask == z


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2), st.integers(0, 50), st.data())
def test_evictions_inside_a_stretch_never_touch_its_own_tokens(
    blocks: int, block: int, kind: int, seed: int, data: st.DataObject
) -> None:
    window = blocks * block
    policy: EvictionPolicy = OldestFirst()
    if kind == 1 and blocks > 1:
        policy = AttentionSinks(data.draw(st.integers(1, window - block)))
    elif kind == 2:
        policy = UniformRandom()
    policy.check(window, block)
    segments = policy.segments_per_stretch(window, block)
    assert segments >= 1
    slots = torch.arange(window)[None]
    start = window
    for _stretch in range(4):
        held_before = set(slots[0].tolist())
        for index in range(segments):
            kept = KeptTokens(slots, torch.tensor([(start - window) // block]), torch.tensor([seed]))
            chosen = policy.evicted_slots(kept, evict_tokens=block)
            assert set(slots[0, chosen[0]].tolist()) <= held_before, f"eviction {index} of {segments}"
            slots = slots.scatter(1, chosen, torch.arange(start, start + block)[None])
            start += block


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_one_sequence_of_a_batch_leaves_the_others_choices_alone(policy: EvictionPolicy) -> None:
    indices = torch.stack([torch.arange(8) + shift for shift in (0, 4, 40)])
    kept = KeptTokens(
        indices,
        torch.tensor([0, 1, 9]),
        torch.tensor([5, 6, 7]),
        attention_received=torch.rand(3, 8, generator=torch.Generator().manual_seed(0)),
        keys=torch.randn(2, 3, 2, 8, 4, generator=torch.Generator().manual_seed(1)),
    )
    together = policy.evicted_slots(kept, evict_tokens=4)
    for row in range(3):
        one = slice(row, row + 1)
        alone = KeptTokens(
            kept.token_indices[one],
            kept.eviction_index[one],
            kept.stream_seeds[one],
            attention_received=kept.attention_received[one],
            keys=kept.keys[:, one],
        )
        assert policy.evicted_slots(alone, evict_tokens=4).tolist() == together[one].tolist()


def test_sinks_that_leave_no_room_for_a_block_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        AttentionSinks(5).check(8, 4)
    assert str(caught.value) == (
        "sink_tokens + evict_tokens must not exceed window_tokens (8), got 5 + 4; use sink_tokens of at most 4"
    )
    AttentionSinks(4).check(8, 4)
    with pytest.raises(ValueError, match="sink_tokens must be at least 1, got 0; use policy 'window' for no sinks"):
        AttentionSinks(0)


def seen_with(scores: list[list[float]], tokens: list[list[int]], keys: torch.Tensor | None = None) -> KeptTokens:
    nothing = torch.zeros(len(tokens), dtype=torch.int64)
    return KeptTokens(
        torch.tensor(tokens), nothing, nothing, attention_received=torch.tensor(scores).double(), keys=keys
    )


def test_the_least_attended_tokens_leave_but_for_the_newest() -> None:
    # Tokens 10 .. 15; 14 and 15 are protected although they received least.
    tokens, received = [12, 10, 15, 11, 14, 13], [5.0, 9.0, 0.0, 1.0, 0.0, 2.0]
    kept = seen_with([received], [tokens])
    # Of 10: 9, 11: 1, 12: 5, 13: 2 the lowest are 11 and 13, in slots 3 and 5.
    assert HeavyHitters(2).evicted_slots(kept, evict_tokens=2).tolist() == [[3, 5]]
    assert HeavyHitters(0).evicted_slots(kept, evict_tokens=2).tolist() == [[4, 2]]


@pytest.mark.parametrize("shuffle", range(5))
def test_of_equal_scores_the_older_leave_first_wherever_they_lie(shuffle: int) -> None:
    # 64 equal scores: an unstable sort, or topk, would pick any of them.
    order = torch.randperm(64, generator=torch.Generator().manual_seed(shuffle))
    tokens = (100 + order).tolist()
    chosen = HeavyHitters(8).evicted_slots(seen_with([[1.0] * 64], [tokens]), evict_tokens=16)
    assert [tokens[slot] for slot in chosen[0].tolist()] == list(range(100, 116))
    scores = [float(token % 2) for token in tokens]
    chosen = HeavyHitters(8).evicted_slots(seen_with([scores], [tokens]), evict_tokens=16)
    assert [tokens[slot] for slot in chosen[0].tolist()] == list(range(100, 132, 2))


def test_a_token_whose_key_others_repeat_leaves_and_the_newest_of_its_kind_stays() -> None:
    # Keys a, a, b, a, c in the plane of three axes: the two older copies of a repeat it, the newest copy does not.
    axes = torch.eye(3, dtype=torch.float64)
    keys = torch.stack([axes[0], 2 * axes[0], axes[1], 3 * axes[0], axes[2]])[None, None, None]
    kept = seen_with([[1.0] * 5], [[0, 1, 2, 3, 4]], keys)
    assert RedundantKeys(0).evicted_slots(kept, evict_tokens=2).tolist() == [[0, 1]]
    # Row sums after taking out the newest similar one: token 0 counts once (of token 3), token 1 twice (0 and 3) less
    # nothing, tokens 2, 3, 4 not at all: 3 is the newest like 0 and 1, and 1 the newest like 3.
    redundancy = torch.tensor([1 / 5, 1 / 5, 0, 0, 0], dtype=torch.float64)
    redundancy[0], redundancy[1] = 2 / 5, 1 / 5
    expected = 0.1 * torch.full((5,), 0.2, dtype=torch.float64) - 0.9 * redundancy.softmax(0)
    torch.testing.assert_close(RedundantKeys(0).scores(kept)[0], expected, rtol=0, atol=1e-12)


def test_attention_keeps_a_token_whose_key_is_repeated() -> None:
    keys = torch.ones(1, 1, 1, 5, 3, dtype=torch.float64)
    # Equal keys: every row takes out token 4 (the last row token 3), so 0, 1 and 2 are equally redundant, 4/5.
    # Shares of attention 0.6 of token 1 save it: 0.1 x 0.5 is more than what redundancy differs by.
    kept = seen_with([[1.0, 6.0, 1.0, 1.0, 1.0]], [[0, 1, 2, 3, 4]], keys)
    assert RedundantKeys(0).evicted_slots(kept, evict_tokens=2).tolist() == [[0, 2]]


def test_redundancy_is_that_of_each_sequence_and_of_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(3, 4, 2, 12, 5, generator=generator, dtype=torch.float64)
    tokens = [torch.randperm(12, generator=generator).tolist() for _ in range(4)]
    received = torch.rand(4, 12, generator=generator).tolist()
    together = RedundantKeys(0).scores(seen_with(received, tokens, keys))
    for row in range(4):
        alone = RedundantKeys(0).scores(
            seen_with(received[row : row + 1], tokens[row : row + 1], keys[:, row : row + 1])
        )
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-12)
    for chunk in (1, 2 * 2 * 12 * 12):
        monkeypatch.setattr(rkv, "SIMILARITIES_PER_CHUNK", chunk)
        torch.testing.assert_close(RedundantKeys(0).scores(seen_with(received, tokens, keys)), together)


def test_the_tokens_that_were_low_most_often_leave() -> None:
    # Tokens 10 .. 15 with counts; 15 is protected. 12 and 10 were low most often, 10 is the older of equals.
    kept = seen_with([[5.0, 5.0, 9.0, 1.0, 4.0, 2.0]], [[12, 10, 15, 11, 14, 13]])
    assert PersistentImportance(1).evicted_slots(kept, evict_tokens=2).tolist() == [[1, 0]]
    assert PersistentImportance(1).evicted_slots(kept, evict_tokens=1).tolist() == [[1]]
    assert PersistentImportance(0).evicted_slots(kept, evict_tokens=1).tolist() == [[2]]


def test_the_last_query_protects_nobody_not_even_its_own_token() -> None:
    kept = seen_with([[0.3, 0.2, 0.1, 0.4]], [[7, 4, 9, 5]])
    assert LastQueryAttention().evicted_slots(kept, evict_tokens=2).tolist() == [[1, 2]]


@pytest.mark.parametrize("shuffle", range(3))
def test_votes_are_shared_by_neighbours_in_age_and_not_in_slots(shuffle: int) -> None:
    # Tokens 0 .. 13, of which 12 and 13 observe. Votes for 5 and 9 alone: 2 .. 8 get 5's share, 6 .. 11 get 9's, and
    # nothing reaches 0 and 1. The votes of 12, larger than all, do not help 11, 10 and 9.
    votes = [0.0] * 14
    votes[5], votes[9], votes[12] = 1.0, 3.0, 7.0
    expected = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 7.0, 0.0]
    order = torch.randperm(14, generator=torch.Generator().manual_seed(shuffle)).tolist()
    kept = seen_with([[votes[token] for token in order]], [order])
    policy = ObservationWindow(2)
    assert policy.scores(kept)[0].tolist() == [expected[token] for token in order]
    chosen = policy.evicted_slots(kept, evict_tokens=4)[0].tolist()
    assert [order[slot] for slot in chosen] == [0, 1, 2, 3], "of equal scores the older"


def test_the_keys_that_point_where_most_point_leave() -> None:
    # Units (1, 0), (1, 0), (0.8, 0.6), (0, 1), (0, -1) whatever their lengths: their sum is (2.8, 0.6).
    keys = torch.tensor([[[[[9.0, 0.0], [0.1, 0.0], [4.0, 3.0], [0.0, 5.0], [0.0, -7.0]]]]], dtype=torch.float64)
    kept = seen_with([[0.0] * 5], [[3, 0, 1, 2, 4]], keys)
    length = (2.8**2 + 0.6**2) ** 0.5
    expected = torch.tensor([[2.8, 2.8, 0.8 * 2.8 + 0.6 * 0.6, 0.6, -0.6]], dtype=torch.float64) / length
    torch.testing.assert_close(DistinctKeys(0).scores(kept), -expected, rtol=0, atol=1e-12)
    # Cosines 0.978, 0.978, 0.908, 0.210, -0.210: the equal ones leave, the older first.
    assert DistinctKeys(0).evicted_slots(kept, evict_tokens=2).tolist() == [[1, 0]]
    # Token 3 in slot 0 is among the two newest: the next one leaves.
    assert DistinctKeys(2).evicted_slots(kept, evict_tokens=2).tolist() == [[1, 2]]


def test_an_observation_window_has_a_token_at_least_and_a_block_at_most() -> None:
    with pytest.raises(
        ValueError, match=r"recent_tokens must be at least 1 \(they observe\), got 0; use for example 32"
    ):
        ObservationWindow(0)
    with pytest.raises(ValueError) as caught:
        ObservationWindow(3).check(8, 2)
    assert str(caught.value) == (
        "recent_tokens must be at most evict_tokens (2) with policy 'snapkv' (older queries are not observed), got 3; "
        "use 2 or less"
    )
    ObservationWindow(2).check(8, 2)


@pytest.mark.parametrize("policy", [HeavyHitters, PersistentImportance, RedundantKeys, DistinctKeys])
def test_protected_tokens_that_leave_no_room_for_a_block_are_refused(policy: type) -> None:
    with pytest.raises(ValueError) as caught:
        policy(5).check(8, 4)
    assert str(caught.value) == (
        "recent_tokens + evict_tokens must not exceed window_tokens (8), got 5 + 4; use recent_tokens of at most 4"
    )
    policy(4).check(8, 4)
    with pytest.raises(ValueError, match="recent_tokens must be at least 0, got -1; use for example half the window"):
        policy(-1)
