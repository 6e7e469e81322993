"""The low-rank update that the state steers: DeltaW = A S B, on frozen linear maps.

Decides: what an adapted linear map computes (`ThoughtLinear`) and which parameters an adapter owns
(`ThoughtAdapter`). With S = I the same class is plain LoRA; with S fixed to its first value it is the paper's
"global tokens only". Does not know: models (it gets sizes), caches, when S changes.

Paper: Section 3, DeltaW = A S_e B, theta' = theta + DeltaW; A, B: LoRA up and down projections, rank 32.
Deviations: 1. adapters on all seven linear maps of a layer by default (96 % against 90 % on four maps and 43 % on
q, v in our recall experiment); 2. A S is never built: a product per sequence would cost 25 MB a sequence at 7B;
3. B can start from the base's own queries (`ThoughtAdapter.start_from_queries`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn import functional

from pte.method.adapter_checks import check_encoder, check_layers, check_targets
from pte.method.float8 import Float8Linear
from pte.method.thought import KeySpace, ThoughtEncoder, UpdateRule
from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

AdapterKind = Literal["thought", "lora", "global_only"]
LINEAR_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


READ_THE_STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Maps whose input is the residual stream, normalised."""
# Linear maps that read the same input share one product with B.
INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class GroupWeights:
    """A and B of the adapted maps of a layer that share an input, ready to multiply.

    Args:
        down: Their B, stacked along the rank.
        ups: Their scale * A, transposed, in the same order.
    """

    down: Float[Tensor, "group_rank in_features"]
    ups: tuple[Float[Tensor, "rank _"], ...]


AdapterWeights = tuple[tuple[GroupWeights | None, ...], ...]


class BoundAdapter:
    """What the adapted maps of one model multiply with while one forward runs.

    Args:
        weights: By layer and input group.
        transposed: S^T per layer and row, or None for S = I.
    """

    def __init__(self, weights: AdapterWeights, transposed: tuple[Float[Tensor, "rows rank rank"], ...] | None) -> None:
        self.weights = weights
        self.transposed = transposed
        self.input: Tensor | None = None
        self.place = (-1, -1)
        self.lows: tuple[Tensor, ...] = ()

    def low(
        self, x: Float[Tensor, "rows tokens in_features"], *, layer: int, group: int, member: int
    ) -> tuple[Float[Tensor, "rows_tokens rank"], Float[Tensor, "rank out_features"]]:
        """S (B x) of one map, computed once for all maps of its group, and the map's scale * A."""
        weights = self.weights[layer][group]
        assert weights is not None
        if self.input is not x or self.place != (layer, group):
            self.input, self.place = x, (layer, group)
            rows, tokens, _ = x.shape
            maps = len(weights.ups)
            low = functional.linear(x, weights.down)
            rank = low.shape[-1] // maps
            if self.transposed is not None:
                state = self.transposed[layer]
                low = steer(low.view(rows, tokens * maps, rank), state)
            self.lows = low.view(rows * tokens, maps, rank).unbind(1)
        return self.lows[member], weights.ups[member]


@timed("read")
def steer(
    low: Float[Tensor, "rows tokens rank"], transposed: Float[Tensor, "rows rank rank"]
) -> Float[Tensor, "rows tokens rank"]:
    """S (B x) of every token, from B x and S^T of its row; multiplied in the state's dtype."""
    if low.dtype == transposed.dtype:
        return torch.bmm(low, transposed)
    return torch.bmm(low.to(transposed.dtype), transposed).to(low.dtype)


class Binding:
    """The one mutable place: which `BoundAdapter` the adapted maps of a model use; None computes the base alone."""

    def __init__(self) -> None:
        self.current: BoundAdapter | None = None

    @contextmanager
    def bound(self, current: BoundAdapter) -> Iterator[None]:
        """Binds for the duration of a forward and restores what was bound before."""
        before = self.current
        self.current = current
        try:
            yield
        finally:
            self.current = before


class LowRankPair(nn.Module):
    """A and B of one linear map, float32.

    Args:
        in_features: Inputs of the map.
        out_features: Outputs of the map.
        rank: Rows of B, columns of A.
        generator: Source of B's initial values; A starts at zero, so that a fresh adapter is the identity.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = in_features**-0.5
        down = torch.rand(rank, in_features, generator=generator, dtype=torch.float32) * (2 * bound) - bound
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))


class ThoughtLinear(nn.Module):
    """W x + scale * A (S (B x)), the naive program being (W + scale * A S B) x for each sequence's S.

    Args:
        base: The frozen map W, with its bias.
        layer: Which layer's state and weights to read.
        group: Index of its input group in `INPUT_GROUPS`.
        member: Its place among the adapted maps of that group.
        binding: Holds the states and weights of the running forward.

    Paper: theta' = theta + DeltaW, DeltaW = A S_e B.
    """

    def __init__(
        self, base: nn.Linear | Float8Linear, *, layer: int, group: int, member: int, binding: Binding
    ) -> None:
        super().__init__()
        self.base = base
        self.layer = layer
        self.group = group
        self.member = member
        self.binding = binding

    def forward(self, x: Float[Tensor, "rows tokens in_features"]) -> Float[Tensor, "rows tokens out_features"]:
        """The adapted map, with the state of each row; states multiply in float32."""
        out = self.base(x)
        current = self.binding.current
        if current is None:
            return out
        low, up = current.low(x, layer=self.layer, group=self.group, member=self.member)
        return torch.addmm(out.view(-1, out.shape[-1]), low, up).view(out.shape)


@dataclass(frozen=True)
class LayerSizes:
    """Sizes that an adapter is made for.

    Args:
        layers: Decoder layers.
        kv_dim: Numbers of a token's keys in one layer.
        hidden_size: Width of the residual stream.
        maps: (inputs, outputs) of each linear map of a layer, by name.
    """

    layers: int
    kv_dim: int
    hidden_size: int
    maps: Mapping[str, tuple[int, int]]


class ThoughtAdapter(nn.Module):
    """All trainable parameters: A and B of every adapted map, and the encoder with its global tokens.

    Args:
        sizes: Of the base model.
        kind: `thought`; `global_only` (the state keeps its first value); `lora` (S = I, no encoder).
        rank: Of A, B and S.
        targets: Adapted linear maps of every adapted layer.
        layers: Indices of the adapted layers; None for all.
        scale: Factor on the update.
        update_rule: How evictions enter the state.
        key_space: Keys as they were before the rotary embedding, or after it.
        global_tokens: Number of learnable global tokens.
        seed: Of the initial values.

    Raises:
        ValueError: An unknown, repeated or missing target, a rank below 1, a negative number of global tokens, or
            `global_only` without any.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        *,
        kind: AdapterKind = "thought",
        rank: int = 32,
        targets: tuple[str, ...] = LINEAR_MAPS,
        layers: tuple[int, ...] | None = None,
        scale: float = 1.0,
        update_rule: UpdateRule = "delta",
        key_space: KeySpace = "pre_rotary",
        global_tokens: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_encoder(kind, rank=rank, global_tokens=global_tokens)
        check_targets(targets, known=LINEAR_MAPS)
        check_layers(layers, count=sizes.layers)
        self.sizes = sizes
        self.kind: AdapterKind = kind
        self.rank = rank
        self.targets = targets
        self.adapted_layers = tuple(range(sizes.layers)) if layers is None else layers
        self.scale = scale
        self.update_rule: UpdateRule = update_rule
        self.key_space: KeySpace = key_space
        self.binding = Binding()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: LowRankPair(*sizes.maps[name], rank=rank, generator=generator)
                    for name in self.targets_of(layer)
                }
            )
            for layer in range(sizes.layers)
        )
        self.encoder = (
            None
            if kind == "lora"
            else ThoughtEncoder(
                layers=sizes.layers,
                kv_dim=sizes.kv_dim,
                hidden_size=sizes.hidden_size,
                rank=rank,
                global_tokens=global_tokens,
                update_rule=update_rule,
                generator=generator,
            )
        )

    @torch.no_grad()
    def start_from_queries(self, query_maps: Sequence[Float[Tensor, "kv_dim hidden"]]) -> None:
        """Makes each B x the address under which S keeps what the base's own query for x would attend to.

        B <- (W_Q q_g) W_K M, scaled to the size that B had: a token with keys k is stored under (W_Q q_g) W_K k, and
        M x is what x's queries look for among keys. A stays zero, so that the adapter stays the identity. Maps that do
        not read the residual stream keep their B. From random B a memory has first to find what the base's attention
        knows: on chained assignments over 8 windows 34 % after 50 steps, this way 80 % (W_K a tenth in both, global
        tokens of size 1, one seed; docs/log.md).

        Args:
            query_maps: M of each layer.

        Raises:
            ValueError: The adapter has no encoder (kind `lora`), or there is not one map for each layer.
        """
        if self.encoder is None:
            raise ValueError("start_from_queries needs an encoder, got an adapter of kind 'lora'; leave out the call")
        if len(query_maps) != self.sizes.layers:
            raise ValueError(
                f"query_maps must be one for each of {self.sizes.layers} layers, got {len(query_maps)}; use those of "
                f"the adapter's own base"
            )
        addresses = self.encoder.query @ self.encoder.query_map.transpose(1, 2) @ self.encoder.key_map
        for layer, query_map in enumerate(query_maps):
            start = addresses[layer] @ query_map.to(addresses)
            for name in self.targets_of(layer):
                down = self.pair(layer, name).down
                if name in READ_THE_STREAM:
                    down.copy_(start * (down.norm() / start.norm()))

    @property
    def folds(self) -> bool:
        """True when evictions change the state."""
        return self.kind == "thought"

    def weights(self, dtype: torch.dtype) -> AdapterWeights:
        """A and B grouped by layer and shared input, scaled and cast: made once for many forwards.

        Args:
            dtype: Of the base; the float32 masters stay as they are.
        """
        return tuple(
            tuple(self.group_weights(layer, names, dtype) for names in self.groups(layer))
            for layer in range(self.sizes.layers)
        )

    def group_weights(self, layer: int, names: tuple[str, ...], dtype: torch.dtype) -> GroupWeights | None:
        """Weights of the adapted maps of one group; None when none of them is adapted."""
        if not names:
            return None
        members = [self.pair(layer, name) for name in names]
        return GroupWeights(
            down=torch.cat([pair.down for pair in members]).to(dtype),
            ups=tuple((pair.up * self.scale).to(dtype).t() for pair in members),
        )

    def pair(self, layer: int, name: str) -> LowRankPair:
        """A and B of one map."""
        pair = self.layers[layer].get_submodule(name)
        assert isinstance(pair, LowRankPair)
        return pair

    def targets_of(self, layer: int) -> tuple[str, ...]:
        """The adapted maps of a layer; none of a layer that is left alone."""
        return self.targets if layer in self.adapted_layers else ()

    def groups(self, layer: int) -> tuple[tuple[str, ...], ...]:
        """The adapted maps of each input group of a layer."""
        targets = self.targets_of(layer)
        return tuple(tuple(name for name in names if name in targets) for names in INPUT_GROUPS)

    def options(self) -> dict[str, str | int | float | list[str] | list[int]]:
        """The options that rebuild this adapter for the same base, as plain JSON values.

        `layers` is among them only where some are left alone.
        """
        some = len(self.adapted_layers) < self.sizes.layers
        layers: dict[str, str | int | float | list[str] | list[int]] = (
            {"layers": list(self.adapted_layers)} if some else {}
        )
        return {
            **layers,
            "kind": self.kind,
            "rank": self.rank,
            "targets": list(self.targets),
            "scale": self.scale,
            "update_rule": self.update_rule,
            "key_space": self.key_space,
            "global_tokens": 0 if self.encoder is None else self.encoder.global_tokens.shape[0],
        }
