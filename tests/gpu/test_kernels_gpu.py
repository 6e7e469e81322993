"""The kernels at the sizes of a 7B model on a GPU, against the naive programs; a captured step against an eager one."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernel_cases import DEVICE, check_close, random
from pte.kernels.attention import decode_attention, filled_ends
from pte.kernels.epilogues import finish_gate_up, finish_qkv, finish_residual
from pte.kernels.float8 import rounded_rows
from pte.kernels.operands import Heads, LowRankUpdate, NewToken
from pte.kernels.reference import (
    decode_attention_reference,
    finish_gate_up_reference,
    finish_qkv_reference,
    finish_residual_reference,
)
from pte.method.attention import DecodeAttention
from pte.method.cache import BoundedCache
from pte.method.float8 import float8_product, float8_refusal, to_float8
from pte.model.decode import DecodeStep
from pte.model.fused import FusedDecodeStep
from pte.model.policy import BoundedPolicy, detach_adapter
from pte.model.segment import adapter_weights
from tiny import tiny_base, tiny_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Qwen2.5-7B: 28 query heads on 4 key heads of 128, hidden 3584, 18944 features.
QUERY_HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FEATURES, RANK, SLOTS = 28, 4, 128, 3584, 18944, 32, 1280
ROWS = (1, 64, 128)
DTYPES = (torch.bfloat16, torch.float32)


def product_and_update(rows: int, widths: tuple[int, ...], *, dtype: torch.dtype) -> tuple[torch.Tensor, LowRankUpdate]:
    outputs = sum(widths)
    product = random(rows, outputs + len(widths) * RANK, seed=1, dtype=dtype)
    up = random(outputs, RANK, seed=2, dtype=dtype, scale=RANK**-0.5)
    state = random(rows, RANK, RANK, seed=3, scale=RANK**-0.5)
    return product, LowRankUpdate(up, tuple(range(len(widths))), state)


def ragged_positions(rows: int) -> torch.Tensor:
    """Prompts of 1 to 256 tokens in 256 slots; windows of 1024 with one block of 128 missing, another in each row."""
    positions = torch.full((rows, SLOTS), -1)
    for row in range(rows):
        length = 1 + row * 37 % 256
        positions[row, :length] = torch.arange(length)
        positions[row, 256:] = torch.arange(256, SLOTS)
        missing = 256 + row % 8 * 128
        positions[row, missing : missing + 128] = -1
    return positions.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_attention_over_a_window_is_the_softmax_over_its_filled_slots(rows: int, dtype: torch.dtype) -> None:
    positions = ragged_positions(rows)
    query = random(rows, QUERY_HEADS, HEAD_DIM, seed=1, dtype=dtype)
    keys, values = (random(rows, KV_HEADS, SLOTS, HEAD_DIM, seed=seed, dtype=dtype) for seed in (2, 3))
    ours = decode_attention(
        query, keys, values=values, positions=positions, ends=filled_ends(positions), scaling=HEAD_DIM**-0.5
    )
    expected = decode_attention_reference(query, keys, values=values, positions=positions, scaling=HEAD_DIM**-0.5)
    check_close(ours, expected, digits=0.3)


@pytest.mark.skipif(float8_refusal(DEVICE) is not None, reason="needs a GPU with float8")
@pytest.mark.parametrize("rows", ROWS)
def test_float8_of_7b_is_rounded_attended_and_multiplied_as_wide_numbers_are(rows: int) -> None:
    x = random(rows, FEATURES, seed=1, dtype=torch.bfloat16)
    left, right = to_float8(x), to_float8(random(HIDDEN, FEATURES, seed=2, dtype=torch.bfloat16))
    codes, scales = rounded_rows(x)
    assert torch.equal(codes.float(), left.codes.float()) and torch.equal(scales, left.scales)
    expected = (left.wide(torch.float32) @ right.wide(torch.float32).t()).to(torch.bfloat16)
    check_close(float8_product(left, right, dtype=torch.bfloat16), expected, digits=0.3)
    positions = ragged_positions(rows)
    query = random(rows, QUERY_HEADS, HEAD_DIM, seed=1, dtype=torch.bfloat16)
    stored = [to_float8(random(rows, KV_HEADS, SLOTS, HEAD_DIM, seed=seed)) for seed in (2, 3)]
    options = {"positions": positions, "scaling": HEAD_DIM**-0.5}
    keys, values = (one.codes for one in stored)
    of_both = tuple(one.scales.to(torch.bfloat16) for one in stored)
    ours = decode_attention(query, keys, values=values, ends=filled_ends(positions), scales=of_both, **options)
    keys, values = (one.wide(torch.bfloat16) for one in stored)
    check_close(ours, decode_attention_reference(query, keys, values=values, **options), digits=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_a_long_cache_that_is_mostly_empty_is_attended_like_a_short_one(rows: int, dtype: torch.dtype) -> None:
    positions = torch.full((rows, 16384), -1, device=DEVICE)
    positions[:, :300] = torch.arange(300, device=DEVICE)
    query = random(rows, 8, 64, seed=1, dtype=dtype)
    keys, values = (random(rows, 2, 300, 64, seed=seed, dtype=dtype) for seed in (2, 3))
    long_keys, long_values = (torch.full((rows, 2, 16384, 64), float("nan"), dtype=dtype, device=DEVICE) for _ in "kv")
    long_keys[:, :, :300], long_values[:, :, :300] = keys, values
    ours = decode_attention(
        query, long_keys, values=long_values, positions=positions, ends=filled_ends(positions), scaling=0.125
    )
    expected = decode_attention_reference(query, keys, values=values, positions=positions[:, :300], scaling=0.125)
    check_close(ours, expected, digits=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_queries_keys_and_values_of_7b_are_the_naive_program_s(rows: int, dtype: torch.dtype) -> None:
    angles = random(4096, 2, 1, HEAD_DIM, seed=5, dtype=dtype)
    heads = Heads(QUERY_HEADS, KV_HEADS, angles, random(2, HEAD_DIM, seed=6, dtype=dtype) + 1, epsilon=1e-6)
    widths = tuple(count * HEAD_DIM for count in (QUERY_HEADS, KV_HEADS, KV_HEADS))
    product, update = product_and_update(rows, widths, dtype=dtype)
    slots = torch.arange(rows, device=DEVICE) * 7 % 40
    ours, theirs = (
        NewToken(
            *(random(rows, KV_HEADS, 40, HEAD_DIM, seed=seed, dtype=dtype) for seed in (7, 8)),
            slots=slots,
            positions=slots * 100,
        )
        for _ in range(2)
    )
    expected = finish_qkv_reference(product, update, heads=heads, token=theirs)
    check_close(finish_qkv(product, update, heads=heads, token=ours), expected)
    check_close(ours.keys, theirs.keys)
    check_close(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_activation_of_7b_is_the_naive_program_s(rows: int, dtype: torch.dtype) -> None:
    product, update = product_and_update(rows, (FEATURES, FEATURES), dtype=dtype)
    expected = finish_gate_up_reference(product, update, features=FEATURES)
    check_close(finish_gate_up(product, update, features=FEATURES), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_residual_of_7b_is_the_naive_program_s(rows: int, dtype: torch.dtype) -> None:
    product, update = product_and_update(rows, (HIDDEN,), dtype=dtype)
    stream, weight = random(rows, HIDDEN, seed=5, dtype=dtype), random(HIDDEN, seed=6, dtype=dtype) + 1
    expected = finish_residual_reference(product, update, residual=stream, weight=weight, epsilon=1e-6)
    summed, normed = finish_residual(product.clone(), update, residual=stream, weight=weight, epsilon=1e-6)
    check_close(summed, expected[0])
    check_close(normed, expected[1])


@cache
def layers_of_7b() -> PreTrainedModel:
    """Two layers of the shape of Qwen2.5-7B."""
    return tiny_base(
        "qwen2",
        dtype=torch.bfloat16,
        hidden_size=HIDDEN,
        intermediate_size=FEATURES,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        initializer_range=0.02,
    ).to(DEVICE)


def policy_of_7b(kind: str | None) -> BoundedPolicy:
    base = layers_of_7b()
    detach_adapter(base)
    return tiny_policy(base=base, dtype=torch.bfloat16, kind=kind, rank=RANK, up_std=0.02, window=1024, block=256)


def held_cache(policy: BoundedPolicy, rows: int) -> BoundedCache:
    cache = BoundedCache.allocate(
        policy.cache_shape, batch=rows, prompt_slots=256, window_slots=1024, dtype=policy.dtype, device=DEVICE
    )
    for seed, stored in enumerate((cache.keys, cache.values)):
        stored.copy_(random(*stored.shape, seed=seed))
    cache.positions.copy_(ragged_positions(rows))
    cache.positions[:, SLOTS - 1] = 2000
    return cache


@pytest.mark.parametrize("kind", ["thought", "lora", None])
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_a_captured_fused_step_is_the_decode_step(rows: int, kind: str | None) -> None:
    policy = policy_of_7b(kind)
    ours, theirs = held_cache(policy, rows), held_cache(policy, rows)
    tokens = torch.arange(rows, device=DEVICE) % 29
    slots, positions = (torch.full((rows,), number, device=DEVICE) for number in (SLOTS - 1, 2000))
    states = random(2, rows, RANK, RANK, seed=9, scale=RANK**-0.5) if kind == "thought" else None
    eager = DecodeStep(policy, adapter_weights(policy), num_positions=4096)
    attention = DecodeAttention(theirs, slots, attended_slots=SLOTS, dtype=policy.dtype)
    expected = eager(tokens, positions=positions, attention=attention, states=states)
    step = FusedDecodeStep(policy, adapter_weights(policy), num_positions=4096)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(tokens, positions=positions, cache=ours, slots=slots, states=states)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = step(tokens, positions=positions, cache=ours, slots=slots, states=states)
    hidden.zero_()
    graph.replay()
    for mine, other in (
        (hidden, expected),
        (ours.keys[..., SLOTS - 1, :], theirs.keys[..., SLOTS - 1, :]),
        (ours.values[..., SLOTS - 1, :], theirs.values[..., SLOTS - 1, :]),
    ):
        assert (mine.float() - other.float()).abs().mean() < 4e-3 * other.float().abs().mean()
