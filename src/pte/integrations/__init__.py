"""Where other libraries meet pte: one module per library, each importable only where that library is installed.

May import: everything of pte, and its own library; nothing below imports this room. Start with `peft.py`, then
`peft_tuner.py`: a saved adapter as PEFT's own functions read and write it. `generate.py` is what Transformers'
`generate` and pipelines run of such a model, `trl.py` trains it in TRL's loop. `lm_eval`: a policy in a test harness.
"""
