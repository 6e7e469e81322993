"""A step's view of the cache: where the key and value of one new token of every sequence go, and what is attended to.

Decides: that the views of all layers are made at once, and that numbers are handed back as they lie, codes of float8 as
the numbers they stand for. Does not know: positions, evictions, which slot is whose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.method.float8 import Float8Vectors, as_bytes, to_float8

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class TokenSlots:
    """Where the keys, or the values, of one new token of every sequence go: the views of all layers, made at once.

    A step of a small model feels every operation.

    Args:
        stored: Of each layer, all slots.
        attended: Of each layer, the slots that are handed back.
        scales: Of codes, all slots; None where numbers are stored.
        attended_scales: Likewise, of those that are handed back.
        dtype: In which they are handed back.
    """

    stored: tuple[Float[Tensor, "batch kv_heads slots head_dim"], ...]
    attended: tuple[Float[Tensor, "batch kv_heads attended head_dim"], ...]
    scales: tuple[Float[Tensor, "batch kv_heads slots"], ...] | None
    attended_scales: tuple[Float[Tensor, "batch kv_heads attended"], ...] | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        stored: Float[Tensor, "layers batch kv_heads slots head_dim"],
        scales: Float[Tensor, "layers batch kv_heads slots"] | None,
        *,
        attended_slots: int,
        dtype: torch.dtype,
    ) -> TokenSlots:
        """The views of a store."""
        all_slots = attended_slots == stored.shape[3]
        layers = stored.unbind(0)
        return cls(
            stored=layers,
            attended=layers if all_slots else stored[:, :, :, :attended_slots].unbind(0),
            scales=None if scales is None else scales.unbind(0),
            attended_scales=None if scales is None else scales[:, :, :, :attended_slots].unbind(0),
            dtype=dtype,
        )

    def put(
        self,
        layer: int,
        slots: Int[Tensor, "batch kv_heads 1 head_dim"],
        new: Float[Tensor, "batch kv_heads 1 head_dim"],
    ) -> Float[Tensor, "batch kv_heads attended head_dim"]:
        """Puts the new tokens into their slots of a layer; what lies in the attended ones, a view where it can be.

        Args:
            layer: Index of the layer.
            slots: Of each sequence's token.
            new: Post-rotary keys, or values.
        """
        if self.scales is None or self.attended_scales is None:
            self.stored[layer].scatter_(2, slots, new)
            return self.attended[layer]
        rounded, scales = to_float8(new), self.scales[layer]
        as_bytes(self.stored[layer]).scatter_(2, slots, as_bytes(rounded.codes))
        scales.scatter_(2, slots[..., 0], rounded.scales.to(scales.dtype))
        return Float8Vectors(self.attended[layer], self.attended_scales[layer]).wide(self.dtype)
