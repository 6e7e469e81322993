"""The thought state: evicted keys and values folded into one rank x rank matrix per layer and sequence.

Decides: what an evicted token writes (`ThoughtEncoder.address`, `content`), how a block of them enters the running
state (`fold`, by update rule) and what the adapters read (`read`). Does not know: models, caches, adapters, when an
eviction happens.

Paper: Section 3.  S_e' = (W_Q^a q_g)(W_K^a K_e)^T (W_V^a V_e);  S_e <- Normalize(S_e + S_e').
Deviations: 1. q_g has `rank` query rows and S is per layer and per sequence; 2. Normalize is the Frobenius norm
scaled to sqrt(rank), so that S = I has the right size; 3. two rules of ours: `read` keeps the plain sum and normalises
only when it is read; `delta` (default) first removes what the state already answers to a token's key, and also
normalises only when it is read; 4. the global tokens pass through the base's own key and value projections; 5. S' is
transposed: with row vectors, x A S B, the paper's product meets the keys with x, with column vectors, A S B x, it
would meet the values; the first reading learned the chained task three times as fast (docs/log.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

UpdateRule = Literal["delta", "read", "paper"]
KeySpace = Literal["pre_rotary", "post_rotary"]
PAPER_KEY_SCALE = 0.004
"""Initial size of W_K under rule `paper`. Normalize gives the old state the size sqrt(rank) before every S', so a large
S' forgets everything at once: on the chained task 23 % with 1, 68 % with 0.1, 94 % with 0.004 (docs/log.md)."""


GLOBAL_TOKEN_SIZE = 0.02
"""Standard deviation of fresh global tokens, that of embeddings in most models. Tokens of size 1 fill every direction
of a first state with noise that a query reads along: on recall 24 % of the answers right with them, 45 % with none."""


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
        update_rule: `delta`, `read` or `paper`.
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
        if update_rule == "paper":
            self.key_map.data *= PAPER_KEY_SCALE
        self.value_map = orthogonal()
        tokens = torch.randn(global_tokens, hidden_size, generator=generator)
        self.global_tokens = nn.Parameter(GLOBAL_TOKEN_SIZE * tokens)

    def mapped(
        self,
        keys: Float[Tensor, "layers batch evicted kv_dim"],
        values: Float[Tensor, "layers batch evicted kv_dim"],
    ) -> tuple[Float[Tensor, "layers batch evicted rank"], Float[Tensor, "layers batch evicted rank"]]:
        """What each evicted token is stored under, (W_Q q_g)(W_K k), and what is stored, W_V v."""
        dtype, size = self.key_map.dtype, keys.shape[1:3]
        queries = torch.einsum("lqd,lrd->lqr", self.query, self.query_map)
        # Sequences and tokens side by side: one product a layer.
        addresses = keys.to(dtype).flatten(1, 2) @ self.key_map.transpose(1, 2) @ queries.transpose(1, 2)
        contents = values.to(dtype).flatten(1, 2) @ self.value_map.transpose(1, 2)
        return addresses.unflatten(1, size), contents.unflatten(1, size)

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
        addresses, contents = self.mapped(keys, values)
        return contents.transpose(2, 3) @ addresses

    def fold(
        self,
        state: Float[Tensor, "layers batch rank rank"],
        keys: Float[Tensor, "layers batch evicted kv_dim"],
        values: Float[Tensor, "layers batch evicted kv_dim"],
    ) -> Float[Tensor, "layers batch rank rank"]:
        """The running state after an eviction.

        Rule `paper`: Normalize(S + S'). Rule `read`: S + S'. Rule `delta`: `corrected`.

        Paper: S_e <- Normalize(S_e + S_e').
        """
        if self.update_rule == "delta":
            return corrected(state, *self.mapped(keys, values))
        total = state + self.encode(keys, values)
        return normalize(total) if self.update_rule == "paper" else total

    def first_state(
        self,
        keys: Float[Tensor, "layers tokens kv_dim"],
        values: Float[Tensor, "layers tokens kv_dim"],
    ) -> Float[Tensor, "layers rank rank"]:
        """The state before any eviction, from the keys and values k_g, v_g of the global tokens.

        The global tokens are folded into nothing, as if they were the first to be evicted.

        Paper: S_e = (W_Q^a q_g)(W_K^a k_g)^T (W_V^a v_g).
        """
        nothing = torch.zeros(len(keys), 1, self.rank, self.rank, dtype=self.key_map.dtype, device=keys.device)
        return self.fold(nothing, keys[:, None], values[:, None])[:, 0]

    @timed("read")
    def read(self, state: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch rank rank"]:
        """What the adapters multiply with: Frobenius norm sqrt(rank) under every rule."""
        return state if self.update_rule == "paper" else normalize(state)


def corrected(
    state: Float[Tensor, "layers batch rank rank"],
    addresses: Float[Tensor, "layers batch evicted rank"],
    contents: Float[Tensor, "layers batch evicted rank"],
) -> Float[Tensor, "layers batch rank rank"]:
    """The state after the normalised delta rule, a token after the other in the order given.

    Equals: for each token with address u and content v, S <- S + (v - S u) u^T / (1 + |u|^2). A token overwrites the
    share |u|^2 / (1 + |u|^2) of what S answers to its address and leaves all other directions alone, so that an answer
    never overshoots and a token with a small address writes little. |S| itself has no bound; what is read has. Solved
    at once: the corrections d_i = (v_i - S_i u_i) g_i with g_i = 1 / (1 + |u_i|^2) obey
    (I + g tril(U U^T, -1)) D = g (V - U S^T), and S_new = S + D^T U.
    """
    gains = 1 / (1 + addresses.square().sum(-1, keepdim=True))
    overlaps = gains * (addresses @ addresses.transpose(2, 3))
    wanted = gains * (contents - addresses @ state.transpose(2, 3))
    # Ones on the diagonal are implied, and what lies above it is not read.
    corrections = torch.linalg.solve_triangular(overlaps, wanted, upper=False, unitriangular=True)
    return state + corrections.transpose(2, 3) @ addresses
