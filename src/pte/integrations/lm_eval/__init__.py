"""PTE models in lm-evaluation-harness, under the name `pte`, and problem files as its tasks.

Importing this room makes the name known to the harness; `import pte` does so wherever lm_eval is imported, too. The
command `lm_eval` itself imports nothing of ours: it knows the name once it reads a task file of `problems/`, or when it
is started as `python -m pte.integrations.lm_eval` with the same words. Start with `model.py`.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import lm_eval.models  # noqa: F401  (the harness fills its list of models by this import, and only while it is empty)
from lm_eval.api.registry import model_registry

LM_EVAL_VERSIONS = "0.4."
LEAST_PATCH = 13
PROBLEMS_DIRECTORY = Path(__file__).with_name("problems")

installed = version("lm_eval")
if not (installed.startswith(LM_EVAL_VERSIONS) and int(installed.split(".")[2]) >= LEAST_PATCH):
    raise ImportError(
        f"pte needs lm_eval {LM_EVAL_VERSIONS}{LEAST_PATCH} or a later {LM_EVAL_VERSIONS}x, got {installed}; install "
        f"pte[eval]"
    )

model_registry.register("pte", target="pte.integrations.lm_eval.model:BoundedLM")
