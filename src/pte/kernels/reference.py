"""The naive programs that the kernels equal, in plain torch.

Decides: what each kernel computes and where it rounds: a product to the model's dtype, an update once when it is added,
a norm before its weight, a rotation after every operation. Does not know: tiles, splits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from pte.kernels.operands import Heads, LowRankUpdate, NewToken


def decode_attention_reference(
    query: Float[Tensor, "batch heads head_dim"],
    keys: Float[Tensor, "batch kv_heads slots head_dim"],
    *,
    values: Float[Tensor, "batch kv_heads slots head_dim"],
    positions: Int[Tensor, "batch slots"],
    scaling: float,
) -> Float[Tensor, "batch heads head_dim"]:
    """softmax(scaling q k^T) v over the slots whose position is not negative, computed in float64."""
    group = query.shape[1] // keys.shape[1]
    repeated_keys, repeated_values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = scaling * torch.einsum("bhd,bhsd->bhs", query.double(), repeated_keys)
    scores = scores.masked_fill(positions[:, None] < 0, float("-inf"))
    return torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), repeated_values).to(query.dtype)


def updated(
    product: Float[Tensor, "batch columns"], update: LowRankUpdate | None, *, widths: tuple[int, ...]
) -> list[Float[Tensor, "batch _"]]:
    """Outputs of the maps of a product, with their updates: out + scale * A (S low), rounded once.

    Args:
        product: Outputs of all maps, then the lows.
        update: None to leave it at the outputs.
        widths: Outputs of each map.
    """
    outputs = list(product[:, : sum(widths)].split(widths, dim=1))
    if update is None:
        return outputs
    padded = update.up.shape[1]
    ups = update.up.split(widths)
    for index, place in enumerate(update.places):
        start = sum(widths) + place * padded
        low = product[:, start : start + padded]
        if update.state is not None:
            rank = update.state.shape[-1]
            steered = torch.einsum("bji,bi->bj", update.state, low[:, :rank].to(update.state.dtype))
            low = functional.pad(steered.to(product.dtype), (0, padded - rank))
        added = outputs[index].float() + low.float() @ ups[index].float().t()
        outputs[index] = added.to(product.dtype)
    return outputs


def rms_norm_reference(
    x: Float[Tensor, "... channels"], weight: Float[Tensor, " channels"], *, epsilon: float
) -> Float[Tensor, "... channels"]:
    """weight * x / RMS(x): float32, then x's dtype, then the weight."""
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(x.dtype)


def finish_qkv_reference(
    product: Float[Tensor, "batch columns"], update: LowRankUpdate | None, *, heads: Heads, token: NewToken
) -> Float[Tensor, "batch query_heads head_dim"]:
    """As `finish_qkv`."""
    head_dim = heads.head_dim
    counts = (heads.query_heads, heads.kv_heads, heads.kv_heads)
    outputs = updated(product, update, widths=tuple(head_dim * count for count in counts))
    query, key, value = (x.unflatten(1, (-1, head_dim)) for x in outputs)
    if heads.norm is not None:
        query = rms_norm_reference(query, heads.norm[0], epsilon=heads.epsilon)
        key = rms_norm_reference(key, heads.norm[1], epsilon=heads.epsilon)
    cosine, signed_sine = heads.rotations[token.positions].unbind(1)
    query, key = (x * cosine + x.roll(head_dim // 2, dims=-1) * signed_sine for x in (query, key))
    for row, slot in enumerate(token.slots.tolist()):
        token.keys[row, :, slot] = key[row]
        token.values[row, :, slot] = value[row]
    return query


def finish_gate_up_reference(
    product: Float[Tensor, "batch columns"], update: LowRankUpdate | None, *, features: int
) -> Float[Tensor, "batch features"]:
    """As `finish_gate_up`."""
    gate, up = updated(product, update, widths=(features, features))
    return functional.silu(gate) * up


def finish_residual_reference(
    product: Float[Tensor, "batch columns"],
    update: LowRankUpdate | None,
    *,
    residual: Float[Tensor, "batch hidden"],
    weight: Float[Tensor, " hidden"],
    epsilon: float,
) -> tuple[Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]]:
    """As `finish_residual`."""
    (out,) = updated(product, update, widths=(residual.shape[1],))
    summed = residual + out
    return summed, rms_norm_reference(summed, weight, epsilon=epsilon)
