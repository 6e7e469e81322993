"""Attention against the naive program, and who may look at whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.method.attention import (
    DecodeAttention,
    StretchAttention,
    additive,
    causal_attention,
    grouped_attention,
    packed_mask,
    stretch_mask,
)
from pte.method.cache import BoundedCache, CacheShape


def naive_attention(query, key, value, *, mask, scaling):
    """Repeat keys and values over the group, scores, softmax, weighted sum."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling + mask
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 5])
def test_grouped_attention_is_the_naive_program(group: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(group * 10 + tokens)
    batch, kv_heads, keys, head_dim = 3, 2, 7, 4

    def gaussian(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    query = gaussian(batch, kv_heads * group, tokens, head_dim)
    key, value = gaussian(batch, kv_heads, keys, head_dim), gaussian(batch, kv_heads, keys, head_dim)
    allowed = torch.rand(batch, 1, tokens, keys, generator=generator) < 0.6
    allowed[..., 0] = True
    mask = additive(allowed, torch.float64)
    ours = grouped_attention(query, key, value, mask=packed_mask(mask, group=group), scaling=0.37)
    torch.testing.assert_close(ours, naive_attention(query, key, value, mask=mask, scaling=0.37), rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 9])
def test_causal_attention_is_the_naive_program_under_a_causal_mask_in_values_and_gradients(
    group: int, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(group * 10 + tokens)

    def gaussian(heads: int) -> torch.Tensor:
        return torch.randn(3, heads, tokens, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = gaussian(2 * group), gaussian(2), gaussian(2)
    mask = additive(torch.ones(tokens, tokens, dtype=torch.bool).tril(), torch.float64)
    ours = causal_attention(query, key, value, scaling=0.37)
    theirs = naive_attention(query, key, value, mask=mask, scaling=0.37)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), (query, key, value)),
        torch.autograd.grad((theirs * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_stretch_mask_rows() -> None:
    # Two segments of two tokens over three slots; the second segment has lost slot 0. The last token is padding.
    kept = torch.tensor([[[True, True, False], [False, True, False]]])
    real = torch.tensor([[True, True, True, False]])
    mask = stretch_mask(kept, real, dtype=torch.float64)
    seen = (mask[0, 0] == 0).int().tolist()
    assert seen == [
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 1, 0, 1, 1, 1, 0],
        [0, 1, 0, 1, 1, 1, 1],
    ]
    assert set(mask.unique().tolist()) == {0.0, float("-inf")}


def test_padding_before_a_token_is_not_seen_by_it() -> None:
    # A short prompt (one token, one padding), then two reasoning tokens in the same stretch.
    real = torch.tensor([[True, False, True, True]])
    mask = stretch_mask(torch.zeros(1, 1, 0, dtype=torch.bool), real, dtype=torch.float32)
    assert (mask[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(0, 10**6))
def test_no_token_looks_ahead_at_padding_or_into_lost_slots(
    batch: int, segments: int, width: int, slots: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(batch, segments, slots, generator=generator) < 0.5
    real = torch.rand(batch, segments * width, generator=generator) < 0.7
    seen = stretch_mask(kept, real, dtype=torch.float32)[:, 0] == 0
    for row in range(batch):
        for token in range(segments * width):
            expected = kept[row, token // width].tolist() + [
                bool(other == token or (other < token and real[row, other])) for other in range(segments * width)
            ]
            assert seen[row, token].tolist() == expected


def test_a_stretch_of_several_segments_equals_one_token_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, head_dim, slots, segments, width = 2, 4, 2, 4, 5, 3, 2
    tokens = segments * width

    def gaussian(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    cached_keys, cached_values = (gaussian(1, batch, kv_heads, slots, head_dim) for _ in range(2))
    query, key, value = (gaussian(batch, h, tokens, head_dim) for h in (heads, kv_heads, kv_heads))
    kept = torch.rand(batch, segments, slots, generator=generator) < 0.6
    mask = stretch_mask(kept, torch.ones(batch, tokens, dtype=torch.bool), dtype=torch.float64)
    attention = StretchAttention(cached_keys, cached_values, mask=mask, segments=segments)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[b, :, s * width : (s + 1) * width] for b in range(batch) for s in range(segments)])

    out = attention.attend(0, rows(query), key=rows(key), value=rows(value), scaling=0.5)
    added_keys, added_values = attention.take()
    assert torch.equal(added_keys[0], key) and torch.equal(added_values[0], value)
    for b in range(batch):
        for t in range(tokens):
            held = kept[b, t // width]
            keys = torch.cat((cached_keys[0, b][:, held], key[b, :, : t + 1]), dim=1)
            values = torch.cat((cached_values[0, b][:, held], value[b, :, : t + 1]), dim=1)
            single = naive_attention(query[b : b + 1, :, t : t + 1], keys[None], values[None], mask=0.0, scaling=0.5)
            torch.testing.assert_close(out[b * segments + t // width, t % width], single[0, 0], rtol=0, atol=1e-12)


def test_decoding_writes_into_its_slot_and_looks_at_filled_slots_only() -> None:
    generator = torch.Generator().manual_seed(2)
    shape = CacheShape(layers=1, kv_heads=2, head_dim=4)
    cache = BoundedCache.allocate(
        shape, batch=2, prompt_slots=2, window_slots=3, dtype=torch.float64, device=torch.device("cpu")
    )
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    cache.positions[:] = torch.tensor([[0, -1, 1, -1, -1], [0, 1, 5, 6, -1]])
    slots = torch.tensor([3, 4])
    cache.positions[torch.arange(2), slots] = torch.tensor([2, 7])
    before = cache.keys.clone()

    def gaussian(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, 1, 4, generator=generator, dtype=torch.float64)

    query, key, value = gaussian(4), gaussian(2), gaussian(2)
    attention = DecodeAttention(cache, slots, attended_slots=5, dtype=torch.float64)
    out = attention.attend(0, query, key=key, value=value, scaling=0.5)
    for row, filled in enumerate(([0, 2, 3], [0, 1, 2, 3, 4])):
        assert torch.equal(cache.keys[0, row, :, slots[row]], key[row, :, 0])
        others = [slot for slot in range(5) if slot != slots[row]]
        assert torch.equal(cache.keys[0, row][:, others], before[0, row][:, others])
        keys, values = cache.keys[0, row][None, :, filled], cache.values[0, row][None, :, filled]
        expected = naive_attention(query[row : row + 1], keys, values, mask=0.0, scaling=0.5)
        torch.testing.assert_close(out[row : row + 1], expected, rtol=0, atol=1e-12)
