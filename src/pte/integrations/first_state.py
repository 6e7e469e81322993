"""A plain forward of an adapted base: every layer computes with its first state S_0, and nothing else changes.

Decides: when S_0 and the adapter's weights are made and bound. They are made from the parameters inside each block
(attention, MLP) of a decoder layer, because Transformers' gradient checkpointing runs a layer again during backward,
when whatever was set outside is gone; a state set outside would give other gradients, silently. A bounded forward
binds its own states and is left alone. Does not know: PEFT, budgets.

Paper: the state before any eviction, S_e = (W_Q^a q_g)(W_K^a k_g)^T (W_V^a v_g).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

from pte.method.adapter import BoundAdapter, ThoughtAdapter
from pte.model.segment import global_keys_values, runs_bounded

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from pte.method.thought import ThoughtEncoder

BLOCKS = ("self_attn", "mlp")


class FirstStateHooks:
    """Binds the first state while a block of a decoder layer runs outside a bounded forward.

    Args:
        base: The adapted model.
        active: The adapter that a block computes with, or None for the base alone.
    """

    def __init__(self, base: PreTrainedModel, active: Callable[[nn.Module], ThoughtAdapter | None]) -> None:
        self.base = base
        self.active = active
        self.handles = []
        for index, layer in enumerate(base.get_decoder().layers):
            for block in (layer.get_submodule(name) for name in BLOCKS):
                before = partial(self.bind, layer=index)
                self.handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                self.handles.append(block.register_forward_hook(self.release, always_call=True))

    def remove(self) -> None:
        """Leaves the base as it was."""
        for handle in self.handles:
            handle.remove()

    def bind(self, block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], *, layer: int) -> None:
        """Binds the active adapter under S_0 before a block runs.

        Raises:
            ValueError: It is in half precision.
        """
        adapter = None if runs_bounded(self.base) else self.active(block)
        if adapter is None:
            return
        check_encoder_dtype(adapter)
        x = args[0] if args else kwargs["hidden_states"]
        decoder_layer = self.base.get_decoder().layers[layer]
        dtype = self.base.dtype
        groups = tuple(
            adapter.group_weights(layer, tuple(name for name in names if hasattr(block, name)), dtype)
            for names in adapter.groups(layer)
        )
        transposed = None
        if adapter.encoder is not None:
            # States are computed in the encoder's float32 (`solve_triangular` has nothing less), under autocast too.
            with torch.autocast(x.device.type, enabled=False):
                keys, values = global_keys_values(decoder_layer, adapter.encoder.global_tokens.to(dtype))
                state = first_state_of_layer(adapter.encoder, layer, keys=keys, values=values)
            transposed = (state.t().expand(len(x), -1, -1),) * (layer + 1)
        adapter.binding.current = BoundAdapter(((),) * layer + (groups,), transposed)

    def release(self, block: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        """Unbinds after a block, also after one that failed."""
        adapter = None if runs_bounded(self.base) else self.active(block)
        if adapter is not None:
            adapter.binding.current = None


def check_encoder_dtype(adapter: ThoughtAdapter) -> None:
    """Refuses an adapter whose states nothing can compute.

    Raises:
        ValueError: Somebody has cast it to half precision, together with the base.
    """
    dtype = None if adapter.encoder is None else adapter.encoder.key_map.dtype
    if dtype is not None and dtype.itemsize < 4:
        raise ValueError(
            f"a thought adapter must be in torch.float32, in which its states are computed and trained, got {dtype}; "
            f"load the base in the dtype that you want instead of casting the whole model, or call "
            f"model.base_model.pte_adapters.float()"
        )


class FirstState(nn.Module):
    """What the adapters read before any eviction, as a module, so that it can run with the parameters of one layer.

    Args:
        encoder: Of all layers.
    """

    def __init__(self, encoder: ThoughtEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, keys: Float[Tensor, "layers tokens kv_dim"], values: Float[Tensor, "layers tokens kv_dim"]
    ) -> Float[Tensor, "layers rank rank"]:
        """S_0 of the layers whose parameters the encoder holds."""
        return self.encoder.read(self.encoder.first_state(keys, values))


def first_state_of_layer(
    encoder: ThoughtEncoder,
    layer: int,
    *,
    keys: Float[Tensor, "tokens kv_dim"],
    values: Float[Tensor, "tokens kv_dim"],
) -> Float[Tensor, "rank rank"]:
    """What the adapters of one layer read before any eviction: `read_state(first_state)` of that layer alone.

    Args:
        encoder: Of all layers.
        layer: Index of the layer.
        keys: k_g of the layer.
        values: v_g of the layer.
    """
    of_layer = {
        f"encoder.{name}": parameter[layer : layer + 1]
        for name, parameter in encoder.named_parameters()
        if name != "global_tokens"
    }
    state = functional_call(FirstState(encoder), of_layer, (keys[None], values[None]))
    return state[0]
