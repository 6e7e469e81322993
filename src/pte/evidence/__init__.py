"""Measurements that answer the questions of the evidence: what they cost so far.

May import everything but the commands. Start with `cost.py` (one arm's wall time, FLOPs and memory), then `step.py`
(the step that is measured) and `flops.py` (what is counted).
"""
