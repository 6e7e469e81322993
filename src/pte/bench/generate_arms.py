"""Transformers' `generate` at any place of a long completion: the dynamic cache, and the static one, compiled.

Decides: how the library starts there. Its dynamic cache is handed over filled with random keys and values, a token is
left to read, and `generate` goes on. Attention over a static cache covers all of its slots whatever they hold, so that
its steps cost the same anywhere and are timed behind a short prompt. On CUDA the library compiles these steps itself.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache, StaticCache

from pte.bench.device import elapsed_seconds, peak_memory
from pte.bench.gpu_bench import Bench
from pte.bench.plain import generate
from pte.bench.rows import NotMeasured, Values, first_line
from pte.bench.workload import random_ids

if TYPE_CHECKING:
    from transformers import Cache


def filled_cache(bench: Bench, *, batch: int, tokens: int) -> DynamicCache:
    """Random keys and values of so many tokens in every layer."""
    shape, plan = bench.shape, bench.plan
    cache = DynamicCache(config=bench.base.config)
    size = (batch, shape.kv_heads, tokens, shape.head_dim)
    for layer in range(shape.layers):
        keys, values = (torch.randn(size, dtype=plan.torch_dtype, device=bench.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def generate_steps(bench: Bench, *, batch: int, held_tokens: int) -> Values:
    """Steps of `generate` with its dynamic cache.

    Args:
        bench: Where.
        batch: Sequences.
        held_tokens: Tokens that the cache holds at the start.
    """
    steps = bench.plan.timed_steps
    prompts = random_ids(bench.shape.vocab, batch=batch, tokens=held_tokens + 1)

    def seconds_of(new_tokens: int) -> float:
        cache = filled_cache(bench, batch=batch, tokens=held_tokens)
        return elapsed_seconds(bench.device, lambda: generate(bench.base, prompts, new_tokens=new_tokens, cache=cache))

    with peak_memory(bench.device) as peak:
        seconds_of(2)
        readings = bench.readings(lambda _: (seconds_of(steps + 1) - seconds_of(1)) / steps)
    if statistics.median(readings) <= 0:
        raise NotMeasured(f"{steps} steps took no time that the clock sees")
    # The token left to read enters in both runs; the first step that is counted attends to one more, and so on.
    attended = held_tokens + 1 + (steps + 1) / 2
    return {
        **bench.step_values(readings, batch=batch, attended_tokens=attended),
        "path": "generate, dynamic cache, sdpa",
        "peak_bytes": peak.bytes,
        "cache_bytes": batch * (held_tokens + 1 + steps) * bench.work.kv_token_bytes,
        "state_bytes": 0,
        "how": f"{held_tokens} random keys and values held, {steps} steps timed",
    }


def static_steps(bench: Bench, *, batch: int, tokens: int) -> Values:
    """Steps of `generate` with a static cache for a whole completion, compiled by the library on CUDA.

    Raises:
        NotMeasured: The library cannot do it here.
    """
    plan = bench.plan
    slots = plan.prompt_tokens + tokens
    prompts = random_ids(bench.shape.vocab, batch=batch, tokens=plan.prompt_tokens)

    def run(new_tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        cache.reset()
        generate(bench.base, prompts, new_tokens=new_tokens, cache=cache)

    short, long = 1 + plan.timed_steps, 1 + 2 * plan.timed_steps
    try:
        cache: Cache = StaticCache(config=bench.base.config, max_cache_len=slots)
        with peak_memory(bench.device) as peak:
            generate(bench.base, prompts, new_tokens=short, cache=cache)
            first = elapsed_seconds(bench.device, lambda: run(short, 0))
            seconds = bench.steps_by_difference(run, short=short, long=long)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as error:
        raise NotMeasured(f"the library cannot: {first_line(error)}") from error
    finally:
        torch.compiler.reset()
    return {
        **bench.step_values(seconds, batch=batch, attended_tokens=plan.prompt_tokens + tokens / 2),
        "path": "generate, static cache, " + ("compiled" if bench.device.type == "cuda" else "not compiled on a CPU"),
        "peak_bytes": peak.bytes,
        "cache_bytes": batch * slots * bench.work.kv_token_bytes,
        "state_bytes": 0,
        "short_run_seconds": first,
        "how": f"a cache of {slots} slots, all attended to in every step, {plan.timed_steps} steps timed; the bound "
        f"attends to the half that a completion fills on average",
    }
