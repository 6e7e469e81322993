"""Where other libraries meet pte: one module per library, each importable only where that library is installed.

May import: everything of pte up to `learn`, and its own library; nothing below imports this room. Start with
`peft.py`, then `peft_tuner.py`: a saved adapter as PEFT's own functions read and write it. `trl.py` trains such an
adapter in TRL's loop.
"""
