"""Part `kernels`: the pieces of a decode step alone, each against its own bound.

Decides: which pieces: the matrix products of the base (`weights`), attention over the window by the kernel that a
rollout takes there (`attention`), the products with S (`state_read`), folding one block (`fold`) and choosing tokens
(`sampling`). They say how much of a step's distance to the roofline lies in its kernels and how much between them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pte.bench.arms import attached
from pte.bench.device import peak_memory, repeated_seconds
from pte.bench.gpu_bench import Bench, reading
from pte.bench.rows import Case, Values
from pte.kernels.available import kernels_available
from pte.method.adapter import INPUT_GROUPS, steer
from pte.method.cache import EvictedTokens
from pte.model.load import linear_maps
from pte.model.policy import BoundedPolicy
from pte.model.segment import first_state, fold
from pte.plan.roofline import attention_bound_seconds, weights_bound_seconds
from pte.rollout.sampling import draw_tokens, token_logprobs

if TYPE_CHECKING:
    from pte.bench.gpu_plan import GpuPlan

KERNEL_BATCHES = 3


def kernel_cases(plan: GpuPlan) -> list[Case]:
    """Every piece at the first batches."""
    return [
        Case("kernels", arm, batch, plan.window_tokens)
        for batch in plan.batches[:KERNEL_BATCHES]
        for arm in ("weights", "attention", "state_read", "fold", "sampling")
    ]


@torch.no_grad()
def measure_kernel(bench: Bench, case: Case) -> Values:
    """A row of part `kernels`."""
    makers = {
        "weights": weights_piece,
        "attention": attention_piece,
        "state_read": read_piece,
        "fold": fold_piece,
        "sampling": sampling_piece,
    }
    with peak_memory(bench.device) as peak:
        values = makers[case.arm](bench, case.batch)
    return {**values, "peak_bytes": peak.bytes}


def piece(bench: Bench, batch: int, work: Callable[[], object], *, bound: float, how: str) -> Values:
    """A piece's time against its bound."""
    seconds = repeated_seconds(bench.device, work, repeats=bench.plan.repeats)
    return {
        "sequences": batch,
        "seconds": reading(seconds),
        "bound_seconds": bound,
        "bound_fraction": bound / statistics.median(seconds),
        "how": how,
    }


def weights_piece(bench: Bench, batch: int) -> Values:
    """Every linear map and the head, one after the other."""
    maps = [*linear_maps(bench.base), bench.base.get_output_embeddings()]
    inputs = {
        size: torch.randn(batch, size, dtype=bench.plan.torch_dtype, device=bench.device)
        for size in {linear.in_features for linear in maps}  # type: ignore[union-attr]
    }

    def work() -> None:
        for linear in maps:
            linear(inputs[linear.in_features])  # type: ignore[index, operator, union-attr]

    bound = weights_bound_seconds(bench.work, bench.rates, batch=batch)
    return piece(bench, batch, work, bound=bound, how="all linear maps of the base and the head, one token a row")


def attention_piece(bench: Bench, batch: int) -> Values:
    """Grouped-query attention over prompt and full window in every layer."""
    plan, shape = bench.plan, bench.shape
    attended = plan.prompt_tokens + plan.window_tokens

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, shape.head_dim, dtype=plan.torch_dtype, device=bench.device)

    keys_and_values = [
        (random(shape.kv_heads, attended), random(shape.kv_heads, attended)) for _ in range(shape.layers)
    ]
    query = random(shape.heads, 1)
    fused = bench.device.type == "cuda" and kernels_available(bench.device)
    if fused:
        from pte.kernels.attention import decode_attention, filled_ends

        positions = torch.arange(attended, device=bench.device).repeat(batch, 1)
        flat, scaling = query[:, :, 0], shape.head_dim**-0.5

        def work() -> None:
            ends = filled_ends(positions)
            for keys, values in keys_and_values:
                decode_attention(flat, keys, values=values, positions=positions, ends=ends, scaling=scaling)

    else:

        def work() -> None:
            for keys, values in keys_and_values:
                functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    bound = attention_bound_seconds(bench.work, bench.rates, batch=batch, attended_tokens=attended)
    kernel = "our kernel" if fused else "library kernel"
    return piece(bench, batch, work, bound=bound, how=f"{kernel}, {attended} tokens, all layers")


def read_piece(bench: Bench, batch: int) -> Values:
    """S (B x) of every adapted input, all layers."""
    plan, shape = bench.plan, bench.shape
    size = (batch, plan.rank, plan.rank)
    states = [torch.randn(size, device=bench.device) for _ in range(shape.layers)]
    lows = [
        torch.randn(batch, len(names), plan.rank, dtype=plan.torch_dtype, device=bench.device) for names in INPUT_GROUPS
    ]

    def work() -> None:
        for state in states:
            for low in lows:
                steer(low, state)

    # The four groups of a layer read the same S: from memory once, then from the device's cache.
    bound = sum(state.nbytes for state in states) / bench.rates.bytes_per_second
    how = "products with S of all input groups and layers by torch; the fused step has them in its kernels instead"
    return piece(bench, batch, work, bound=bound, how=how)


def fold_piece(bench: Bench, batch: int) -> Values:
    """One block of every sequence folded into its state."""
    plan, shape = bench.plan, bench.shape
    schedule = plan.schedule(plan.window_tokens)
    block = schedule.evict_tokens
    assert block is not None
    size = (shape.layers, batch, block, shape.kv_dim)
    keys, values = (torch.randn(size, dtype=plan.torch_dtype, device=bench.device) for _ in range(2))
    positions = torch.arange(block, device=bench.device).expand(batch, -1).contiguous()
    evicted = EvictedTokens(keys=keys, values=values, positions=positions)
    with attached(bench.base, "thought", rank=plan.rank, global_tokens=plan.global_tokens) as adapter:
        policy = BoundedPolicy(bench.base, adapter, schedule)
        first = first_state(policy)
        assert first is not None
        state = first[:, None].repeat(1, batch, 1, 1)
        bound = (keys.nbytes + values.nbytes + 2 * state.nbytes) / bench.rates.bytes_per_second
        return piece(
            bench,
            batch,
            lambda: fold(policy, state, evicted),
            bound=bound,
            how=f"one eviction of {block} tokens in every sequence; a decode step bears 1/{block} of it",
        )


def sampling_piece(bench: Bench, batch: int) -> Values:
    """Logits to log-probs to one token of every sequence."""
    plan = bench.plan
    logits = torch.randn(batch, bench.shape.vocab, dtype=plan.torch_dtype, device=bench.device)
    uniforms = torch.rand(batch, device=bench.device)
    bound = logits.nbytes / bench.rates.bytes_per_second
    return piece(
        bench,
        batch,
        lambda: draw_tokens(token_logprobs(logits, 1.0), uniforms, greedy=False),
        bound=bound,
        how="log-softmax and draw; the bound reads the logits once",
    )
