"""Numbers in eight bits: how weights, activations, keys and values are rounded to float8, and multiplied.

Decides: the one rounding of everything that float8 keeps. A vector (a row of weights, the activation of a token, a
key or a value of one head) becomes e4m3 codes and one scale, the smallest power of two under which its largest number
fits. Codes are floating-point numbers, so that the power of two costs no precision, and it makes code x scale exact in
bfloat16 and wider: a kernel, the rollout's cache and the replay read the same numbers, and rounding twice changes
nothing. Gradients pass as if nothing were rounded. Does not know: models, caches, which walk asks.

Paper: none; one precision for rollout and training is the idea of Jet-RL, arXiv 2601.14243.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
SCALE_BYTES = 2
"""Of a key's or a value's scale in a cache, bfloat16; weights and activations have theirs in float32."""
SMALLEST_EXPONENT = -117
"""Of a scale: the smallest code is 2^-9, and 2^-126 the smallest normal number of bfloat16."""
FIRST_CAPABILITY = (8, 9)
"""The oldest GPUs whose matrix units multiply float8."""
MULTIPLE_OF = 16
"""What the sizes of a matrix must be divisible by for these units."""
ROUNDED_AT_ONCE = 2**24
"""Numbers that are rounded together: 150 MB on the way."""


@dataclass(frozen=True)
class Float8Vectors:
    """What float8 keeps of vectors along the last axis: codes x scales.

    Args:
        codes: e4m3 numbers, at most 448 in size.
        scales: Powers of two, one for each vector.
    """

    codes: Float[Tensor, "*vectors numbers"]
    scales: Float[Tensor, "*vectors"]

    def wide(self, dtype: torch.dtype) -> Float[Tensor, "*vectors numbers"]:
        """The numbers themselves, exact in bfloat16, float32 and float64."""
        return self.codes.to(dtype) * self.scales.to(dtype)[..., None]


def as_bytes(x: Float[Tensor, "*any"]) -> Tensor:
    """The same memory as bytes where it holds codes: to move them is no arithmetic, and not all devices index codes."""
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x


@torch.no_grad()
def to_float8(x: Float[Tensor, "*vectors numbers"]) -> Float8Vectors:
    """Codes and float32 scales of vectors along the last axis, rounded to nearest, ties to even.

    Equals: scale = 2^e with the smallest e >= -117 for which max |x| <= 448 x 2^e, codes = e4m3(x / scale). Many
    vectors are rounded some at a time, because each takes nine bytes a number on the way.
    """
    if x.numel() <= ROUNDED_AT_ONCE:
        return rounded_vectors(x)
    rows = x.reshape(-1, x.shape[-1])
    parts = [rounded_vectors(part) for part in rows.split(max(1, ROUNDED_AT_ONCE // x.shape[-1]))]
    codes = torch.cat([as_bytes(part.codes) for part in parts]).view(FLOAT8)
    return Float8Vectors(codes.view(x.shape), torch.cat([part.scales for part in parts]).view(x.shape[:-1]))


def rounded_vectors(x: Float[Tensor, "*vectors numbers"]) -> Float8Vectors:
    """`to_float8` of all vectors at once."""
    wide = x if x.dtype == torch.float64 else x.float()
    # Taken apart and put together as bits, because a device may round what it computes as a power or a logarithm.
    bits = wide.abs().amax(-1).float().view(torch.int32)
    # 448 is 1.75 x 2^8, and the mantissa of 1.75 is 0x600000.
    exponent = ((bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).int()).clamp(min=SMALLEST_EXPONENT)
    # An infinite scale makes the whole vector not a number; a conversion to codes may hide what is too large for them.
    exponent = torch.where(bits < 0x7F800000, exponent, 128)
    scales = ((exponent + 127) << 23).view(torch.float32)
    return Float8Vectors((wide / scales[..., None]).to(FLOAT8), scales)


def rounded_to_float8(x: Float[Tensor, "*vectors numbers"]) -> Float[Tensor, "*vectors numbers"]:
    """What float8 keeps of x, in x's dtype; the gradient is that of x itself."""
    rounded: Tensor = _Rounded.apply(x)
    return rounded


class _Rounded(torch.autograd.Function):
    """Rounds forwards, passes gradients straight through."""

    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[no-untyped-def, override]
        """What is kept."""
        return to_float8(x).wide(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        """The gradient as it came."""
        return grad


def float8_product(left: Float8Vectors, right: Float8Vectors, *, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
    """left right^T, rounded to `dtype`: what float8's matrix units compute, with a scale for every row and column.

    Equals: the product of the wide numbers, which is how it is computed where there are no such units.

    Args:
        left: One vector for each row.
        right: One vector for each output.
        dtype: Of the product; the units write bfloat16.
    """
    if left.codes.is_cuda and dtype == torch.bfloat16:
        return torch._scaled_mm(
            left.codes,
            right.codes.t(),
            scale_a=left.scales[:, None],
            scale_b=right.scales[None],
            out_dtype=dtype,
            use_fast_accum=False,
        )
    return left.wide(dtype) @ right.wide(dtype).t()


class Float8Linear(nn.Module):
    """W x + bias with the rows of W and every x rounded to float8: a frozen map without a wide copy of its weights.

    The gradient of x is that of the rounded W, as if x were not rounded; W has none.

    Args:
        linear: Whose weights are rounded; the bias stays as it is.
    """

    codes: Float[Tensor, "outputs inputs"]
    scales: Float[Tensor, " outputs"]
    bias: Float[Tensor, " outputs"] | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        rounded = to_float8(linear.weight.detach())
        self.register_buffer("codes", rounded.codes)
        self.register_buffer("scales", rounded.scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def rounded(self) -> Float8Vectors:
        """W, a vector for each output."""
        return Float8Vectors(self.codes, self.scales)

    def multiplied(self, x: Float8Vectors, *, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """The map of activations that are rounded already, so that maps with a common input share the rounding."""
        product = float8_product(x, self.rounded, dtype=dtype)
        return product if self.bias is None else product + self.bias

    def forward(self, x: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        """The map of any number of axes, in the dtype of x."""
        product: Tensor = _Product.apply(x, self)
        return product


class _Product(torch.autograd.Function):
    """W x + bias forwards, W^T times the gradient backwards."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: Float8Linear):  # type: ignore[no-untyped-def, override]
        """The map."""
        ctx.linear = linear
        rows = linear.multiplied(to_float8(x.reshape(-1, x.shape[-1])), dtype=x.dtype)
        return rows.view(*x.shape[:-1], linear.out_features)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        """Through the rounded weights."""
        return grad @ ctx.linear.rounded.wide(grad.dtype), None


def float8_refusal(device: torch.device) -> str | None:
    """Why a device does not compute in float8, with the remedy; None where it does, on the CPU by emulation."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"dtype float8 needs an NVIDIA GPU, got {device.type}; use dtype bfloat16"
    if torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"dtype float8 needs compute capability 8.9 or newer, got {name}; use dtype bfloat16"
    return None
