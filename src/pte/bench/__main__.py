"""`python -m pte.bench --preset cpu [--output FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pte.bench.run import run_preset


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses arguments and runs; 0 when measured, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m pte.bench",
        description="Measures rollout, training step and memory beside Transformers, in one run.",
        epilog="The last line of stdout is one JSON object. Example: python -m pte.bench --preset cpu "
        "--output benchmarks/baselines/cpu-tiny-w64.json",
    )
    parser.add_argument("--preset", default="cpu", help="what is measured (default: cpu)")
    parser.add_argument("--output", type=Path, default=None, help="file that also gets the JSON")
    options = parser.parse_args(arguments)
    try:
        run_preset(options.preset, output=options.output)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
