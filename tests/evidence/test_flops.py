"""Counted FLOPs are those of the formula, by hand, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from pte.evidence.flops import counted_flops
from pte.method.adapter import LINEAR_MAPS
from pte.method.thought import UpdateRule
from pte.model.policy import BoundedPolicy, layer_sizes
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import RolloutRequest, collate
from pte.rollout.replay import Replay
from tiny import VOCAB, tiny_policy

BATCH, PROMPT, TOKENS, RANK = 3, 5, 20, 4
WINDOW, BLOCK = 8, 4
LAYERS, HIDDEN, HEADS, HEAD_DIM, KV_DIM = 2, 16, 4, 4, 8
# q 16 x 16, k and v 16 x 8, o 16 x 16, gate, up and down 16 x 24: 1920 weights a layer.
WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_DIM + 3 * HIDDEN * 24)
HEAD = HIDDEN * VOCAB


def rollout_flops(policy: BoundedPolicy) -> int:
    engine = RolloutEngine(policy, slots=BATCH, max_new_tokens=TOKENS, temperature=1.0, stop_token_ids=())
    requests = [RolloutRequest(tuple(range(3 + row, 3 + row + PROMPT)), row) for row in range(BATCH)]
    return counted_flops(lambda: engine.run(requests))


def attention(queries: int, keys: int) -> int:
    """Scores and weighted sum of one sequence: two products of (queries, head_dim) and (head_dim, keys) a head."""
    return 2 * 2 * LAYERS * HEADS * HEAD_DIM * queries * keys


def test_a_rollout_of_the_base_with_its_full_cache_is_the_formula() -> None:
    prefill = 2 * WEIGHTS * PROMPT + 2 * HEAD + attention(PROMPT, PROMPT)
    # The last token never enters; token t attends over the prompt, t earlier ones and itself.
    decode = sum(2 * WEIGHTS + 2 * HEAD + attention(1, PROMPT + token + 1) for token in range(TOKENS - 1))
    assert rollout_flops(tiny_policy(kind=None, window=None)) == BATCH * (prefill + decode)


def test_the_window_and_the_adapter_cost_what_the_formula_says() -> None:
    lora = rollout_flops(tiny_policy(kind="lora", window=None)) - rollout_flops(tiny_policy(kind=None, window=None))
    entered = BATCH * (PROMPT + TOKENS - 1)
    maps = layer_sizes(tiny_policy(kind=None).base).maps
    pairs = LAYERS * sum(RANK * sum(maps[name]) for name in LINEAR_MAPS)
    assert lora == 2 * pairs * entered
    full = sum(attention(1, PROMPT + token + 1) for token in range(TOKENS - 1))
    kept = sum(attention(1, PROMPT + min(token + 1, WINDOW)) for token in range(TOKENS - 1))
    window = rollout_flops(tiny_policy(kind=None, window=None)) - rollout_flops(tiny_policy(kind=None))
    assert window == BATCH * (full - kept)


@pytest.mark.parametrize("rule", ["read", "delta"])
def test_folding_and_reading_the_state_cost_what_the_formula_of_the_rule_says(rule: UpdateRule) -> None:
    thought, lora = (
        rollout_flops(tiny_policy(kind=kind, global_tokens=3, update_rule=rule)) for kind in ("thought", "lora")
    )
    entered = BATCH * (PROMPT + TOKENS - 1)
    read = 2 * LAYERS * len(LINEAR_MAPS) * RANK * RANK * entered

    def fold(tokens: int, sequences: int) -> int:
        # W_Q q_g once; then per sequence W_K K and W_V V, queries times keys, values times weights.
        mapped = 2 * tokens * KV_DIM * RANK
        return 2 * LAYERS * (RANK * RANK * KV_DIM + sequences * (mapped + 2 * tokens * RANK * RANK))

    # Keys and values of three global tokens, once; blocks leave before tokens 8, 12 and 16 enter.
    first = 2 * 2 * LAYERS * 3 * HIDDEN * KV_DIM + fold(3, 1)

    # Rule delta also asks what S answers to each address, how addresses overlap, and solves for the corrections.
    def corrected(tokens: int) -> int:
        return LAYERS * (2 * tokens * RANK * RANK + 3 * tokens * tokens * RANK)

    more = 3 * BATCH * corrected(BLOCK) + corrected(3) if rule == "delta" else 0
    assert thought - lora == read + first + 3 * fold(BLOCK, BATCH) + more


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_replay_s_backward_is_counted_with_its_attention(window: int | None) -> None:
    policy = tiny_policy(kind="lora", window=window)
    batch = collate([range(3, 8)] * BATCH, [range(3, 23)] * BATCH, stream_seeds=range(BATCH), temperature=1.0)
    replay = Replay(policy)
    with torch.no_grad():
        forward = counted_flops(lambda: replay(batch))
    if window is None:
        entered = PROMPT + TOKENS - 1
        maps = layer_sizes(policy.base).maps
        pairs = LAYERS * sum(RANK * sum(maps[name]) for name in LINEAR_MAPS)
        assert forward == BATCH * (2 * (WEIGHTS + pairs) * entered + 2 * HEAD * TOKENS + attention(entered, entered))
    whole = counted_flops(lambda: replay(batch).policy_logprobs.sum().backward())
    # Forward without a graph, forward with one, gradients of inputs; weights of the base have no gradient.
    assert 2.8 * forward < whole < 4 * forward
