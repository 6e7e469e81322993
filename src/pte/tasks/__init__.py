"""Problems with verifiable answers, and how well a policy does on them.

`problems.py` reads problem files and writes prompts, `overlap.py` finds evaluation problems in a training set,
`chained.py` generates the embedded task, `scoring.py` holds the statistics; these four import no other room of
pte and not Transformers. `evaluate.py` samples completions and scores them, so it imports the rollout and model
rooms. Start with `problems.py`.
"""
