"""What follows a product, against the naive programs."""

import pytest
import torch

from kernel_cases import DEVICE, check_close, random
from pte.kernels.epilogues import finish_gate_up, finish_qkv, finish_residual
from pte.kernels.operands import Heads, LowRankUpdate, NewToken, padded_rank
from pte.kernels.reference import finish_gate_up_reference, finish_qkv_reference, finish_residual_reference

pytestmark = pytest.mark.system

DTYPES = (torch.float32, torch.bfloat16)
RANKS = (4, 8, 16, 24, 32, 64)


def product_and_update(
    rows: int,
    widths: tuple[int, ...],
    *,
    rank: int | None,
    adapted: tuple[int, ...] | None = None,
    stateless: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, LowRankUpdate | None]:
    """A product with its lows and their update; the lows beyond the rank are zero, as products with padded B are.

    Args:
        rows: Of the product.
        widths: Outputs of each map.
        rank: None for the base alone.
        adapted: Which maps are; None for all.
        stateless: S = I.
        dtype: Of the product.
    """
    outputs = random(rows, sum(widths), seed=1, dtype=dtype)
    if rank is None:
        return outputs, None
    adapted = tuple(range(len(widths))) if adapted is None else adapted
    padded = padded_rank(rank)
    lows = random(rows, len(adapted), padded, seed=2, dtype=dtype)
    lows[:, :, rank:] = 0
    up = random(sum(widths), padded, seed=3, dtype=dtype, scale=rank**-0.5)
    up[:, rank:] = 0
    for index, part in enumerate(up.split(widths)):
        if index not in adapted:
            part.zero_()
    places = tuple(adapted.index(index) if index in adapted else 0 for index in range(len(widths)))
    state = None if stateless else random(rows, rank, rank, seed=4, scale=rank**-0.5)
    return torch.cat((outputs, lows.flatten(1)), dim=1), LowRankUpdate(up, places, state)


def attention_heads(
    query_heads: int, kv_heads: int, *, head_dim: int, norm: bool = False, dtype: torch.dtype = torch.float32
) -> Heads:
    angles = random(50, 2, 1, head_dim, seed=5, dtype=dtype)
    weight = random(2, head_dim, seed=6, dtype=dtype) + 1 if norm else None
    return Heads(query_heads, kv_heads, angles, weight, epsilon=1e-3)


def new_token(rows: int, kv_heads: int, *, head_dim: int, dtype: torch.dtype = torch.float32) -> NewToken:
    """Each row has its own slot and position; keys are stored slot by slot, values head by head."""
    keys = random(rows, 6, kv_heads, head_dim, seed=7, dtype=dtype).transpose(1, 2)
    values = random(rows, kv_heads, 6, head_dim, seed=8, dtype=dtype)
    slots, positions = torch.arange(rows) * 5 % 6, torch.arange(rows) * 7 % 50
    return NewToken(keys, values, slots.to(DEVICE), positions.to(DEVICE))


def check_qkv(
    rows: int,
    *,
    heads: Heads,
    rank: int | None = 8,
    adapted: tuple[int, ...] | None = None,
    stateless: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    widths = tuple(count * heads.head_dim for count in (heads.query_heads, heads.kv_heads, heads.kv_heads))
    product, update = product_and_update(rows, widths, rank=rank, adapted=adapted, stateless=stateless, dtype=dtype)
    ours, theirs = (new_token(rows, heads.kv_heads, head_dim=heads.head_dim, dtype=dtype) for _ in range(2))
    expected = finish_qkv_reference(product, update, heads=heads, token=theirs)
    check_close(finish_qkv(product, update, heads=heads, token=ours), expected)
    # The whole cache: what lies in other slots stays.
    check_close(ours.keys, theirs.keys)
    check_close(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (7, 1)], ids=str)
def test_queries_keys_and_values_are_the_naive_program_s(
    heads: tuple[int, int], norm: bool, dtype: torch.dtype
) -> None:
    check_qkv(3, heads=attention_heads(*heads, head_dim=16, norm=norm, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("head_dim", [4, 12, 32, 64, 128])
def test_heads_of_any_width_rotate_and_are_normed(head_dim: int) -> None:
    check_qkv(2, heads=attention_heads(3, 1, head_dim=head_dim, norm=True))


@pytest.mark.parametrize("rows", [1, 17, 40])
def test_rows_beyond_a_tile_are_their_own(rows: int) -> None:
    check_qkv(rows, heads=attention_heads(2, 1, head_dim=8))


@pytest.mark.parametrize("rank", RANKS)
def test_any_rank_steers_queries_keys_and_values(rank: int) -> None:
    check_qkv(3, heads=attention_heads(2, 1, head_dim=8), rank=rank)


@pytest.mark.parametrize("adapted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_maps_that_are_not_adapted_stay_as_they_are(adapted: tuple[int, ...]) -> None:
    check_qkv(3, heads=attention_heads(2, 1, head_dim=8), adapted=adapted)


@pytest.mark.parametrize(("rank", "stateless"), [(None, False), (8, True)], ids=["base", "lora"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_state_or_an_adapter_nothing_is_steered(
    rank: int | None, stateless: bool, dtype: torch.dtype
) -> None:
    heads = attention_heads(4, 2, head_dim=16, norm=True, dtype=dtype)
    check_qkv(3, heads=heads, rank=rank, stateless=stateless, dtype=dtype)
    for product, update in [product_and_update(3, (37, 37), rank=rank, stateless=stateless, dtype=dtype)]:
        expected = finish_gate_up_reference(product, update, features=37)
        check_close(finish_gate_up(product, update, features=37), expected)
    check_residual(3, 37, rank=rank, stateless=stateless, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features"), [(1, 40), (3, 333), (17, 129), (80, 24)])
def test_the_activation_is_silu_of_the_updated_gate_times_the_updated_up(
    rows: int, features: int, dtype: torch.dtype
) -> None:
    product, update = product_and_update(rows, (features, features), rank=8, dtype=dtype)
    expected = finish_gate_up_reference(product, update, features=features)
    check_close(finish_gate_up(product, update, features=features), expected)


@pytest.mark.parametrize("adapted", [(0,), (1,)], ids=["gate", "up"])
@pytest.mark.parametrize("rank", RANKS)
def test_gate_and_up_may_be_adapted_alone_at_any_rank(rank: int, adapted: tuple[int, ...]) -> None:
    product, update = product_and_update(3, (24, 24), rank=rank, adapted=adapted)
    expected = finish_gate_up_reference(product, update, features=24)
    check_close(finish_gate_up(product, update, features=24), expected)


def check_residual(
    rows: int, hidden: int, *, rank: int | None = 8, stateless: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    product, update = product_and_update(rows, (hidden,), rank=rank, stateless=stateless, dtype=dtype)
    stream, weight = random(rows, hidden, seed=5, dtype=dtype), random(hidden, seed=6, dtype=dtype) + 1
    expected = finish_residual_reference(product, update, residual=stream, weight=weight, epsilon=1e-3)
    summed, normed = finish_residual(product.clone(), update, residual=stream, weight=weight, epsilon=1e-3)
    check_close(summed, expected[0])
    check_close(normed, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (3, 37), (17, 300), (40, 24), (65, 24)])
def test_the_residual_stream_and_its_norm_are_the_naive_program_s(rows: int, hidden: int, dtype: torch.dtype) -> None:
    check_residual(rows, hidden, dtype=dtype)


@pytest.mark.parametrize("rank", RANKS)
def test_any_rank_steers_the_residual(rank: int) -> None:
    check_residual(3, 24, rank=rank)


def test_a_state_may_lie_anywhere_and_nothing_beside_it_is_read() -> None:
    product, update = product_and_update(3, (24, 24), rank=8)
    assert update is not None and update.state is not None
    frame = torch.full((3, 9, 10), float("nan"), device=DEVICE).mT
    state = frame[:, 1:9, :8]
    state.copy_(update.state)
    elsewhere = LowRankUpdate(update.up, update.places, state)
    assert torch.equal(finish_gate_up(product, elsewhere, features=24), finish_gate_up(product, update, features=24))


def test_each_row_reads_its_own_state() -> None:
    product, update = product_and_update(18, (24, 24), rank=8)
    assert update is not None and update.state is not None
    other = update.state.clone()
    other[16] = 0
    changed = finish_gate_up(product, LowRankUpdate(update.up, update.places, other), features=24)
    same = (changed == finish_gate_up(product, update, features=24)).all(1)
    assert same.tolist() == [row != 16 for row in range(18)]
