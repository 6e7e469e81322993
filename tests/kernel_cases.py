"""Where tests run the kernels: on the GPU where there is one, else on the CPU in triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux")
language = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

plain_patch, plain_convert, plain_dot = (
    interpreter._patch_lang_tensor,
    interpreter._convert_float,
    interpreter.InterpreterBuilder.create_dot,
)


def patch_tensor(tensor: type, scope: object) -> None:
    """As the interpreter does, but loop bounds are integers with NumPy 2.4 too, whose int() refuses arrays of one."""
    plain_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def convert_float(numbers: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
    """As a GPU does: to the nearest bfloat16, where the interpreter cuts digits off; ties of float8 to the even one."""
    if source == language.float32 and target == language.float8e4nv:
        wide = torch.from_numpy(np.ascontiguousarray(numbers).view(np.float32))
        return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if source == language.float8e4nv:
        wide = torch.from_numpy(np.ascontiguousarray(numbers).view(np.uint8)).view(torch.float8_e4m3fn).float()
        bits = wide.numpy().view(np.uint32)
        return bits if target == language.float32 else convert_float(bits, language.float32, target, mode)
    bits = np.ascontiguousarray(numbers).view(f"uint{source.primitive_bitwidth}")
    if source == language.bfloat16 and target == language.float32:
        return bits.astype(np.uint32) << 16
    if source == language.float32 and target == language.bfloat16:
        return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return plain_convert(numbers, source, target, mode)


def widened(x: object) -> object:
    """bfloat16 numbers as float32."""
    if x.dtype.scalar != language.bfloat16:
        return x
    bits = convert_float(x.data, language.bfloat16, language.float32, None)
    return interpreter.TensorHandle(bits.view(np.float32), language.float32)


def dot(self: object, a: object, b: object, *rest: object) -> object:
    """The product of bfloat16 numbers, where the interpreter multiplies their bits."""
    return plain_dot(self, widened(a), widened(b), *rest)


interpreter._patch_lang_tensor = patch_tensor
interpreter._convert_float = convert_float
interpreter.InterpreterBuilder.create_dot = dot


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def check_close(ours: torch.Tensor, theirs: torch.Tensor, *, digits: float = 0.02) -> None:
    """float32 to the order of sums; half precision to a last digit here and there.

    Args:
        ours: Of a kernel.
        theirs: Of the naive program.
        digits: By how many last digits numbers in half precision may differ on average. Single ones may by four, of a
            quarter of the largest for small numbers, which may be differences of large ones.
    """
    assert ours.dtype == theirs.dtype and theirs.float().std() > 0
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    else:
        difference = (ours.float() - theirs.float()).abs() / torch.finfo(ours.dtype).eps
        size = theirs.float().abs()
        assert (difference <= 4 * size.clamp(min=size.max().item() / 4)).all(), difference.max()
        assert difference.mean() <= digits * size.mean(), difference.mean() / size.mean()
