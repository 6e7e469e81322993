"""The attention kernels against softmax over the filled slots in float64."""

import pytest
import torch

from kernel_cases import DEVICE, check_close, random
from pte.kernels.attention import decode_attention, filled_ends, num_splits
from pte.kernels.reference import decode_attention_reference

pytestmark = pytest.mark.system

SLOTS = 70
# Ragged prompts in 20 slots, then a window: nothing in it, full, with holes where a block left, with a few tokens, and
# one whose prompt leaves a whole tile of 32 slots empty before the window's tokens.
HELD = torch.full((5, SLOTS), -1)
HELD[0, :3] = torch.arange(3)
HELD[1] = torch.arange(SLOTS)
HELD[2, :17] = torch.arange(17)
HELD[2, 20:36] = torch.arange(80, 96)
HELD[2, 52:] = torch.arange(60, 78)
HELD[3, :20] = torch.arange(20)
HELD[3, 20:25] = torch.arange(20, 25)
HELD[4, 40:60] = torch.arange(40, 60)


def both(
    rows: int, *, heads: tuple[int, int], head_dim: int, dtype: torch.dtype = torch.float32, held: torch.Tensor = HELD
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result and the reference's; empty slots hold what nobody may read."""
    positions = held.repeat(-(-rows // len(held)), 1)[-rows:].to(DEVICE)
    query = random(rows, heads[0], head_dim, seed=1, dtype=dtype)
    shape = (rows, heads[1], positions.shape[1], head_dim)
    empty = (positions < 0)[:, None, :, None]
    keys, values = (random(*shape, seed=seed, dtype=dtype).masked_fill(empty, float("nan")) for seed in (2, 3))
    ours = decode_attention(
        query, keys, values=values, positions=positions, ends=filled_ends(positions), scaling=head_dim**-0.5
    )
    expected = decode_attention_reference(
        query, keys.nan_to_num(), values=values.nan_to_num(), positions=positions, scaling=head_dim**-0.5
    )
    return ours, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (7, 1), (14, 2)], ids=str)
def test_attention_is_the_softmax_over_filled_slots(heads: tuple[int, int], dtype: torch.dtype) -> None:
    # Weights are rounded before they multiply the values; the reference rounds nothing.
    check_close(*both(5, heads=heads, head_dim=16, dtype=dtype), digits=0.3)


@pytest.mark.parametrize("head_dim", [4, 24, 32, 64, 128, 256])
def test_heads_of_any_width_are_attended(head_dim: int) -> None:
    check_close(*both(2, heads=(2, 1), head_dim=head_dim))


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_rows_are_split_among_programs_only_where_they_are_few(rows: int) -> None:
    wanted = num_splits(rows, 3, device=DEVICE)
    assert (wanted == 1) == (rows > 100) or DEVICE.type == "cpu"
    check_close(*both(rows, heads=(2, 1), head_dim=16))


def test_one_split_or_many_are_one_softmax() -> None:
    splits = {num_splits(pairs, 3, device=torch.device("cpu")) for pairs in (1, 3, 4, 8, 100)}
    assert splits == {3, 2, 1}


def test_few_slots_in_a_long_cache_are_divided_among_all_programs() -> None:
    # 40 tokens in 640 slots: the second split begins after the first tile, not after half of the slots.
    held = torch.full((1, 640), -1)
    held[0, :40] = torch.arange(40)
    check_close(*both(1, heads=(2, 2), head_dim=16, held=held))


def test_keys_may_lie_in_any_memory_order() -> None:
    positions = HELD.to(DEVICE)
    query = random(5, 4, 16, seed=1)
    slots_first = (random(5, SLOTS, 2, 16, seed=2).transpose(1, 2), random(5, 16, 2, SLOTS, seed=3).permute(0, 2, 3, 1))
    expected = decode_attention_reference(
        query, slots_first[0], values=slots_first[1], positions=positions, scaling=0.3
    )
    ours = decode_attention(
        query,
        slots_first[0],
        values=slots_first[1],
        positions=positions,
        ends=filled_ends(positions),
        scaling=0.3,
    )
    check_close(ours, expected)


def test_a_row_without_any_token_is_zero_and_leaves_its_neighbours_alone() -> None:
    held = HELD.clone()
    held[0] = -1
    ours, expected = both(5, heads=(4, 2), head_dim=16, held=held)
    assert torch.equal(ours[0], torch.zeros_like(ours[0]))
    check_close(ours[1:], expected[1:])


def test_ends_are_one_past_the_last_filled_slot() -> None:
    empty, first = torch.full((1, SLOTS), -1), torch.full((1, SLOTS), -1)
    first[0, 0] = 0
    assert filled_ends(torch.cat((HELD, empty, first))).tolist() == [3, 70, 70, 25, 60, 0, 1]


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels compute in bfloat16, float16, float32, got torch.float64"):
        both(1, heads=(2, 1), head_dim=16, dtype=torch.float64)
