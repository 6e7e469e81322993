"""Figures of speed and memory, beside Transformers in the same run: `python -m pte.bench --preset cpu`.

May import: torch, transformers, `pte.rollout`, `pte.model`, `pte.method`, and the torch-only `pte.learn.loss`. Start
with `presets.py` (what is measured), then `arms.py` (ours), `plain.py` (theirs), `run.py` (the order of measurements
and the figures), `memory.py` (how growth is read).
"""

from pte.bench.run import run_preset

__all__ = ["run_preset"]
