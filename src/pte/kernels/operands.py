"""What the kernels work on: the low-rank update of a product, the heads of a layer, the place of a new token.

Decides: how a product and what updates it lie in memory. A product holds the outputs of all maps that read one input,
then, for each adapted one, B x padded to `padded_rank` numbers, so that one matrix product makes both.
Does not know: models, kernels.

Paper: theta' = theta + A S_e B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """scale * A (S low) for every map of a product.

    Args:
        up: scale * A of all maps, one under the other; zero where a map is not adapted and beyond the rank.
        places: Which of the product's lows each map multiplies with; any for a map that is not adapted.
        state: S of every row, float32, or None for S = I.
    """

    up: Float[Tensor, "outputs padded_rank"]
    places: tuple[int, ...]
    state: Float[Tensor, "batch rank rank"] | None


@dataclass(frozen=True)
class Heads:
    """What becomes of queries, keys and values between their product and the attention.

    Args:
        query_heads: Heads of the query.
        kv_heads: Heads of keys and of values.
        rotations: Cosines and signed sines of positions 0, 1, ...
        norm: Weight of the norm of each query head and of each key head, or None without such norms.
        epsilon: Of that norm.
    """

    query_heads: int
    kv_heads: int
    rotations: Float[Tensor, "positions 2 1 head_dim"]
    norm: Float[Tensor, "2 head_dim"] | None
    epsilon: float

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.rotations.shape[-1]


@dataclass(frozen=True)
class NewToken:
    """Where the new token of every row goes in one layer.

    Args:
        keys: Of the layer's cache, in any memory order.
        values: Likewise.
        slots: Slot of each new token.
        positions: Absolute position of each new token.
        scales: Of keys and of values that are float8 codes, slots side by side; None for plain ones.
    """

    keys: Float[Tensor, "batch kv_heads slots head_dim"]
    values: Float[Tensor, "batch kv_heads slots head_dim"]
    slots: Int[Tensor, " batch"]
    positions: Int[Tensor, " batch"]
    scales: tuple[Float[Tensor, "batch kv_heads slots"], Float[Tensor, "batch kv_heads slots"]] | None = None


def padded_rank(rank: int) -> int:
    """The power of two, 16 or more, in which a rank lies for the matrix units."""
    return max(16, 1 << (rank - 1).bit_length())
