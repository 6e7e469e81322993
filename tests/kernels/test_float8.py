"""Float8 in the kernels: rows, heads and attention, against `pte.method.float8` and the kernels on wide numbers."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import DEVICE, check_close, random
from pte.kernels.attention import decode_attention, filled_ends
from pte.kernels.epilogues import finish_qkv
from pte.kernels.float8 import rounded_rows
from pte.kernels.operands import Heads, NewToken
from pte.method.float8 import FLOAT8, Float8Vectors, to_float8

pytestmark = pytest.mark.system


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 16, 24, 130])
def test_rows_are_rounded_as_the_definition_rounds_them(columns: int, dtype: torch.dtype) -> None:
    x = random(11, columns, seed=1) * torch.logspace(-37, 37, 11, device=DEVICE)[:, None]
    x[3] = 0
    x[4, 0], x[5, 0], x[6] = 448.0, 448.1, 17.0  # fits as it is, does not fit, a tie
    x = x.to(dtype)
    expected = to_float8(x)
    codes, scales = rounded_rows(x)
    assert torch.equal(scales, expected.scales)
    assert torch.equal(codes.float(), expected.codes.float())


def test_rows_may_lie_apart_and_what_overflows_is_not_a_number_in_its_row_alone() -> None:
    x = random(3, 40, seed=2)[:, :24]
    x[1, 5] = float("inf")
    codes, scales = rounded_rows(x)
    wide = Float8Vectors(codes, scales).wide(torch.float32)
    assert wide[1].isnan().all()
    rest = torch.tensor([0, 2], device=DEVICE)
    assert torch.equal(wide[rest], to_float8(x[rest]).wide(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "rows"), [((2, 2), 3), ((7, 1), 1), ((4, 2), 17)], ids=str)
def test_attention_over_codes_is_that_over_the_numbers_they_stand_for(
    heads: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    slots, head_dim = 70, 16
    positions = torch.arange(slots, device=DEVICE).repeat(rows, 1)
    positions[:, 40:50] = -1
    positions[0, 3:] = -1
    stored = [to_float8(random(rows, heads[1], slots, head_dim, seed=seed) * 3) for seed in (2, 3)]
    query = random(rows, heads[0], head_dim, seed=1, dtype=dtype)
    options = {"positions": positions, "ends": filled_ends(positions), "scaling": 0.25}
    keys, values = (one.wide(dtype) for one in stored)
    expected = decode_attention(query, keys, values=values, **options)
    empty = (positions < 0)[:, None]
    # What lies in an empty slot is read by nobody.
    scales = tuple(one.scales.to(torch.bfloat16).masked_fill(empty, float("nan")) for one in stored)
    keys, values = (one.codes for one in stored)
    ours = decode_attention(query, keys, values=values, scales=scales, **options)
    # Powers of two and codes of four bits: nothing is rounded that was not rounded before.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "norm"), [((4, 2), 16, False), ((3, 1), 12, True)])
def test_keys_and_values_of_a_new_token_are_written_as_codes_and_scales(
    heads: tuple[int, int], head_dim: int, norm: bool, dtype: torch.dtype
) -> None:
    rows, slots = 18, 6
    product = random(rows, (heads[0] + 2 * heads[1]) * head_dim, seed=1, dtype=dtype)
    weight = random(2, head_dim, seed=6, dtype=dtype) + 1 if norm else None
    described = Heads(*heads, random(50, 2, 1, head_dim, seed=5, dtype=dtype), weight, epsilon=1e-3)
    places = (torch.arange(rows) * 5 % slots).to(DEVICE), (torch.arange(rows) * 7 % 50).to(DEVICE)
    size = (rows, heads[1], slots, head_dim)
    plain = NewToken(*(torch.zeros(size, dtype=dtype, device=DEVICE) for _ in range(2)), *places)
    codes = [torch.zeros(size, dtype=FLOAT8, device=DEVICE) for _ in range(2)]
    scales = tuple(torch.full(size[:3], 3.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    expected_query = finish_qkv(product, None, heads=described, token=plain)
    query = finish_qkv(product, None, heads=described, token=NewToken(*codes, *places, scales))
    check_close(query, expected_query)
    written = torch.zeros(size[:3], dtype=torch.bool, device=DEVICE)
    written[torch.arange(rows), :, places[0]] = True
    for ours, own_scales, wide in zip(codes, scales, (plain.keys, plain.values), strict=True):
        expected = to_float8(wide)
        assert torch.equal(own_scales[written].float(), expected.scales[written])
        assert torch.equal(ours[written].float(), expected.codes[written].float())
        assert (own_scales[~written] == 3).all() and not ours.view(torch.uint8)[~written].any(), "others stay"
