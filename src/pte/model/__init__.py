"""The only room that knows Transformers: loading a base, adapting its linear maps, running its layers.

May import: torch, transformers, safetensors, `pte.method`. Start with `policy.py` (base + adapter + budget), then
`segment.py` (many tokens at once) and `decode.py` (one token of every sequence).
"""
