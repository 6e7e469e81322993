"""FLOPs of a piece of work, counted as its operations run, not estimated.

Decides: what counts. A matrix product of (m, k) and (k, n) is 2 m k n, attention is its two products over all slots
that the kernel is given, masked ones included, its backward is torch's convention of five such products, solving a
triangular system of (m, m) for (m, n) is m m n, and whatever is computed a second time in a backward pass counts a
second time.
Not counted, as in torch's counter: everything elementwise (norms, softmax, rotations, activations, sampling, the
optimizer), look-ups, copies. torch 2.13 counts neither the attention kernel of the CPU nor products added in place, as
a decode step makes them, nor triangular systems, as rule `delta` solves them, so their formulas are added here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

if TYPE_CHECKING:
    from torch._ops import OpOverloadPacket

Shape = tuple[int, ...]


def added_product_flops(_total: Shape, left: Shape, right: Shape, **_keywords: object) -> int:
    """Of a matrix product that is added in place."""
    return math.prod(left) * right[1] * 2


def triangular_system_flops(matrix: Shape, wanted: Shape, **_keywords: object) -> int:
    """Of solving a triangular system: half of a product of the same matrices."""
    return math.prod(wanted) * matrix[-1]


def cpu_attention_flops(query: Shape, key: Shape, value: Shape, *_rest: object, **_keywords: object) -> int:
    """Of the CPU's attention kernel."""
    return sdpa_flop_count(query, key, value)


def cpu_attention_backward_flops(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_rest: object, **_keywords: object
) -> int:
    """Of its backward."""
    return sdpa_backward_flop_count(grad, query, key, value)


def counted_flops(work: Callable[[], object]) -> int:
    """FLOPs of `work`, its backward passes included."""
    formulas: dict[OpOverloadPacket, Callable[..., int]] = {
        torch.ops.aten.addmm_: added_product_flops,
        torch.ops.aten.linalg_solve_triangular: triangular_system_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:  # type: ignore[arg-type]
        work()
    return counter.get_total_flops()
