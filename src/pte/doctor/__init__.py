"""`pte doctor`: what is installed, what the machine offers, which fast paths are on, and whether the laws hold here.

`findings.py` is what a line of the report is; `installed.py` looks at packages, `machine.py` at devices,
`self_check.py` runs the embedded reasoner; `command.py` puts them together. Start there.
"""
