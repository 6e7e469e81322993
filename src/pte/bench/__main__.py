"""`python -m pte.bench --preset cpu [--output FILE]`, `python -m pte.bench --preset gpu [--part PART ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pte.bench.run import BenchRequest, run_bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses arguments and runs; 0 when measured, 2 for bad arguments and for rows that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m pte.bench",
        description="Measures rollout, training step and memory beside Transformers, in one run.",
        epilog="The last line of stdout is one JSON object. Example: python -m pte.bench --preset gpu --part rollout "
        "--output benchmarks/baselines/h200-7b-w1024.json",
    )
    parser.add_argument("--preset", default="cpu", help="cpu (the tiny configuration) or gpu; default: cpu")
    parser.add_argument(
        "--part", nargs="*", default=[], help="of gpu: rollout, long, update, step, kernels, float8; default: all"
    )
    parser.add_argument("--model", default=None, help="of gpu: 3b, 7b, 8b or tiny; default: 7b")
    parser.add_argument("--device", default=None, help="of gpu: cuda, or cpu for the tiny model; default: cuda")
    parser.add_argument("--output", type=Path, default=None, help="file that keeps the result; gpu adds rows to it")
    options = parser.parse_args(arguments)
    try:
        run_bench(
            BenchRequest(
                options.preset,
                parts=tuple(options.part),
                model=options.model,
                device=options.device,
                output=options.output,
            )
        )
    except (ValueError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
