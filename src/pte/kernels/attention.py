"""Attention of one new token a row over the filled slots of its cache, in one kernel or two.

Decides: tiles and splits. The kernel streams keys and values once, so it is bound by memory: a tile of slots is 8 KB
of keys and as much of values (32 slots of 128 channels in bfloat16), three tiles are in shared memory and four programs
fit on a multiprocessor; a program serves all heads of one group. Where rows times key heads are fewer than two programs
a multiprocessor, the filled slots of a row are split evenly among several programs and a second kernel combines them.
How many is decided from the allocated size alone, so that a captured graph stays valid; the filled part is divided on
the device.
Does not know: models, states, where keys were written. Equals `decode_attention_reference`.

Paper: pi^D(y_t | C_t^D), for one t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from pte.kernels.attention_programs import attend, combine
from pte.kernels.launch import check_dtype, multiprocessors

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

PROGRAMS_PER_MULTIPROCESSOR = 2
WIDE_HEAD_BYTES = 256
"""Heads of more bytes get tiles of 16 slots instead of 32."""
STAGES = 7
"""Steps of the pipeline: what is loaded depends on the positions, so that two steps make one tile in flight."""


def filled_ends(positions: Int[Tensor, "batch slots"]) -> Int[Tensor, " batch"]:
    """One past the last filled slot of each row, 0 for an empty one: the same for all layers of a step."""
    places = torch.arange(1, positions.shape[1] + 1, dtype=torch.int32, device=positions.device)
    return torch.where(positions >= 0, places, 0).amax(1)


def decode_attention(
    query: Float[Tensor, "batch heads head_dim"],
    keys: Float[Tensor, "batch kv_heads slots head_dim"],
    *,
    values: Float[Tensor, "batch kv_heads slots head_dim"],
    positions: Int[Tensor, "batch slots"],
    ends: Int[Tensor, " batch"],
    scaling: float,
    scales: tuple[Float[Tensor, "batch kv_heads slots"], Float[Tensor, "batch kv_heads slots"]] | None = None,
) -> Float[Tensor, "batch heads head_dim"]:
    """softmax(scaling q k^T) v over the slots whose position is not negative; zero where a row has none.

    Args:
        query: Post-rotary queries, contiguous.
        keys: Post-rotary keys; their heads are shared by heads / kv_heads query heads each. Any memory order.
        values: Likewise.
        positions: Absolute position of the token in each slot, -1 where empty.
        ends: `filled_ends(positions)`.
        scaling: Factor on the scores.
        scales: Of keys and of values that are float8 codes, slots side by side; None for plain ones.

    Raises:
        ValueError: A dtype that the matrix units do not have.
    """
    check_dtype(query.dtype)
    batch, heads, head_dim = query.shape
    kv_heads, slots = keys.shape[1:3]
    block_dim = max(16, triton.next_power_of_2(head_dim))
    block_slots = 32 if block_dim * query.element_size() <= WIDE_HEAD_BYTES else 16
    splits = num_splits(batch * kv_heads, triton.cdiv(slots, block_slots), device=query.device)
    attended = torch.empty_like(query)
    parts = (batch, heads, splits) if splits > 1 else (0,)
    largest, total = (torch.empty(parts, dtype=torch.float32, device=query.device) for _ in range(2))
    weighted = torch.empty((*parts, head_dim), dtype=torch.float32, device=query.device)
    attend[(batch * kv_heads, splits)](
        query,
        keys,
        values,
        positions,
        ends,
        attended,
        largest,
        total,
        weighted,
        *keys.stride(),
        *values.stride(),
        *(scales or (keys, values)),
        *((0, 0, 0, 0) if scales is None else (*scales[0].stride()[:2], *scales[1].stride()[:2])),
        positions.stride(0),
        scaling,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        SPLITS=splits,
        BLOCK_GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_SLOTS=block_slots,
        BLOCK_DIM=block_dim,
        FLOAT8=scales is not None,
        num_warps=4,
        num_stages=STAGES,
    )
    if splits > 1:
        combine[(batch * heads,)](
            largest,
            total,
            weighted,
            attended,
            SPLITS=splits,
            HEAD_DIM=head_dim,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            BLOCK_DIM=block_dim,
            num_warps=4,
        )
    return attended


def num_splits(pairs: int, tiles: int, *, device: torch.device) -> int:
    """Programs that share the slots of a row.

    Args:
        pairs: Rows times key heads.
        tiles: Of the allocated slots.
        device: Whose multiprocessors are to be busy.
    """
    wanted = round(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) / pairs)
    return max(1, min(wanted, tiles))
