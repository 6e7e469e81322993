"""Writes the README's table of speed and memory from the files in benchmarks/baselines.

python scripts/bench_table.py
"""

from __future__ import annotations

from pathlib import Path

from pte.bench.table import bench_table, read_baselines, with_table


def main() -> None:
    """Rewrites what stands between the README's markers."""
    root = Path(__file__).parents[1]
    readme = root / "README.md"
    page = readme.read_text(encoding="utf-8")
    readme.write_text(with_table(page, bench_table(read_baselines(root))), encoding="utf-8")


if __name__ == "__main__":
    main()
