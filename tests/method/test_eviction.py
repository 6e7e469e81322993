"""Who leaves: exactly which tokens survive, for every policy, after many evictions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.method.eviction.h2o import HeavyHitters
from pte.method.eviction.policy import EvictionPolicy, KeptTokens
from pte.method.eviction.random import UniformRandom, mix64
from pte.method.eviction.rkv import RedundantKeys
from pte.method.eviction.sinks import AttentionSinks
from pte.method.eviction.window import OldestFirst

POLICIES = [OldestFirst(), UniformRandom(), AttentionSinks(2), HeavyHitters(3), RedundantKeys(2)]


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
