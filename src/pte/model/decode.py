"""The rollout's forward: one new token of every sequence through the base's layers, in few operations.

Decides: how a layer computes a single token a row. It equals `run_layers` with one token a row, the naive program: the
same products, rounded at the same places, without the library's modules, whose overhead is most of a small step.
The base's weights are multiplied with where they lie, so that a large base never exists twice; on a GPU, `fused.py`
moves them next to B instead and computes the same in fewer launches. Does not know: slots, sampling.

Paper: pi^D_theta(y_t | C_t^D) with theta' = theta + A S_e B, for one t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pte.method.adapter import INPUT_GROUPS, steer
from pte.method.float8 import Float8Linear, to_float8
from pte.model.policy import linear_of
from pte.model.segment import run_layers

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from pte.method.adapter import AdapterWeights, GroupWeights
    from pte.model.policy import BoundedPolicy
    from pte.model.segment import LayerAttention


class DecodeStep:
    """Final hidden states (after the last norm) of one new token of every sequence.

    Args:
        policy: Base and adapter.
        weights: `adapter_weights(policy)`.
        num_positions: All positions are below this; their cosines and sines are made here, once.
    """

    def __init__(self, policy: BoundedPolicy, weights: AdapterWeights | None, *, num_positions: int) -> None:
        decoder = policy.base.get_decoder()
        self.embed_tokens = decoder.embed_tokens
        self.layers = [
            DecodeLayer(policy, index, None if weights is None else weights[index])
            for index in range(len(decoder.layers))
        ]
        self.norm = DecodeNorm.of(decoder.norm)
        self.rotations = rotations(policy, num_positions)

    def __call__(
        self,
        token_ids: Int[Tensor, " batch"],
        *,
        positions: Int[Tensor, " batch"],
        attention: LayerAttention,
        states: Float[Tensor, "layers batch rank rank"] | None,
    ) -> Float[Tensor, "batch hidden"]:
        """What the head reads.

        Args:
            token_ids: The new tokens.
            positions: Absolute positions.
            attention: Writes and reads keys and values.
            states: What the adapters read, for every row; None for S = I or without adapter.
        """
        hidden = self.embed_tokens(token_ids)
        # Four-dimensional, as attention takes its heads.
        rotation = self.rotations[positions].unsqueeze(2).unbind(1)
        transposed = (None,) * len(self.layers) if states is None else states.transpose(2, 3).unbind(0)
        for layer, state in zip(self.layers, transposed, strict=True):
            hidden = layer(hidden, rotation=rotation, attention=attention, state=state)
        return self.norm(hidden)


class ShardedDecodeStep(DecodeStep):
    """The same for a base in shards, whose weights no step can hold: the naive program, `run_layers`, layer by layer.

    Args:
        policy: Base and adapter.
        weights: `adapter_weights(policy)`.
    """

    def __init__(self, policy: BoundedPolicy, weights: AdapterWeights | None) -> None:
        self.policy = policy
        self.weights = weights

    def __call__(
        self,
        token_ids: Int[Tensor, " batch"],
        *,
        positions: Int[Tensor, " batch"],
        attention: LayerAttention,
        states: Float[Tensor, "layers batch rank rank"] | None,
    ) -> Float[Tensor, "batch hidden"]:
        """What the head reads; arguments as `DecodeStep`."""
        hidden = run_layers(
            self.policy,
            token_ids[:, None],
            positions=positions[:, None],
            attention=attention,
            states=states,
            weights=self.weights,
        )
        return hidden[:, 0]


class DecodeLayer:
    """One decoder layer on one token a row.

    Args:
        policy: Base and adapter.
        index: Of the layer.
        weights: Of its adapted maps by input group, or None for the base alone.
    """

    def __init__(self, policy: BoundedPolicy, index: int, weights: tuple[GroupWeights | None, ...] | None) -> None:
        layer = policy.base.get_decoder().layers[index]
        self.index = index
        self.head_dim: int = layer.self_attn.head_dim
        self.query_heads, self.key_heads = (
            linear_of(layer, name).out_features // self.head_dim for name in ("q_proj", "k_proj")
        )
        self.scaling: float = layer.self_attn.scaling
        self.activation = layer.mlp.act_fn
        self.input_norm = DecodeNorm.of(layer.input_layernorm)
        self.mlp_norm = DecodeNorm.of(layer.post_attention_layernorm)
        self.head_norm = self.stacked_head_norm(layer) if hasattr(layer.self_attn, "q_norm") else None
        self.qkv, self.output, self.gate_up, self.down = (
            InputGroup(
                tuple(linear_of(layer, name) for name in names),
                None if weights is None else weights[group],
                adapted=() if policy.adapter is None else tuple(map(names.index, policy.adapter.groups(index)[group])),
            )
            for group, names in enumerate(INPUT_GROUPS)
        )

    def stacked_head_norm(self, layer: nn.Module) -> DecodeNorm:
        """The norms of query and key heads as one, with the weight of each head."""
        query, key = (DecodeNorm.of(layer.get_submodule(f"self_attn.{name}")) for name in ("q_norm", "k_norm"))
        weights = (query.weight.expand(self.query_heads, 1, -1), key.weight.expand(self.key_heads, 1, -1))
        return DecodeNorm(torch.cat(weights), query.epsilon)

    def __call__(
        self,
        hidden: Float[Tensor, "batch hidden"],
        *,
        rotation: tuple[Float[Tensor, "batch 1 1 head_dim"], ...],
        attention: LayerAttention,
        state: Float[Tensor, "batch rank rank"] | None,
    ) -> Float[Tensor, "batch hidden"]:
        """The residual stream after the layer."""
        batch = hidden.shape[0]
        query, key, value = self.qkv(self.input_norm(hidden), state)
        heads = torch.cat((query, key), dim=1).view(batch, -1, 1, self.head_dim)
        if self.head_norm is not None:
            heads = self.head_norm(heads)
        query, key = rotate(heads, rotation).split((self.query_heads, self.key_heads), dim=1)
        attended = attention.attend(
            self.index,
            query,
            key=key,
            value=value.view(batch, -1, 1, self.head_dim),
            scaling=self.scaling,
        )
        hidden = hidden + self.output(attended.reshape(batch, -1), state)[0]
        gate, up = self.gate_up(self.mlp_norm(hidden), state)
        return hidden + self.down(self.activation(gate) * up, state)[0]


class FrozenMaps:
    """W x + bias of all maps of a layer that read the same x; float8 ones share its rounding.

    Args:
        maps: All plain, or all float8.
    """

    def __init__(self, maps: tuple[nn.Linear | Float8Linear, ...]) -> None:
        self.plain = [(linear.weight.t(), linear.bias) for linear in maps if not isinstance(linear, Float8Linear)]
        self.float8 = [linear for linear in maps if isinstance(linear, Float8Linear)]

    def __call__(self, x: Float[Tensor, "batch in_features"]) -> list[Float[Tensor, "batch _"]]:
        """Outputs of all maps."""
        if self.float8:
            rounded = to_float8(x)
            return [linear.multiplied(rounded, dtype=x.dtype) for linear in self.float8]
        return [torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight) for weight, bias in self.plain]


class InputGroup:
    """W x + scale * A (S (B x)) of all maps of a layer that read the same x, as `ThoughtLinear` computes them.

    Args:
        maps: The frozen maps.
        weights: A and B of the adapted ones, or None when there is none.
        adapted: Places of the adapted ones in `maps`.
    """

    def __init__(
        self,
        maps: tuple[nn.Linear | Float8Linear, ...],
        weights: GroupWeights | None,
        *,
        adapted: tuple[int, ...],
    ) -> None:
        self.frozen = FrozenMaps(maps)
        self.down = None if weights is None else weights.down.t()
        self.ups = () if weights is None else tuple(zip(adapted, weights.ups, strict=True))

    def __call__(
        self, x: Float[Tensor, "batch in_features"], state: Float[Tensor, "batch rank rank"] | None
    ) -> list[Float[Tensor, "batch _"]]:
        """Outputs of all maps; `state` is S^T of each row, or None for S = I."""
        outputs = self.frozen(x)
        if self.down is None:
            return outputs
        low = torch.mm(x, self.down).view(x.shape[0], len(self.ups), -1)
        if state is not None:
            low = steer(low, state)
        for (place, up), part in zip(self.ups, low.unbind(1), strict=True):
            outputs[place].addmm_(part, up)
        return outputs


class DecodeNorm:
    """weight * x / RMS(x), rounded where the library rounds: float32 inside, then x's dtype, then the weight.

    Args:
        weight: Of each channel, or of each head and channel.
        epsilon: Added to the mean square.
    """

    def __init__(self, weight: Float[Tensor, "*heads channels"], epsilon: float) -> None:
        self.weight = weight
        self.epsilon = epsilon

    @classmethod
    def of(cls, norm: nn.Module) -> DecodeNorm:
        """The same norm as one of the library's modules."""
        weight, epsilon = norm.weight, norm.variance_epsilon
        assert isinstance(weight, torch.Tensor) and isinstance(epsilon, float)
        return cls(weight, epsilon)

    def __call__(self, x: Float[Tensor, "batch *heads channels"]) -> Float[Tensor, "batch *heads channels"]:
        """Over the last axis."""
        if x.dtype == torch.float32 and self.weight.dim() == 1:
            # Nothing is rounded on the way, so that one call is the same.
            return functional.rms_norm(x, x.shape[-1:], self.weight, self.epsilon)
        return self.weight * functional.rms_norm(x.float(), x.shape[-1:], eps=self.epsilon).to(x.dtype)


def rotations(policy: BoundedPolicy, num_positions: int) -> Float[Tensor, "positions 2 1 head_dim"]:
    """Cosines and signed sines of positions 0, 1, ..., made by the model's own rotary module.

    The first half of a head has its sine negated, so that `rotate` need not negate the channels.
    """
    decoder = policy.base.get_decoder()
    positions = torch.arange(num_positions, device=policy.device)[None]
    cos, sin = decoder.rotary_emb(decoder.embed_tokens.weight[:1], positions)
    first, second = sin[0].chunk(2, dim=-1)
    return torch.stack((cos[0], torch.cat((-first, second), dim=-1)), dim=1)[:, :, None]


def rotate(
    heads: Float[Tensor, "batch heads 1 head_dim"], rotation: tuple[Float[Tensor, "batch 1 1 head_dim"], ...]
) -> Float[Tensor, "batch heads 1 head_dim"]:
    """x cos + rotate_half(x) sin, with channels i and i + head_dim / 2 as a pair."""
    cos, signed_sin = rotation
    return heads * cos + heads.roll(heads.shape[-1] // 2, dims=-1) * signed_sin
