"""Rounding to float8 and the products of it, against a table of all codes and sums in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from float8_reference import CODES, nearest_code, rounded_vector
from live_bytes import LiveBytes
from pte.method.float8 import Float8Linear, as_bytes, float8_product, rounded_to_float8, to_float8

NUMBERS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_a_vector_keeps_what_the_nearest_codes_under_the_smallest_fitting_power_of_two_say(
    numbers: list[float],
) -> None:
    kept = rounded_to_float8(torch.tensor(numbers, dtype=torch.float64))
    assert kept.tolist() == rounded_vector(numbers)


def test_the_table_of_the_reference_is_that_of_the_hardware_format() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert sorted(set(codes[codes.isfinite()].tolist())) == CODES
    # A tie goes to the code with an even last bit: 17 lies between 16 = 1.000 and 18 = 1.001 x 2^4.
    assert nearest_code(17.0) == 16.0 and nearest_code(19.0) == 20.0


@pytest.mark.parametrize(
    ("largest", "scale"),
    # 448 fits as it is; the next number needs the next power of two; 448 x 2^-117 is the last that is not cut short.
    [(448.0, 1.0), (448.01, 2.0), (1.75, 2.0**-8), (1.7501, 2.0**-7), (0.0, None), (1e-38, 2.0**-117)],
)
def test_the_scale_is_the_smallest_power_of_two_under_which_the_largest_number_fits(
    largest: float, scale: float | None
) -> None:
    rounded = to_float8(torch.tensor([[largest, -largest / 3]]))
    if scale is None:
        assert not rounded.wide(torch.float32).any(), "zero stays zero whatever the scale"
    else:
        assert rounded.scales.tolist() == [scale]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_float8_keeps_is_exact_in_every_dtype_that_computes_and_rounding_again_changes_nothing(
    dtype: torch.dtype,
) -> None:
    x = torch.randn(64, 32, dtype=torch.float64) * torch.logspace(-30, 30, 64, dtype=torch.float64)[:, None]
    rounded = to_float8(x)
    kept = rounded.wide(dtype)
    assert torch.equal(kept.double(), rounded.wide(torch.float64))
    again = to_float8(kept)
    assert torch.equal(again.wide(torch.float64), rounded.wide(torch.float64))
    # Three bits behind the leading one: a normal code is at most 1/16 away.
    normal = x.abs() >= 2.0**-6 * rounded.scales[:, None].double()
    assert ((kept.double() - x).abs() <= x.abs() / 16)[normal].all() and normal.float().mean() > 0.9


def test_many_vectors_are_rounded_as_few_are_in_little_more_memory_than_their_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(3, 700, 32, dtype=torch.bfloat16).transpose(0, 1) * torch.logspace(-9, 9, 32)
    x = x.bfloat16()
    expected = to_float8(x)
    monkeypatch.setattr("pte.method.float8.ROUNDED_AT_ONCE", 1000)
    with LiveBytes() as rounding:
        found = to_float8(x)
    assert found.codes.shape == x.shape and torch.equal(as_bytes(found.codes), as_bytes(expected.codes))
    assert torch.equal(found.scales, expected.scales)
    # Codes and scales, the parts that they are put together from, and nine bytes for each of the last 1000 numbers.
    kept = found.codes.nbytes + found.scales.nbytes
    assert rounding.peak <= 2 * kept + x.nbytes * (not x.is_contiguous()) + 10 * 1000
    assert to_float8(x[:0]).codes.shape == x[:0].shape


def test_a_map_multiplies_rounded_weights_with_rounded_activations_and_its_gradient_passes_straight_through() -> None:
    linear = nn.Linear(5, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    rounded = Float8Linear(linear)
    out = rounded(x)
    weight = [rounded_vector(row) for row in linear.weight.tolist()]
    for row, output in zip(x.detach().flatten(0, 1).tolist(), out.detach().flatten(0, 1).tolist(), strict=True):
        entering = rounded_vector(row)
        for place, (own, bias) in enumerate(zip(weight, linear.bias.tolist(), strict=True)):
            expected = sum(a * b for a, b in zip(own, entering, strict=True)) + bias
            assert output[place] == pytest.approx(expected, abs=1e-14)
    wanted = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, wanted)
    torch.testing.assert_close(grad, wanted @ torch.tensor(weight, dtype=torch.float64), rtol=0, atol=1e-14)


def test_maps_that_share_an_input_share_its_rounding_and_give_what_each_gives_alone() -> None:
    maps = [Float8Linear(nn.Linear(6, outputs, bias=bias)) for outputs, bias in ((4, True), (2, False))]
    x = torch.randn(3, 6)
    shared = to_float8(x)
    for linear in maps:
        assert torch.equal(linear.multiplied(shared, dtype=torch.float32), linear(x))


def test_the_gradient_of_what_is_kept_is_that_of_the_numbers_themselves() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    wanted = torch.randn(3, 4)
    (grad,) = torch.autograd.grad(rounded_to_float8(x), x, wanted)
    assert torch.equal(grad, wanted)


def test_a_product_equals_that_of_the_wide_numbers() -> None:
    left, right = to_float8(torch.randn(3, 8)), to_float8(torch.randn(5, 8))
    expected = left.wide(torch.float64) @ right.wide(torch.float64).t()
    torch.testing.assert_close(float8_product(left, right, dtype=torch.float64), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_overflows_is_not_a_number_in_its_vector_and_nowhere_else(bad: float) -> None:
    kept = rounded_to_float8(torch.tensor([[1.0, bad], [1.0, 2.0]]))
    assert kept[0].isnan().all() and torch.equal(kept[1], torch.tensor([1.0, 2.0]))
