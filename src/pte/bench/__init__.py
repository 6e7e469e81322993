"""Figures of speed and memory, beside Transformers in the same run: `python -m pte.bench --preset cpu` or `gpu`.

May import: torch, transformers, `pte.rollout`, `pte.model`, `pte.method`, `pte.timing`, and the torch-only
`pte.learn.loss` and `pte.learn.optimizer`. Start with `figures.py` (what is claimed), then `presets.py` and
`gpu_plan.py` (what is measured), `arms.py` (ours), `plain.py` (theirs), `run.py` and `gpu_run.py` (the order of
measurements), `roofline.py` (what the hardware allows), `memory.py` (how growth is read on a CPU).
"""

from pte.bench.run import BenchRequest, run_bench

__all__ = ["BenchRequest", "run_bench"]
