"""The report: one HTML page, figures and tables from the JSON of any runs, and from that JSON alone.

May import what scores (`tasks.scoring`), nothing that trains or runs a model. Start with `command.py`; then `runs.py`
(what is read), `measurements.py` and `statistics.py` (what is said of it), `sections.py` (what is shown), `page.py`.
"""
