"""The cache-constrained policy: a frozen base, an adapter on its linear maps, a budget, an eviction policy.

Decides: how an adapter is put on a base and taken off again, and what defines pi^D: rollout and replay get the same
`BoundedPolicy`, so there is one policy, walked twice. A schedule without a window is the full cache.

Paper: pi^D_theta(y|p) = prod_t pi_theta(y_t | C_t^D).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from pte.method.adapter import LINEAR_MAPS, LayerSizes, ThoughtAdapter, ThoughtLinear
from pte.method.cache import CacheShape
from pte.method.eviction.policy import EvictionPolicy
from pte.method.eviction.window import OldestFirst
from pte.method.float8 import FLOAT8, Float8Linear
from pte.method.schedule import EvictionSchedule

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from pte.model.sharding import ShardedLayers

ATTENTION_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class BoundedPolicy:
    """pi^D_theta: everything that a completion's distribution depends on, besides the prompt and the temperature.

    Args:
        base: Frozen causal LM, with `adapter` on its linear maps when there is one.
        adapter: Trainable update, or None for the base alone.
        schedule: Budget of reasoning tokens.
        eviction: Which tokens leave.
        sharded: Where the base's layers lie in shards over several processes; None where they are whole.

    Raises:
        ValueError: The eviction policy cannot work with the budget, or needs more than its stretches can give.
    """

    base: PreTrainedModel
    adapter: ThoughtAdapter | None
    schedule: EvictionSchedule
    eviction: EvictionPolicy = field(default_factory=OldestFirst)
    sharded: ShardedLayers | None = None

    def __post_init__(self) -> None:
        if self.schedule.window_tokens is not None and self.schedule.evict_tokens is not None:
            self.eviction.check(self.schedule.window_tokens, self.schedule.evict_tokens)
            if self.eviction.needs.anything and self.segments_per_stretch != 1:
                raise ValueError(
                    f"segments_per_stretch must be 1 for an eviction policy that needs attention, keys or values, got "
                    f"{self.segments_per_stretch} of policy {self.eviction.name!r}; return 1"
                )
            if not 1 <= self.eviction.needs.last_queries <= self.schedule.evict_tokens:
                raise ValueError(
                    f"last_queries must be from 1 to evict_tokens ({self.schedule.evict_tokens}), got "
                    f"{self.eviction.needs.last_queries} of policy {self.eviction.name!r}; observe fewer"
                )

    def with_cache(self, schedule: EvictionSchedule, eviction: EvictionPolicy | None = None) -> BoundedPolicy:
        """The same base and adapter under another budget."""
        return replace(self, schedule=schedule, eviction=eviction or self.eviction)

    def without_adapter(self) -> BoundedPolicy:
        """The base alone under the same budget; the adapter stays on the base and is switched off while it runs."""
        return replace(self, adapter=None)

    @cached_property
    def cache_shape(self) -> CacheShape:
        """What one token costs in the cache."""
        sizes = layer_sizes(self.base)
        head_dim = self.base.get_decoder().layers[0].self_attn.head_dim
        return CacheShape(layers=sizes.layers, kv_heads=sizes.kv_dim // head_dim, head_dim=head_dim)

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is computed; of weights, keys and values too, unless they are kept in float8."""
        return self.base.dtype

    @property
    def vocab(self) -> int:
        """Tokens that can be drawn. As a stop token the id behind the last ends nothing, and is looked for like any."""
        return self.base.get_output_embeddings().weight.shape[0]

    @property
    def float8(self) -> bool:
        """True where the base's linear maps are float8; the cache then keeps keys and values in float8 as well."""
        return isinstance(linear_of(self.base.get_decoder().layers[0], "q_proj"), Float8Linear)

    @property
    def cache_dtype(self) -> torch.dtype:
        """In which the rollout stores keys and values."""
        return FLOAT8 if self.float8 else self.dtype

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return self.base.device

    @property
    def records_evictions(self) -> bool:
        """True when the rollout has to record what left, because nothing but the model itself could say it again."""
        return not self.schedule.is_full and self.eviction.needs.anything

    def observes(self, token_index: int) -> bool:
        """True when the eviction policy asks whom the query of this reasoning token attends to.

        Args:
            token_index: Index of the reasoning token that enters.
        """
        needs, left = self.eviction.needs, self.schedule.tokens_until_eviction(token_index)
        if needs.attention is None or left is None:
            return False
        return needs.attention != "last" or left <= needs.last_queries

    @property
    def segments_per_stretch(self) -> int:
        """How many segments one parallel forward of the replay covers."""
        if self.schedule.window_tokens is None or self.schedule.evict_tokens is None:
            return 1
        return self.eviction.segments_per_stretch(self.schedule.window_tokens, self.schedule.evict_tokens)


def check_no_autocast(policy: BoundedPolicy) -> None:
    """Refuses to walk where torch would choose other dtypes for a part of what is computed.

    Raises:
        ValueError: Autocast is on.
    """
    device = policy.device.type
    if torch.is_autocast_enabled(device):
        raise ValueError(
            f"rollout and replay must compute in the base's own dtype, {policy.dtype}, got autocast to "
            f"{torch.get_autocast_dtype(device)}; leave torch.autocast, or run them under "
            f"torch.autocast({device!r}, enabled=False)"
        )


def layer_sizes(base: PreTrainedModel) -> LayerSizes:
    """Sizes of the base that an adapter is made for."""
    layers = base.get_decoder().layers
    maps = {name: linear_of(layers[0], name) for name in LINEAR_MAPS}
    return LayerSizes(
        layers=len(layers),
        kv_dim=maps["k_proj"].out_features,
        hidden_size=base.config.hidden_size,
        maps={name: (linear.in_features, linear.out_features) for name, linear in maps.items()},
    )


def query_maps(base: PreTrainedModel) -> list[Float[Tensor, "kv_dim hidden"]]:
    """What the queries of each layer look for among keys: W_q, the mean over the heads that share a key head."""
    found = []
    for layer in base.get_decoder().layers:
        weight = weight_of(linear_of(layer, "q_proj"), base.dtype)
        attention = layer.get_submodule("self_attn")
        kv_heads = linear_of(layer, "k_proj").out_features // attention.head_dim
        grouped = weight.view(kv_heads, -1, attention.head_dim, weight.shape[-1])
        found.append(grouped.mean(1).flatten(0, 1))
    return found


def linear_of(layer: nn.Module, name: str) -> nn.Linear | Float8Linear:
    """The frozen map of a layer, whether or not it is adapted: what adapts a map keeps it as `base`."""
    module = getattr(home_of(layer, name), name)
    return module if isinstance(module, nn.Linear | Float8Linear) else module.base


def weight_of(linear: nn.Linear | Float8Linear, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
    """W of a frozen map; of a float8 one a wide copy in the given dtype."""
    return linear.rounded.wide(dtype) if isinstance(linear, Float8Linear) else linear.weight.detach()


def home_of(layer: nn.Module, name: str) -> nn.Module:
    """The block of a decoder layer that holds a linear map."""
    return layer.get_submodule("self_attn" if name in ATTENTION_MAPS else "mlp")


def attach_adapter(base: PreTrainedModel, adapter: ThoughtAdapter) -> None:
    """Puts an adapter on a base's linear maps; the base computes as before until the adapter is bound.

    Args:
        base: Frozen causal LM.
        adapter: Made for the sizes of this base.

    Raises:
        ValueError: The base already has an adapter, or the adapter was made for other sizes.
    """
    if adapter.sizes != layer_sizes(base):
        raise ValueError(
            f"the adapter must be made for the base's sizes, got {adapter.sizes} for {layer_sizes(base)}; "
            f"make it with layer_sizes(base)"
        )
    layers = base.get_decoder().layers
    if any(
        getattr(home_of(layer, name), name) is not linear_of(layer, name) for layer in layers for name in LINEAR_MAPS
    ):
        raise ValueError("a base can carry one adapter, got a second; call detach_adapter first")
    for index, layer in enumerate(layers):
        for group, names in enumerate(adapter.groups(index)):
            for member, name in enumerate(names):
                adapted = ThoughtLinear(
                    linear_of(layer, name), layer=index, group=group, member=member, binding=adapter.binding
                )
                setattr(home_of(layer, name), name, adapted)
    adapter.to(base.device)


def detach_adapter(base: PreTrainedModel) -> None:
    """Puts the base's own linear maps back: the model is what it was, bit for bit."""
    for layer in base.get_decoder().layers:
        for name in LINEAR_MAPS:
            setattr(home_of(layer, name), name, linear_of(layer, name))
