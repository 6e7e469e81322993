"""Tokens through the base's layers, many at once, with our attention and the states as arguments.

Decides: how a decoder layer is called (our attention function, no cache and no mask of the library's), how states
are bound while it runs, and where keys and values of the global tokens and angles of positions come from.
The library's own cache and mask code goes wrong silently after an eviction, so none of it is used.

Paper: C_t^D enters through `attention`, S_e through `states`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from pte.method.adapter import BoundAdapter
from pte.method.cache import EvictedTokens
from pte.method.rotary import unrotate
from pte.model.policy import BoundedPolicy, linear_of
from pte.timing import timed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Int
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from pte.method.adapter import AdapterWeights
    from pte.method.thought import ThoughtEncoder

ATTENTION_NAME = "pte_bounded"


@runtime_checkable
class LayerAttention(Protocol):
    """What computes attention in a forward: `DecodeAttention` or `StretchAttention`."""

    def attend(
        self, layer: int, query: Tensor, *, key: Tensor, value: Tensor, scaling: float
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Attention output of one layer."""
        ...


def bounded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    layer_attention: LayerAttention,
    **_library_arguments: object,
) -> tuple[Tensor, None]:
    """The attention function that Transformers calls in every layer; it hands over to `layer_attention`."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    return layer_attention.attend(layer, query, key=key, value=value, scaling=scaling), None


def run_layers(
    policy: BoundedPolicy,
    token_ids: Int[Tensor, "rows tokens"],
    *,
    positions: Int[Tensor, "rows tokens"],
    attention: LayerAttention,
    states: Float[Tensor, "layers rows rank rank"] | None,
    weights: AdapterWeights | None,
    recompute: bool = False,
) -> Float[Tensor, "rows tokens hidden"]:
    """Final hidden states (after the last norm) of the given tokens.

    Args:
        policy: Base and adapter.
        token_ids: Input tokens; a row is one sequence, or one segment of it.
        positions: Absolute positions.
        attention: Writes and reads keys and values.
        states: What the adapters read, for every row; None for S = I or without adapter.
        weights: `adapter_weights(policy)`, made once for many forwards.
        recompute: A backward pass computes each layer again, so that of a layer only its input is kept. Layers of a
            sharded base always are: they are no longer whole.
    """
    decoder = policy.base.get_decoder()
    transposed = None if states is None else tuple(states.transpose(2, 3).unbind(0))
    hidden = decoder.embed_tokens(token_ids)
    angles = decoder.rotary_emb(hidden, positions)

    sharded = policy.sharded

    def run_layer(index: int, hidden: Tensor) -> Tensor:
        layer = decoder.layers[index]
        if sharded is not None:
            sharded.fetch(index)
        # A sharded layer's own call would gather it by itself, whether or not the other ranks do.
        compute = layer if sharded is None else layer.forward
        # Bound in here, so that a layer that is computed again finds what it found the first time.
        with bound_base(policy, weights, transposed):
            return compute(
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=angles,
                layer_attention=attention,
            )

    for index in range(len(decoder.layers)):
        if (recompute or sharded is not None) and torch.is_grad_enabled():
            hidden = checkpoint(run_layer, index, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = run_layer(index, hidden)
    return decoder.norm(hidden)


@contextmanager
def bound_base(
    policy: BoundedPolicy, weights: AdapterWeights | None, transposed: tuple[Tensor, ...] | None
) -> Iterator[None]:
    """The base with our attention, its adapter bound to S^T of every layer; as it was before, afterwards."""
    config = policy.base.get_decoder().config
    AttentionInterface.register(ATTENTION_NAME, bounded_attention)
    implementation = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    # The library's recomputation would run our attention, which writes the cache, a second time; a replay has its own.
    checkpointed = [layer for layer in policy.base.get_decoder().layers if layer.gradient_checkpointing]
    for layer in checkpointed:
        layer.gradient_checkpointing = False
    try:
        if policy.adapter is None or weights is None:
            yield
        else:
            with policy.adapter.binding.bound(BoundAdapter(weights, transposed)):
                yield
    finally:
        config._attn_implementation = implementation
        for layer in checkpointed:
            layer.gradient_checkpointing = True


def runs_bounded(base: PreTrainedModel) -> bool:
    """True while `run_layers` runs a base: keys, values and states are then the bounded policy's."""
    return base.get_decoder().config._attn_implementation == ATTENTION_NAME


def adapter_weights(policy: BoundedPolicy) -> AdapterWeights | None:
    """A and B as the forward multiplies with them, or None for the base alone."""
    return None if policy.adapter is None else policy.adapter.weights(policy.dtype)


def read_state(
    policy: BoundedPolicy, state: Float[Tensor, "layers batch rank rank"] | None
) -> Float[Tensor, "layers batch rank rank"] | None:
    """What the adapters multiply with, from the running state."""
    if state is None or policy.adapter is None or policy.adapter.encoder is None:
        return None
    return policy.adapter.encoder.read(state)


def first_state(policy: BoundedPolicy) -> Float[Tensor, "layers rank rank"] | None:
    """The state before any eviction, or None for plain LoRA and for the base alone.

    The keys and values of the global tokens are the base's own projections of them, before any rotation.

    Paper: S_e = (W_Q^a q_g)(W_K^a k_g)^T (W_V^a v_g).
    """
    adapter = policy.adapter
    return None if adapter is None or adapter.encoder is None else fold_global_tokens(policy, adapter.encoder)


@timed("fold")
def fold_global_tokens(policy: BoundedPolicy, encoder: ThoughtEncoder) -> Float[Tensor, "layers rank rank"]:
    """The state of the global tokens alone."""
    tokens = encoder.global_tokens.to(policy.dtype)
    layers, sharded = policy.base.get_decoder().layers, policy.sharded

    def fetched_keys_values(index: int) -> tuple[Tensor, Tensor]:
        if sharded is not None:
            sharded.fetch(index)
        return global_keys_values(layers[index], tokens)

    def keys_values(index: int) -> tuple[Tensor, Tensor]:
        if sharded is None or not torch.is_grad_enabled():
            return fetched_keys_values(index)
        return checkpoint(fetched_keys_values, index, use_reentrant=False, preserve_rng_state=False)

    pairs = [keys_values(index) for index in range(len(layers))]
    return encoder.first_state(torch.stack([key for key, _ in pairs]), torch.stack([value for _, value in pairs]))


def global_keys_values(
    layer: nn.Module, tokens: Float[Tensor, "tokens hidden"]
) -> tuple[Float[Tensor, "tokens kv_dim"], Float[Tensor, "tokens kv_dim"]]:
    """k_g and v_g in one layer: the frozen maps' projections of the global tokens, before any rotation."""
    key_map, value_map = linear_of(layer, "k_proj"), linear_of(layer, "v_proj")
    # Past the modules' hooks: those of a FLOP counter refuse parameters as inputs inside a backward pass.
    key = key_map.forward(tokens)
    attention = layer.get_submodule("self_attn")
    if hasattr(attention, "k_norm"):
        heads = key.unflatten(-1, (-1, attention.head_dim))
        key = attention.get_submodule("k_norm")(heads).flatten(-2)
    return key, value_map.forward(tokens)


@timed("fold")
def fold(
    policy: BoundedPolicy,
    state: Float[Tensor, "layers batch rank rank"],
    evicted: EvictedTokens,
) -> Float[Tensor, "layers batch rank rank"]:
    """The running state after an eviction.

    Paper: S_e <- Normalize(S_e + S_e').
    """
    adapter = policy.adapter
    assert adapter is not None and adapter.encoder is not None
    return adapter.encoder.fold(state, folded_keys(policy, evicted), evicted.values)


@timed("fold")
def fold_blocks(
    policy: BoundedPolicy,
    state: Float[Tensor, "layers batch rank rank"],
    evicted: EvictedTokens,
    *,
    block: int,
) -> Float[Tensor, "layers batch blocks rank rank"]:
    """The running state after each of several evictions in a row.

    Equals: `fold`, a block after the other. The keys of all blocks are taken out of their rotation at once.

    Args:
        policy: Whose adapter folds.
        state: Before the first eviction.
        evicted: The blocks one behind the other.
        block: Tokens evicted at once.
    """
    adapter = policy.adapter
    assert adapter is not None and adapter.encoder is not None
    states = []
    keys = folded_keys(policy, evicted).split(block, dim=2)
    for block_keys, block_values in zip(keys, evicted.values.split(block, dim=2), strict=True):
        state = adapter.encoder.fold(state, block_keys, block_values)
        states.append(state)
    return torch.stack(states, dim=2)


def folded_keys(policy: BoundedPolicy, evicted: EvictedTokens) -> Float[Tensor, "layers batch evicted kv_dim"]:
    """Keys of evicted tokens in the space that the adapter folds."""
    adapter = policy.adapter
    assert adapter is not None
    if adapter.key_space == "post_rotary":
        return evicted.keys
    rotary = policy.base.get_decoder().rotary_emb
    keys = evicted.keys.to(torch.float32) if evicted.keys.dtype.itemsize < 4 else evicted.keys
    cos, sin = rotary(keys, evicted.positions)
    heads = keys.unflatten(-1, (-1, policy.cache_shape.head_dim))
    before = unrotate(heads, cos, sin=sin, attention_scaling=rotary.attention_scaling)
    return before.flatten(-2)
