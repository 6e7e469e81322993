"""Rows of activations rounded to float8 in one kernel: what a product of float8 weights multiplies with.

Decides: a program for each row, which it holds whole. Does not know: weights, why e4m3 and powers of two.

Paper: none; `pte.method.float8` has the definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from pte.kernels.float8_programs import round_rows_program
from pte.kernels.launch import check_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

WIDE_ROW = 8192
"""Numbers of a row from which on a program takes 16 warps."""


def rounded_rows(
    x: Float[Tensor, "rows columns"],
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"]]:
    """e4m3 codes and float32 scales of every row.

    Equals: `pte.method.float8.to_float8`.

    Args:
        x: Rows whose numbers lie side by side.

    Raises:
        ValueError: A dtype that the matrix units do not have.
    """
    check_dtype(x.dtype)
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    round_rows_program[(rows,)](
        x,
        codes,
        scales,
        x.stride(0),
        columns,
        BLOCK=triton.next_power_of_2(columns),
        num_warps=16 if columns >= WIDE_ROW else 4,
    )
    return codes, scales
