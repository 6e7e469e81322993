"""The only room that knows Transformers: loading a base, adapting its linear maps, running its layers.

May import: torch, transformers, safetensors, `pte.method`, `pte.kernels`. Start with `policy.py` (base + adapter +
budget), then `segment.py` (many tokens at once), `decode.py` (one token of every sequence) and `fused.py` (the same on
a GPU).
"""
