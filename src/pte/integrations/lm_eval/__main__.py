"""`python -m pte.integrations.lm_eval WORDS`: the command `lm_eval WORDS`, with `--model pte` and our tasks known.

Decides: nothing but the directory of task files, where the user names none. Everything else is the harness's own.
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from pte.integrations.lm_eval import PROBLEMS_DIRECTORY


def main() -> None:
    """Runs the harness's command."""
    words = sys.argv[1:]
    command = words.pop(0) if words and not words[0].startswith("-") else "run"
    if words and not any(word.partition("=")[0] == "--include_path" for word in words):
        words += ["--include_path", str(PROBLEMS_DIRECTORY)]
    sys.argv[1:] = [command, *words]
    cli_evaluate()


if __name__ == "__main__":
    main()
