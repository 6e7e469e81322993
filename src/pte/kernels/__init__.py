"""One decode step's small operations as few GPU kernels, each beside the naive program that it equals.

May import: torch; triton in `attention.py`, `epilogues.py` and their `_programs`, which only a step that uses them
imports. Start with `available.py` (where kernels run), then `operands.py` (what they work on), then `reference.py`
(what they compute).
"""
