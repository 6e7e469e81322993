"""Compiles the kernels for a GPU of compute capability 9.0, without one, and prints the shared memory of each as JSON.

A script of its own: where the interpreter is switched on, nothing compiles.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pte.kernels.attention import STAGES
from pte.kernels.attention_programs import attend, combine
from pte.kernels.epilogue_programs import finish_gate_up_program, finish_qkv_program, finish_residual_program
from pte.kernels.epilogues import rank_blocks
from pte.kernels.float8_programs import round_rows_program

TYPES = {
    **dict.fromkeys(("positions", "slots"), "*i64"),
    **dict.fromkeys(("partial_max", "partial_sum", "partial_attended", "state"), "*fp32"),
    **dict.fromkeys(("query", "keys", "values", "attended", "product", "up", "norm", "rotations"), "*bf16"),
    **dict.fromkeys(("activated", "residual", "weight", "summed", "normed"), "*bf16"),
    **dict.fromkeys(("scaling", "epsilon"), "fp32"),
    **dict.fromkeys(("key_scales", "value_scales", "x"), "*bf16"),
    "codes": "*fp8e4nv",
    "scales": "*fp32",
    "ends": "*i32",
}
# What is stored in float8 instead.
FLOAT8_TYPES = {**TYPES, **dict.fromkeys(("keys", "values"), "*fp8e4nv")}
INNERMOST = ("key_channel", "value_channel", "state_in")
# Qwen2.5-7B under a window, at rank 32, as the launches cut it.
ATTENTION = {"KV_HEADS": 4, "GROUP": 7, "HEAD_DIM": 128, "BLOCK_GROUP": 16, "BLOCK_SLOTS": 32, "BLOCK_DIM": 128}
RANKS = {"RANK": 32, "BLOCK_RANK": 32, "CHUNK": 32, "HAS_UPDATE": True, "HAS_STATE": True, "BLOCK_ROWS": 16}
HEADS = {"QUERY_HEADS": 28, "KV_HEADS": 4, "HEAD_DIM": 128, "HAS_NORM": True, "BLOCK_HALF": 64}
PLACES = {"QUERY_PLACE": 0, "KEY_PLACE": 1, "VALUE_PLACE": 2}
PROGRAMS = {
    "attend": (attend, {**ATTENTION, "SPLITS": 1, "FLOAT8": False}, 4, STAGES),
    "attend, split": (attend, {**ATTENTION, "SPLITS": 20, "FLOAT8": False}, 4, STAGES),
    "attend, float8": (attend, {**ATTENTION, "SPLITS": 1, "FLOAT8": True}, 4, STAGES),
    "combine": (combine, {"SPLITS": 20, "HEAD_DIM": 128, "BLOCK_SPLITS": 32, "BLOCK_DIM": 128}, 4, 3),
    "qkv": (finish_qkv_program, {**RANKS, **HEADS, **PLACES, "FLOAT8": False}, 8, 3),
    "qkv, float8": (finish_qkv_program, {**RANKS, **HEADS, **PLACES, "FLOAT8": True}, 8, 3),
    "rows, float8": (round_rows_program, {"BLOCK": 32768}, 16, 3),
    "gate and up": (finish_gate_up_program, {**RANKS, "GATE_PLACE": 0, "UP_PLACE": 1, "BLOCK_COLUMNS": 128}, 8, 3),
    "residual": (
        finish_residual_program,
        {**RANKS, "PLACE": 0, "ROWS": 4, "BLOCK_COLUMNS": 256, "BLOCK_HIDDEN": 4096},
        8,
        3,
    ),
    "residual, no adapter": (
        finish_residual_program,
        {**RANKS, **rank_blocks(None), "PLACE": 0, "ROWS": 1, "BLOCK_COLUMNS": 256, "BLOCK_HIDDEN": 4096},
        8,
        3,
    ),
}


def shared_bytes(name: str) -> int:
    """Shared memory of a compiled program."""
    program, constants, warps, stages = PROGRAMS[name]
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], object] = {}
    aligned = {}
    for index, argument in enumerate(program.arg_names):
        if argument in constants or argument in INNERMOST:
            signature[argument] = "constexpr"
            constexprs[index,] = constants.get(argument, 1)
        else:
            signature[argument] = (FLOAT8_TYPES if constants.get("FLOAT8") else TYPES).get(argument, "i32")
            if signature[argument] != "fp32":
                aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(program, signature, constexprs, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


if __name__ == "__main__":
    print(json.dumps({name: shared_bytes(name) for name in PROGRAMS}))
