"""The paper, in tensors: schedule, eviction, cache, attention, thought state, adapter.

May import: torch only. Start with `schedule.py` (when tokens leave), then `thought.py` (what becomes of them), then
`adapter.py` (what reads it).
"""
