"""The rollout's forward on a GPU: `DecodeStep` in ten launches a layer, fit to be captured in a CUDA graph.

Decides: which kernels make a layer: four products of the fused weights, attention in one kernel or two, and one kernel
behind each product. It equals `DecodeStep` and rounds where that rounds; shapes and launches depend on nothing but the
sizes of its arguments, and the host waits for nothing.
Does not know: slots, sampling. It needs triton, so import it only where `fused_refusal` has nothing to say.

Paper: pi^D_theta(y_t | C_t^D) with theta' = theta + A S_e B, for one t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pte.kernels.attention import decode_attention, filled_ends
from pte.kernels.epilogues import finish_gate_up, finish_qkv, finish_residual
from pte.kernels.operands import Heads, NewToken
from pte.method.adapter import INPUT_GROUPS
from pte.model.decode import DecodeNorm, rotations
from pte.model.fused_support import unsupported
from pte.model.fused_weights import FusedProduct, FusedWeights

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from pte.method.adapter import AdapterWeights, ThoughtAdapter
    from pte.method.cache import BoundedCache
    from pte.model.fused_weights import Float8Group, FusedGroup
    from pte.model.policy import BoundedPolicy


class FusedDecodeStep:
    """Final hidden states (after the last norm) of one new token of every sequence.

    Args:
        policy: Base and adapter. The base's weights become views of `FusedWeights`.
        weights: `adapter_weights(policy)`.
        num_positions: All positions are below this; their cosines and sines are made here, once.

    Raises:
        ValueError: The kernels do not serve this policy (`unsupported`).
    """

    def __init__(self, policy: BoundedPolicy, weights: AdapterWeights | None, *, num_positions: int) -> None:
        if (reason := unsupported(policy)) is not None:
            raise ValueError(reason)
        decoder = policy.base.get_decoder()
        adapter = None if weights is None else policy.adapter
        self.embed_tokens = decoder.embed_tokens
        self.adapted = adapter is not None
        self.fused = FusedWeights.of(policy.base, rank=0 if adapter is None else adapter.rank)
        self.first_norm = DecodeNorm.of(decoder.layers[0].input_layernorm)
        angles = rotations(policy, num_positions)
        next_norms = [*(layer.input_layernorm for layer in decoder.layers[1:]), decoder.norm]
        self.layers = [
            FusedLayer(layer, products_of(groups, adapter, index), rotations=angles, next_norm=next_norms[index])
            for index, (layer, groups) in enumerate(zip(decoder.layers, self.fused.layers, strict=True))
        ]
        # Says whose B lies in the spare rows. The step itself would be kept alive by the base.
        self.mark = object()
        self.weights: AdapterWeights | None = None
        if weights is not None:
            self.load_adapter(weights)

    def load_adapter(self, weights: AdapterWeights) -> None:
        """Makes this step, and every graph of it, compute with the adapter's A and B as they are now.

        Args:
            weights: `adapter_weights(policy)`.
        """
        self.weights = weights
        for layer, groups in zip(self.layers, weights, strict=True):
            for product, group in zip(layer.products, groups, strict=True):
                if group is not None:
                    product.load(group)
        self.fused.owner = self.mark

    def claim(self) -> None:
        """Loads the adapter again where another step of the same base has loaded its own; a graph cannot notice."""
        if self.weights is not None and self.fused.owner is not self.mark:
            self.load_adapter(self.weights)

    def __call__(
        self,
        token_ids: Int[Tensor, " batch"],
        *,
        positions: Int[Tensor, " batch"],
        cache: BoundedCache,
        slots: Int[Tensor, " batch"],
        states: Float[Tensor, "layers batch rank rank"] | None,
    ) -> Float[Tensor, "batch hidden"]:
        """What the head reads.

        Args:
            token_ids: The new tokens.
            positions: Absolute positions.
            cache: Keys and values are written into it.
            slots: Where they go; their positions are stored already.
            states: What the adapters read, for every row; None for S = I or without adapter.

        Raises:
            RuntimeError: Another step of the same base has loaded its adapter since.
        """
        if self.adapted and self.fused.owner is not self.mark:
            raise RuntimeError(
                "a base holds the B of one fused step at a time, and another step has loaded its own since; call claim"
            )
        hidden = self.embed_tokens(token_ids)
        normed = self.first_norm(hidden)
        ends = filled_ends(cache.positions)
        for index, layer in enumerate(self.layers):
            scales = None
            if cache.key_scales is not None and cache.value_scales is not None:
                scales = cache.key_scales[index], cache.value_scales[index]
            token = NewToken(cache.keys[index], cache.values[index], slots=slots, positions=positions, scales=scales)
            state = None if states is None else states[index]
            hidden, normed = layer(
                hidden, normed, token=token, cached_positions=cache.positions, ends=ends, state=state
            )
        return normed


class FusedLayer:
    """One decoder layer on one token a row.

    Args:
        layer: Of the library.
        products: Of its input groups.
        rotations: Cosines and signed sines of all positions.
        next_norm: What follows the layer: the next one's first norm, or the last of all.
    """

    def __init__(
        self,
        layer: nn.Module,
        products: list[FusedProduct],
        *,
        rotations: Float[Tensor, "positions 2 1 head_dim"],
        next_norm: nn.Module,
    ) -> None:
        attention = layer.get_submodule("self_attn")
        assert isinstance(attention.scaling, float)
        self.scaling = attention.scaling
        self.mlp_norm = DecodeNorm.of(layer.get_submodule("post_attention_layernorm"))
        self.next_norm = DecodeNorm.of(next_norm)
        self.products = products
        head_dim = rotations.shape[-1]
        query_width, kv_width, _ = products[0].group.widths
        names = ("q_norm", "k_norm") if hasattr(attention, "q_norm") else ()
        norms = [DecodeNorm.of(attention.get_submodule(name)) for name in names]
        self.heads = Heads(
            query_width // head_dim,
            kv_width // head_dim,
            rotations,
            norm=torch.stack([norm.weight for norm in norms]) if norms else None,
            epsilon=norms[0].epsilon if norms else 0.0,
        )

    def __call__(
        self,
        hidden: Float[Tensor, "batch hidden"],
        normed: Float[Tensor, "batch hidden"],
        *,
        token: NewToken,
        cached_positions: Int[Tensor, "batch slots"],
        ends: Int[Tensor, " batch"],
        state: Float[Tensor, "batch rank rank"] | None,
    ) -> tuple[Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]]:
        """The residual stream after the layer, and its norm for the next.

        Args:
            hidden: The stream before.
            normed: Its norm.
            token: Where the new tokens go.
            cached_positions: Of all slots, the new ones included.
            ends: `filled_ends(cached_positions)`.
            state: S of each row, or None.
        """
        qkv, output, gate_up, down = self.products
        query = finish_qkv(qkv(normed), qkv.update(state), heads=self.heads, token=token)
        attended = decode_attention(
            query,
            token.keys,
            values=token.values,
            positions=cached_positions,
            ends=ends,
            scaling=self.scaling,
            scales=token.scales,
        ).flatten(1)
        hidden, normed = finish_residual(
            output(attended),
            output.update(state),
            residual=hidden,
            weight=self.mlp_norm.weight,
            epsilon=self.mlp_norm.epsilon,
        )
        activated = finish_gate_up(gate_up(normed), gate_up.update(state), features=gate_up.group.widths[0])
        return finish_residual(
            down(activated),
            down.update(state),
            residual=hidden,
            weight=self.next_norm.weight,
            epsilon=self.next_norm.epsilon,
        )


def products_of(
    groups: tuple[FusedGroup | Float8Group, ...], adapter: ThoughtAdapter | None, layer: int
) -> list[FusedProduct]:
    """The products of a layer's input groups, with the lows of the maps that the adapter adapts."""
    if adapter is None:
        return [FusedProduct(group, adapted=(), rank=0) for group in groups]
    return [
        FusedProduct(group, adapted=tuple(map(names.index, adapted)), rank=adapter.rank)
        for group, names, adapted in zip(groups, INPUT_GROUPS, adapter.groups(layer), strict=True)
    ]
