"""The evidence: the paper's claim and its open questions as measurements, from one command.

`plan.py` says what is measured, `parts.py` what a part of the work does, `run.py` drives the parts of a preset, each
resumable; `cost.py` measures one arm's wall time, FLOPs and memory on the step of `step.py`. May import everything but
the commands; the report reads what is written here. Start with `plan.py`.
"""
