"""Which reasoning tokens leave the cache: one policy = one file = one class.

May import: torch and `pte.method.schedule`. Start with `policy.py`, the protocol; `window.py` is the paper's policy;
`scored.py` is what policies that rank tokens by a score share.
"""
