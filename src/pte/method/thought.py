"""The thought state: evicted keys and values folded into one rank x rank matrix per layer and sequence.

Decides: how evicted tokens become S' (`ThoughtEncoder.encode`), how S' enters the running sum (`accumulate`) and
what the adapters read (`read`). Does not know: models, caches, adapters, when an eviction happens.

Paper: Section 3.  S_e' = (W_Q^a q_g)(W_K^a K_e)^T (W_V^a V_e);  S_e <- Normalize(S_e + S_e').
Deviations: 1. q_g has `rank` query rows and S is per layer and per sequence; 2. Normalize is the Frobenius norm
scaled to sqrt(rank), so that S = I has the right size; 3. rule `read` (ours) keeps the plain sum and normalises only
when it is read; 4. the global tokens pass through the base's own key and value projections; 5. S' is transposed:
with row vectors, x A S B, the paper's product meets the keys with x, with column vectors, A S B x, it would meet the
values; the first reading learned the chained task three times as fast (docs/log.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

UpdateRule = Literal["read", "paper"]
KeySpace = Literal["pre_rotary", "post_rotary"]


def normalize(state: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch rank rank"]:
    """S scaled to Frobenius norm sqrt(rank), the size of the identity; the zero state stays zero.

    Paper: Normalize in S_e <- Normalize(S_e + S_e').
    """
    rank = state.shape[-1]
    squared = state.square().sum((-2, -1), keepdim=True)
    return state * (rank**0.5 * torch.rsqrt(squared + torch.finfo(state.dtype).tiny ** 0.5))


class ThoughtEncoder(nn.Module):
    """Folds keys and values into states, for all layers in one call. Parameters are stacked over layers, float32.

    Args:
        layers: Decoder layers.
        kv_dim: Numbers of a token's keys in one layer, heads concatenated.
        hidden_size: Width of the global tokens.
        rank: Size of the state.
        global_tokens: Number n of learnable global tokens h_g, 0 allowed (the first state is then zero).
        update_rule: `read` or `paper`.
        generator: Source of the initial values.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_dim: int,
        hidden_size: int,
        rank: int,
        global_tokens: int,
        update_rule: UpdateRule,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.update_rule: UpdateRule = update_rule

        def orthogonal() -> nn.Parameter:
            stacked = torch.empty(layers, rank, kv_dim)
            for layer in stacked:
                nn.init.orthogonal_(layer, generator=generator)
            return nn.Parameter(stacked)

        # W_Q q_g starts as the identity: S' is then the plain sum of outer products, spread over all its directions.
        self.query_map = orthogonal()
        self.query = nn.Parameter(self.query_map.detach().clone())
        self.key_map = orthogonal()
        self.value_map = orthogonal()
        tokens = torch.randn(global_tokens, hidden_size, generator=generator)
        self.global_tokens = nn.Parameter(tokens)

    def encode(
        self,
        keys: Float[Tensor, "layers batch evicted kv_dim"],
        values: Float[Tensor, "layers batch evicted kv_dim"],
    ) -> Float[Tensor, "layers batch rank rank"]:
        """S' = ((W_Q q_g) (K W_K^T)^T (V W_V^T))^T: a sum of outer products value x (query . key), no softmax.

        The adapter multiplies S from the left with A and from the right with B x, so what B extracts from the
        running token meets the keys, and A writes out the values that were stored with them.

        Paper: the definition of S_e', transposed (deviation 5).
        """
        dtype = self.key_map.dtype
        queries = torch.einsum("lqd,lrd->lqr", self.query, self.query_map)
        mapped_keys = keys.to(dtype) @ self.key_map.transpose(1, 2)[:, None]
        mapped_values = values.to(dtype) @ self.value_map.transpose(1, 2)[:, None]
        weights = queries[:, None] @ mapped_keys.transpose(2, 3)
        return mapped_values.transpose(2, 3) @ weights.transpose(2, 3)

    def accumulate(
        self, state: Float[Tensor, "layers batch rank rank"], update: Float[Tensor, "layers batch rank rank"]
    ) -> Float[Tensor, "layers batch rank rank"]:
        """The running state after an eviction.

        Paper: S_e <- Normalize(S_e + S_e'). Rule `read`: the plain sum.
        """
        return normalize(state + update) if self.update_rule == "paper" else state + update

    def first_state(
        self,
        keys: Float[Tensor, "layers tokens kv_dim"],
        values: Float[Tensor, "layers tokens kv_dim"],
    ) -> Float[Tensor, "layers rank rank"]:
        """The state before any eviction, from the keys and values k_g, v_g of the global tokens.

        Paper: S_e = (W_Q^a q_g)(W_K^a k_g)^T (W_V^a v_g).
        """
        update = self.encode(keys[:, None], values[:, None])
        return self.accumulate(torch.zeros_like(update), update)[:, 0]

    @timed("read")
    def read(self, state: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch rank rank"]:
        """What the adapters multiply with: Frobenius norm sqrt(rank) under either rule."""
        return normalize(state) if self.update_rule == "read" else state
