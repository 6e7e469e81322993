"""The base's frozen weights as one matrix for each input group, with spare rows for the adapter's B.

Decides: where the weights lie. Maps that read the same input become views of one matrix [W; ...; B], so that a decode
step makes their outputs and the adapter's lows with one product, and nothing of the base exists twice: memory grows by
the rows of B alone, and while the weights are moved by one group's matrix. The modules compute as before, bit for bit,
and what is loaded into them later is seen here. Made once for a base and kept on it.
Does not know: kernels, states.

Paper: theta' = theta + A S_e B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pte.kernels.operands import LowRankUpdate, padded_rank
from pte.method.adapter import INPUT_GROUPS
from pte.method.float8 import Float8Linear, Float8Vectors, float8_product
from pte.model.policy import linear_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from pte.method.adapter import GroupWeights

KEPT_AS = "_pte_fused_weights"


class FusedWeights:
    """The matrices of all layers, by input group.

    Args:
        base: Its linear maps become views.
        spare: Rows for the B of each map: the padded rank of the largest adapter, 0 for none.

    `owner` is whose B lies in the spare rows.
    """

    def __init__(self, base: PreTrainedModel, *, spare: int) -> None:
        self.spare = spare
        self.owner: object = None
        self.layers: list[tuple[FusedGroup | Float8Group, ...]] = []
        for layer in base.get_decoder().layers:
            groups = (tuple(linear_of(layer, name) for name in names) for names in INPUT_GROUPS)
            self.layers.append(tuple(fused_group(maps, spare=spare, dtype=base.dtype) for maps in groups))
            if base.device.type == "cuda":
                # What the old weights took goes back, or it would lie in pieces too small for the next matrix.
                torch.cuda.empty_cache()

    @classmethod
    def of(cls, base: PreTrainedModel, *, rank: int) -> FusedWeights:
        """Those of a base: made the first time, and again once the weights were moved or the rank is larger.

        Args:
            base: Frozen causal LM.
            rank: Of the adapter, 0 for none.
        """
        spare = padded_rank(rank) if rank else 0
        kept = getattr(base, KEPT_AS, None)
        if isinstance(kept, FusedWeights) and kept.spare >= spare and kept.holds_the_weights():
            return kept
        made = cls(base, spare=spare)
        setattr(base, KEPT_AS, made)
        return made

    def holds_the_weights(self) -> bool:
        """True while every map of the base is a view of its matrix: until the base is moved or cast."""
        return all(group.holds_the_weights() for groups in self.layers for group in groups)


class FusedGroup:
    """[W; ...; B] of the maps of a layer that read the same input.

    Args:
        maps: Frozen; their weights and biases become views.
        spare: Rows for the B of each map.
    """

    @torch.no_grad()
    def __init__(self, maps: tuple[nn.Linear, ...], *, spare: int) -> None:
        weight = maps[0].weight
        self.maps = maps
        self.widths = tuple(linear.out_features for linear in maps)
        self.outputs = sum(self.widths)
        self.matrix = weight.new_zeros(self.outputs + len(maps) * spare, weight.shape[1])
        self.bias = None if all(linear.bias is None for linear in maps) else weight.new_zeros(self.matrix.shape[0])
        for linear, rows in zip(maps, self.rows_of_maps(), strict=True):
            linear.weight.data = self.matrix[rows].copy_(linear.weight)
            if self.bias is not None and linear.bias is not None:
                linear.bias.data = self.bias[rows].copy_(linear.bias)

    @property
    def spare(self) -> Float[Tensor, "spare inputs"]:
        """The rows of B."""
        return self.matrix[self.outputs :]

    def rows_of_maps(self) -> list[slice]:
        """Where each map's outputs lie."""
        return rows_of(self.widths)

    def product(self, x: Float[Tensor, "batch inputs"], *, lows: int) -> Float[Tensor, "batch columns"]:
        """W x of all maps, then what the first `lows` of the spare rows make."""
        columns = self.outputs + lows
        weight = self.matrix[:columns].t()
        return torch.mm(x, weight) if self.bias is None else torch.addmm(self.bias[:columns], x, weight)

    def holds_the_weights(self) -> bool:
        """True while every map is a view of the matrix."""
        return all(
            linear.weight.data_ptr() == self.matrix[rows].data_ptr()
            for linear, rows in zip(self.maps, self.rows_of_maps(), strict=True)
        )


class Float8Group:
    """W of the maps of a layer that read the same input as one float8 matrix, and B beside it in the model's dtype.

    Args:
        maps: Frozen; their codes, scales and biases become views.
        spare: Rows for the B of each map.
        dtype: Of B and of what comes out.
    """

    def __init__(self, maps: tuple[Float8Linear, ...], *, spare: int, dtype: torch.dtype) -> None:
        self.maps = maps
        self.widths = tuple(linear.out_features for linear in maps)
        self.outputs = sum(self.widths)
        self.weight = Float8Vectors(
            torch.cat([linear.codes for linear in maps]), torch.cat([linear.scales for linear in maps])
        )
        self.spare = self.weight.scales.new_zeros(len(maps) * spare, maps[0].in_features, dtype=dtype)
        self.bias = None if all(linear.bias is None for linear in maps) else self.spare.new_zeros(self.outputs)
        for linear, rows in zip(maps, self.rows_of_maps(), strict=True):
            linear.codes, linear.scales = self.weight.codes[rows], self.weight.scales[rows]
            if self.bias is not None and linear.bias is not None:
                linear.bias = self.bias[rows].copy_(linear.bias)

    def rows_of_maps(self) -> list[slice]:
        """Where each map's outputs lie."""
        return rows_of(self.widths)

    def product(self, x: Float[Tensor, "batch inputs"], *, lows: int) -> Float[Tensor, "batch columns"]:
        """W x of all maps with x rounded to float8, then what the first `lows` of the spare rows make of x itself."""
        # Imported here, because plain weights are fused without triton too.
        from pte.kernels.float8 import rounded_rows

        outputs = float8_product(Float8Vectors(*rounded_rows(x)), self.weight, dtype=x.dtype)
        if self.bias is not None:
            outputs += self.bias
        return torch.cat((outputs, torch.mm(x, self.spare[:lows].t())), dim=1) if lows else outputs

    def holds_the_weights(self) -> bool:
        """True while every map is a view of the matrix."""
        return all(
            linear.codes.data_ptr() == self.weight.codes[rows].data_ptr()
            for linear, rows in zip(self.maps, self.rows_of_maps(), strict=True)
        )


def rows_of(widths: tuple[int, ...]) -> list[slice]:
    """Rows of each of several maps, one under the other."""
    ends = torch.tensor(widths).cumsum(0).tolist()
    return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


def fused_group(
    maps: tuple[nn.Linear | Float8Linear, ...], *, spare: int, dtype: torch.dtype
) -> FusedGroup | Float8Group:
    """The group of maps that are all plain or all float8."""
    float8 = tuple(linear for linear in maps if isinstance(linear, Float8Linear))
    if float8:
        return Float8Group(float8, spare=spare, dtype=dtype)
    return FusedGroup(tuple(linear for linear in maps if not isinstance(linear, Float8Linear)), spare=spare)


class FusedProduct:
    """All outputs of a group and the lows of its adapted maps, as one matrix product, and what updates them.

    Args:
        group: The matrix.
        adapted: Places of the adapted maps in the group.
        rank: Of the adapter.
    """

    def __init__(self, group: FusedGroup | Float8Group, *, adapted: tuple[int, ...], rank: int) -> None:
        self.group = group
        self.adapted = adapted
        self.rank = rank
        self.padded = padded_rank(rank) if adapted else 0
        self.lows = len(adapted) * self.padded
        self.up = group.spare.new_zeros(group.outputs, self.padded)
        # A map that is not adapted has no A here, so that any low will do for it.
        self.places = tuple(adapted.index(place) if place in adapted else 0 for place in range(len(group.maps)))

    @torch.no_grad()
    def load(self, weights: GroupWeights) -> None:
        """Writes B into the matrix and scale * A beside it, in place: a captured product uses them from then on."""
        spare = self.group.spare[: self.lows].zero_()
        for rows, down in zip(spare.split(self.padded), weights.down.split(self.rank), strict=True):
            rows[: self.rank] = down
        for place, up in zip(self.adapted, weights.ups, strict=True):
            self.up[self.group.rows_of_maps()[place], : self.rank] = up.t()

    def __call__(self, x: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch columns"]:
        """W x of all maps, then B x of the adapted ones, each padded with zeros."""
        return self.group.product(x, lows=self.lows)

    def update(self, state: Float[Tensor, "batch rank rank"] | None) -> LowRankUpdate | None:
        """What the product still lacks under S of each row, or under S = I; None where no map is adapted."""
        return LowRankUpdate(self.up, self.places, state) if self.adapted else None
