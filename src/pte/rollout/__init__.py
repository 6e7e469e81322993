"""Prompts to completions and their log-probs: sampling, generate, replay.

May import: torch, `pte.method`, `pte.model`. Start with `record.py` (the spine), then `generate.py`, then `replay.py`.
"""
