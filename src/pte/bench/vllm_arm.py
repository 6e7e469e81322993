"""vLLM beside the others where it is installed: the same shape with random weights, whole completions.

Decides: how it is asked. It draws its own weights (`load_format="dummy"`), reads token ids, stops at nothing, and gets
the memory that the others leave. Its time holds prefill and decode.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pte.bench.device import elapsed_seconds, free_bytes
from pte.bench.gpu_bench import Bench, reading
from pte.bench.rows import NotMeasured, Values, first_line
from pte.bench.workload import random_ids
from pte.plan.shapes import model_config

if TYPE_CHECKING:
    from pte.plan.shapes import ModelShape

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
LEFT_FREE_BYTES = 4 * 2**30
WARM_UP_TOKENS = 16


def write_config(shape: ModelShape, folder: str) -> None:
    """The configuration of a shape as a checkpoint's `config.json`, without weights."""
    fields = model_config(shape).to_dict()
    fields |= {"architectures": [ARCHITECTURES[shape.architecture]]}
    (Path(folder) / "config.json").write_text(json.dumps(fields, default=str))


def vllm_values(bench: Bench, *, batch: int, tokens: int) -> Values:
    """Whole completions by vLLM.

    Raises:
        NotMeasured: It is not installed, needs CUDA, or fails here.
    """
    if importlib.util.find_spec("vllm") is None:
        raise NotMeasured("vllm is not installed")
    free = free_bytes(bench.device)
    if free is None:
        raise NotMeasured("vllm is measured on CUDA only")
    plan = bench.plan
    total = torch.cuda.mem_get_info(bench.device)[1]
    ids = random_ids(bench.shape.vocab, batch=batch, tokens=plan.prompt_tokens)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in ids]
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_config(bench.shape, folder)
            seconds = completion_seconds(
                bench,
                prompts,
                {
                    "model": folder,
                    "load_format": "dummy",
                    "skip_tokenizer_init": True,
                    "dtype": plan.dtype,
                    "max_model_len": plan.prompt_tokens + tokens,
                    "max_num_seqs": batch,
                    "gpu_memory_utilization": (free - LEFT_FREE_BYTES) / total,
                    "enable_prefix_caching": False,
                },
                tokens=tokens,
            )
    except Exception as error:  # Another project's engine: whatever it raises is its reason.
        raise NotMeasured(f"vllm: {first_line(error)}") from error
    finally:
        gc.collect()
    return {
        "sequences": batch,
        "completion_seconds": reading(seconds),
        "tokens_per_second": batch * tokens / statistics.median(seconds),
        "path": "vllm",
        "how": f"whole completions of {tokens} tokens, prompts included, weights of its own",
    }


def completion_seconds(
    bench: Bench, prompts: list[dict[str, list[int]]], options: dict[str, str | int | float | bool], *, tokens: int
) -> list[float]:
    """Seconds of all completions, several readings, after a short run that warms up.

    Args:
        bench: Where.
        prompts: Token ids.
        options: Of the engine.
        tokens: Of each completion.
    """
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(**options)

    def complete(new_tokens: int) -> None:
        sampling = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        engine.generate(prompts, sampling, use_tqdm=False)

    complete(WARM_UP_TOKENS)
    return bench.readings(lambda _: elapsed_seconds(bench.device, lambda: complete(tokens)))
