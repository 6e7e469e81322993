"""Problems with verifiable answers, and how well a policy does on them.

`problems.py` reads problem files and writes prompts, `overlap.py` finds evaluation problems in a training set,
`generated.py` says what a family of generated problems is; `chained.py` (the embedded task), `recall.py`,
`permutation.py` and `multiplication.py` are four, `families.py` is their registry; `scoring.py` holds the statistics;
these need neither torch nor Transformers.
`base_training.py` trains small bases on right reasoning, `bases.py` holds their recipes. `evaluate.py` samples
completions and scores them, so it imports the rollout and model rooms. Start with `problems.py`.
"""
