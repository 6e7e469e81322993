"""What follows each large product of a layer, as one kernel: updates, norms, rotations, activation, residual.

Decides: how much work a program gets. State and A are read from the second-level cache by every program that needs
them, and traffic is what they cost: with 16 rows a tile, A is read once for 16 rows and a row's S (4 KB at rank 32)
once for each program of its tile. So there is about one program a multiprocessor, each looping over columns: at batch
128 and 2 x 18944 columns S costs 8 MB a layer instead of 78 with a program for every tile. A norm needs whole rows:
about 32 programs share them, so that A is read 32 times at most.
Does not know: models, what made the product. Each function names the naive program of `reference.py` that it equals.

Paper: theta' = theta + A S_e B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from pte.kernels.epilogue_programs import finish_gate_up_program, finish_qkv_program, finish_residual_program
from pte.kernels.launch import check_dtype, multiprocessors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from pte.kernels.operands import Heads, LowRankUpdate, NewToken

TILE_ROWS = 16
GATE_UP_TILE = (128, 2**13)
"""Columns of a tile at most, and bytes of A in it at most: two such tiles times three in flight are 48 KB."""
RESIDUAL_TILE = (256, 2**14)
"""Likewise, with one such tile times four."""
RESIDUAL_PROGRAMS = 32
STATE_TILE_NUMBERS = 16384
"""Numbers of S that a program holds at once: 64 registers a thread."""
WHOLE_ROW_NUMBERS = 16384
"""Numbers of whole rows that a program normalises at once: likewise."""


def finish_qkv(
    product: Float[Tensor, "batch columns"], update: LowRankUpdate | None, *, heads: Heads, token: NewToken
) -> Float[Tensor, "batch query_heads head_dim"]:
    """Rotated queries; rotated keys and values go into the slots of the new token, as codes where these have scales.

    Equals: `finish_qkv_reference`; codes and scales are those of `pte.method.float8.to_float8`.

    Args:
        product: Queries, keys and values of all heads, then the lows.
        update: Of the three maps, or None for the base alone.
        heads: Their number, norm and rotations.
        token: Where keys and values go.

    Raises:
        ValueError: A dtype that the matrix units do not have.
    """
    check_dtype(product.dtype)
    batch = product.shape[0]
    row_tiles = triton.cdiv(batch, TILE_ROWS)
    counts = (heads.query_heads, heads.kv_heads, heads.kv_heads)
    per_program = triton.cdiv(row_tiles * sum(counts), multiprocessors(product.device))
    query = product.new_empty(batch, heads.query_heads, heads.head_dim)
    finish_qkv_program[(row_tiles, sum(triton.cdiv(count, per_program) for count in counts))](
        product,
        product.stride(0),
        *update_tensors(product, update),
        product if heads.norm is None else heads.norm,
        heads.rotations,
        token.positions,
        token.slots,
        query,
        token.keys,
        token.values,
        *token.keys.stride(),
        *token.values.stride(),
        *(token.scales or (token.keys, token.values)),
        *((0, 0, 0, 0) if token.scales is None else (*token.scales[0].stride()[:2], *token.scales[1].stride()[:2])),
        heads.epsilon,
        batch,
        per_program,
        QUERY_HEADS=heads.query_heads,
        KV_HEADS=heads.kv_heads,
        HEAD_DIM=heads.head_dim,
        **places_of(update, ("QUERY_PLACE", "KEY_PLACE", "VALUE_PLACE")),
        **rank_blocks(update),
        HAS_NORM=heads.norm is not None,
        FLOAT8=token.scales is not None,
        BLOCK_ROWS=TILE_ROWS,
        BLOCK_HALF=max(16, triton.next_power_of_2(heads.head_dim // 2)),
        num_warps=8,
    )
    return query


def finish_gate_up(
    product: Float[Tensor, "batch columns"], update: LowRankUpdate | None, *, features: int
) -> Float[Tensor, "batch features"]:
    """silu(gate) * up.

    Equals: `finish_gate_up_reference`.

    Args:
        product: Gate and up of all features, then the lows.
        update: Of the two maps, or None for the base alone.
        features: Outputs of each of the two.

    Raises:
        ValueError: A dtype that the matrix units do not have.
    """
    check_dtype(product.dtype)
    batch = product.shape[0]
    columns = tile_columns(update, GATE_UP_TILE)
    row_tiles, column_tiles = triton.cdiv(batch, TILE_ROWS), triton.cdiv(features, columns)
    per_program = triton.cdiv(column_tiles, max(1, multiprocessors(product.device) // row_tiles))
    activated = product.new_empty(batch, features)
    finish_gate_up_program[(row_tiles, triton.cdiv(column_tiles, per_program))](
        product,
        product.stride(0),
        *update_tensors(product, update),
        activated,
        batch,
        features,
        per_program * columns,
        **places_of(update, ("GATE_PLACE", "UP_PLACE")),
        **rank_blocks(update),
        BLOCK_ROWS=TILE_ROWS,
        BLOCK_COLUMNS=columns,
        num_warps=8,
    )
    return activated


def finish_residual(
    product: Float[Tensor, "batch columns"],
    update: LowRankUpdate | None,
    *,
    residual: Float[Tensor, "batch hidden"],
    weight: Float[Tensor, " hidden"],
    epsilon: float,
) -> tuple[Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]]:
    """The residual stream after a block, and its norm, which the next block reads.

    Equals: `finish_residual_reference`. The product is used up: its outputs get the update in place.

    Args:
        product: Outputs of the block's last map, then the low.
        update: Of that map, or None for the base alone.
        residual: The stream before, contiguous.
        weight: Of the norm.
        epsilon: Of the norm.

    Raises:
        ValueError: A dtype that the matrix units do not have.
    """
    check_dtype(product.dtype)
    batch, hidden = residual.shape
    block_hidden = triton.next_power_of_2(hidden)
    shared = 1 if update is None else triton.next_power_of_2(triton.cdiv(batch, RESIDUAL_PROGRAMS))
    rows = max(1, min(shared, TILE_ROWS, WHOLE_ROW_NUMBERS // block_hidden))
    summed, normed = torch.empty_like(residual), torch.empty_like(residual)
    finish_residual_program[(triton.cdiv(batch, rows),)](
        product,
        product.stride(0),
        *update_tensors(product, update),
        residual,
        weight,
        summed,
        normed,
        batch,
        hidden,
        epsilon,
        **places_of(update, ("PLACE",)),
        **rank_blocks(update),
        ROWS=rows,
        BLOCK_ROWS=TILE_ROWS,
        BLOCK_COLUMNS=tile_columns(update, RESIDUAL_TILE),
        BLOCK_HIDDEN=block_hidden,
        num_warps=8,
    )
    return summed, normed


def tile_columns(update: LowRankUpdate | None, limits: tuple[int, int]) -> int:
    """Columns of a tile, a power of two.

    Args:
        update: Whose A is to fit.
        limits: Columns at most, bytes of A at most.
    """
    most, most_bytes = limits
    return most if update is None else max(16, min(most, most_bytes // (update.up.shape[1] * update.up.element_size())))


def update_tensors(product: Tensor, update: LowRankUpdate | None) -> tuple[Tensor, Tensor, int, int, int]:
    """A, S and the strides of S, as the programs take them; the product stands in for what is not there."""
    if update is None:
        return product, product, 0, 0, 0
    if update.state is None:
        return update.up, product, 0, 0, 0
    row, out, into = update.state.stride()
    return update.up, update.state, row, out, into


def places_of(update: LowRankUpdate | None, names: tuple[str, ...]) -> dict[str, int]:
    """Which low each map multiplies with."""
    return dict.fromkeys(names, 0) if update is None else dict(zip(names, update.places, strict=True))


def rank_blocks(update: LowRankUpdate | None) -> dict[str, int | bool]:
    """How the programs cut the rank; CHUNK is how much of S's inner axis is held at once."""
    block = 16 if update is None else update.up.shape[1]
    state = None if update is None else update.state
    return {
        "RANK": block if state is None else state.shape[-1],
        "BLOCK_RANK": block,
        "CHUNK": max(1, min(block, STATE_TILE_NUMBERS // (TILE_ROWS * block))),
        "HAS_UPDATE": update is not None,
        "HAS_STATE": state is not None,
    }
