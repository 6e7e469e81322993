"""The device programs that round to float8: the scale of a vector, its codes, and rows of activations.

Scales are powers of two, put together from their bits, so that multiplying with one or with its inverse is exact.
"""

import triton
import triton.language as tl


@triton.jit
def scale_and_inverse(largest):
    """The smallest power of two from 2^-117 on under which the largest number is at most 448, and its inverse."""
    bits = largest.to(tl.int32, bitcast=True)
    # 448 is 1.75 x 2^8, and the mantissa of 1.75 is 0x600000.
    exponent = (bits >> 23) - 135 + tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.maximum(exponent, -117)
    overflows = bits >= 0x7F800000
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(overflows, float("inf"), scale), tl.where(overflows, float("nan"), inverse)


@triton.jit
def codes_of(x, inverse):
    """e4m3 numbers nearest to x under a scale."""
    return (x.to(tl.float32) * inverse).to(tl.float8e4nv)


@triton.jit
def round_rows_program(x, codes, scales, x_row, columns, BLOCK: tl.constexpr):
    """Program (row): its codes and its scale."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < columns
    numbers = tl.load(x + row * x_row + places, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_and_inverse(tl.max(tl.abs(numbers), axis=0))
    tl.store(codes + row * columns + places, codes_of(numbers, inverse), mask=inside)
    tl.store(scales + row, scale)
