"""Undoing the rotary embedding of stored keys, from their stored positions.

Decides: how a key before the rotation is recovered. Does not know where angles come from: the model room computes
cosines and sines with the model's own rotary module, so that scaled variants are inverted with their own factors.

Ours (paper silent): the state folds keys as they were before the rotation; the paper does not say which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def unrotate(
    keys: Float[Tensor, "*batch tokens heads head_dim"],
    cos: Float[Tensor, "tokens_batch tokens head_dim"],
    *,
    sin: Float[Tensor, "tokens_batch tokens head_dim"],
    attention_scaling: float,
) -> Float[Tensor, "*batch tokens heads head_dim"]:
    """Keys before k_rot = a (k cos + rotate_half(k) sin); the rotation is orthogonal, so its inverse is its transpose.

    Args:
        keys: Rotated keys, halves-convention (first and second half of a head are a pair).
        cos: a cos(angle) at each token's position.
        sin: a sin(angle) at each token's position.
        attention_scaling: The factor a of the model's rotary module (1 except for YaRN-like variants).
    """
    half = keys.shape[-1] // 2
    rotated = torch.cat((keys[..., half:], -keys[..., :half]), dim=-1)
    return (keys * cos.unsqueeze(-2) + rotated * sin.unsqueeze(-2)) / attention_scaling**2
