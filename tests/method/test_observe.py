"""Probabilities that keys receive, against the naive program; and that watching changes nothing."""

import itertools
import math

import pytest
import torch

from pte.method import observe
from pte.method.attention import StretchAttention, additive, grouped_attention, packed_mask
from pte.method.cache import BoundedCache, CacheShape
from pte.method.observe import AttentionObserver, received_attention


def inputs(group: int = 2, tokens: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(group * 10 + tokens)
    allowed = torch.rand(3, 1, tokens, 7, generator=generator) < 0.6
    allowed[..., 0] = True
    return {
        "query": torch.randn(3, 2 * group, tokens, 4, generator=generator, dtype=torch.float64),
        "key": torch.randn(3, 2, 7, 4, generator=generator, dtype=torch.float64),
        "mask": additive(allowed, torch.float64),
    }


def by_hand(query, key, mask, counted: list[list[int]] | None = None) -> list[list[float]]:
    """One probability at a time."""
    received = [[0.0] * key.shape[2] for _ in range(key.shape[0])]
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for token in range(query.shape[2]) if counted is None else counted[row]:
                shared = key[row, head // (query.shape[1] // key.shape[1])]
                scores = 0.37 * shared @ query[row, head, token] + mask[row, 0, token]
                for place, probability in enumerate(torch.softmax(scores, 0).tolist()):
                    received[row][place] += probability
    return received


@pytest.mark.parametrize("chunk", [1, 60, 10**9])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_a_key_receives_is_the_sum_over_every_head_and_query(
    group: int, tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "PROBABILITIES_PER_CHUNK", chunk)
    given = inputs(group, tokens)
    ours = received_attention(given["query"], given["key"], mask=given["mask"], scaling=0.37)
    torch.testing.assert_close(ours, torch.tensor(by_hand(**given), dtype=torch.float64), rtol=0, atol=1e-12)
    # Every head and query gives 1 in all, to every sequence of the batch.
    torch.testing.assert_close(ours.sum(1), torch.full((3,), 2.0 * group * tokens, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("counted", [None, [[3, 4], [3, 4], [0, 4]]])
def test_low_probabilities_are_counted_among_the_keys_that_a_query_attends_to(
    counted: list[list[int]] | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "PROBABILITIES_PER_CHUNK", chunk)
    given, low = inputs(), [[0] * 7 for _ in range(3)]
    for row, head, token in itertools.product(range(3), range(4), range(5)):
        if counted is not None and token not in counted[row]:
            continue
        attended = [key for key in range(7) if given["mask"][row, 0, token, key] == 0]
        scores = {key: float(given["query"][row, head, token] @ given["key"][row, head // 2, key]) for key in attended}
        weights = {key: math.exp(0.37 * score) for key, score in scores.items()}
        for key, weight in weights.items():
            low[row][key] += weight / sum(weights.values()) < 1 / len(attended)
    observer = AttentionObserver(queries=None if counted is None else torch.tensor(counted), below_average=True)
    observer.observe(given["query"], given["key"], mask=given["mask"], scaling=0.37)
    assert observer.take().tolist() == low


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("counted", [None, [[0, 1], [3, 4], [2, 2]], [[4], [4], [1]]])
def test_an_observer_adds_layers_and_counts_each_sequence_s_own_queries(
    counted: list[list[int]] | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "PROBABILITIES_PER_CHUNK", chunk)
    observer = AttentionObserver(queries=None if counted is None else torch.tensor(counted))
    one, other = inputs(2), inputs(4)
    for given in (one, other):
        observer.observe(given["query"], given["key"], mask=given["mask"], scaling=0.37)
    expected = torch.tensor(by_hand(**one, counted=counted)) + torch.tensor(by_hand(**other, counted=counted))
    torch.testing.assert_close(observer.take(), expected.double(), rtol=0, atol=1e-5)
    before = observer.take().clone()
    observer.observe(one["query"], one["key"], mask=one["mask"], scaling=0.37)
    assert torch.equal(observer.take(), before), "a forward that is computed again in a backward counts nothing"


@pytest.mark.parametrize("chunk", [1, 60, 10**9])
@pytest.mark.parametrize("counted", [None, [[0, 6], [3, 4], [2, 5]]])
def test_without_a_mask_a_query_gives_to_no_later_key(
    counted: list[list[int]] | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "PROBABILITIES_PER_CHUNK", chunk)
    given = inputs(tokens=7)
    causal = additive(torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7), torch.float64)
    queries = None if counted is None else torch.tensor(counted)
    ours = received_attention(given["query"], given["key"], mask=None, scaling=0.37, queries=queries)
    expected = by_hand(given["query"], given["key"], causal, counted)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_bfloat16_probabilities_are_summed_in_float32() -> None:
    given = {name: x.bfloat16() for name, x in inputs().items()}
    received = received_attention(given["query"], given["key"], mask=given["mask"], scaling=0.37)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.sum(1), torch.full((3,), 20.0), rtol=0, atol=1e-4)


def test_an_observed_output_is_the_unobserved_one_bit_for_bit_and_carries_its_gradient() -> None:
    given = inputs(tokens=7)
    key, value = given["key"].requires_grad_(), torch.randn_like(given["key"])
    observer = AttentionObserver()
    attention = StretchAttention(None, None, mask=given["mask"], segments=1, observer=observer)
    observed = attention.attend(0, given["query"], key=key, value=value, scaling=0.37)
    packed = packed_mask(given["mask"], group=given["query"].shape[1] // key.shape[1])
    plain = grouped_attention(given["query"], key, value, mask=packed, scaling=0.37)
    assert torch.equal(observed.reshape(-1), plain.reshape(-1))
    assert not observer.take().requires_grad
    (mine,), (theirs,) = (torch.autograd.grad(x.sum(), key) for x in (observed, plain))
    assert torch.equal(mine, theirs)


def saturated(queries: str) -> BoundedCache:
    """Two sequences, two prompt slots, a window of four, all filled."""
    cache = BoundedCache.allocate(
        CacheShape(1, 1, 2), batch=2, prompt_slots=2, window_slots=4, dtype=torch.float32, device=torch.device("cpu")
    )
    cache.track_attention(queries)
    cache.prompt_lengths += 2
    cache.take_slots(torch.arange(2, 6).expand(2, -1))
    return cache


@pytest.mark.parametrize(
    ("queries", "after_two", "after_eviction", "neighbour"),
    [
        ("kept", [3.0, 5.0, 7.0, 9.0], [3.0, 0.0, 7.0, 0.0], [3.0, 5.0, 7.0, 9.0]),
        ("since_eviction", [3.0, 5.0, 7.0, 9.0], [0.0] * 4, [3.0, 5.0, 7.0, 9.0]),
        ("last", [3.0, 5.0, 7.0, 9.0], [0.0] * 4, [3.0, 5.0, 7.0, 9.0]),
    ],
)
def test_whose_attention_is_remembered(
    queries: str, after_two: list[float], after_eviction: list[float], neighbour: list[float]
) -> None:
    cache = saturated(queries)
    for first in (1.0, 2.0):
        cache.add_attention(torch.arange(first, first + 4).expand(2, -1))
    assert cache.attention_received.tolist() == [after_two] * 2
    cache.evict(torch.tensor([0]), torch.tensor([[1, 3]]))
    assert cache.attention_received.tolist() == [after_eviction, neighbour]
    assert cache.compact(torch.tensor([1])).attention_received.tolist() == [neighbour]


def test_a_refilled_slot_starts_with_nothing_received() -> None:
    cache = saturated("kept")
    cache.add_attention(torch.ones(2, 4))
    nothing = torch.zeros(1, 1, 1, 1, 2)
    cache.place_prompt(torch.tensor([1]), nothing, nothing, lengths=torch.tensor([1]))
    assert cache.attention_received.tolist() == [[1.0] * 4, [0.0] * 4]
