"""What can follow what on a command line of `pte`, as a script that bash, zsh or fish reads once.

Decides: what each command and each flag takes, read off the parser's own flags, so that nothing is listed twice. The
scripts hold all of it: no Python runs when a key is pressed. Does not know how a shell completes
(`completion_scripts.py`).
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from typing import Literal

import tyro

from pte.arguments import ARGUMENTS, OVERVIEW, PLAN_FLAGS, PlanArguments, takes_experiment
from pte.completion_scripts import CompletedCommand, CompletedFlag, Takes, bash_script, fish_script, zsh_script

Shell = Literal["bash", "zsh", "fish"]
SCRIPTS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}


def completion_script(shell: Shell) -> str:
    """The script for a shell."""
    return SCRIPTS[shell](completed_commands())


def completed_commands() -> list[CompletedCommand]:
    """Every command with what may follow it, in the order of the overview."""
    summaries = dict(re.findall(r"^  (\w+) +(\w.*)$", OVERVIEW.partition("examples:")[0], re.MULTILINE))
    commands = []
    for name, kind in ARGUMENTS.items():
        with warnings.catch_warnings():
            # tyro warns of its removal some day; until then its flags are those that tyro.cli takes.
            warnings.simplefilter("ignore", DeprecationWarning)
            actions = tyro.extras.get_parser(kind)._actions
        positional = [action for action in actions if not action.option_strings]
        words: Takes = "experiment" if takes_experiment(name) else "nothing"
        flags = tuple(
            CompletedFlag(
                names=flag_names(action.option_strings, kind),
                help=first_sentence(action.help or ""),
                takes=what(action),
                repeats=action.nargs in ("*", "+"),
            )
            for action in actions
            if action.option_strings
        )
        commands.append(
            CompletedCommand(name, summaries[name], flags, takes=what(positional[0]) if positional else words)
        )
    return commands


def flag_names(options: Sequence[str], kind: type) -> tuple[str, ...]:
    """A flag with its dashes, its opposite if it is a switch and, of `pte plan`, what is short for it."""
    names = tuple(option for option in options if option.startswith("--"))
    short = PLAN_FLAGS.items() if kind is PlanArguments else ()
    return names + tuple(word for word, name in short if name in names)


def what(action: argparse.Action) -> Takes:
    """What an argument takes: its choices, a file, a value that nothing can guess, or nothing."""
    if action.nargs == 0:
        return "nothing"
    if action.choices:
        choices = [str(choice) for choice in action.choices]
        # Beside None they come in an order that differs from one process to the next.
        return tuple(sorted({*choices} - {"None"}) if "None" in choices else choices)
    shown = action.metavar if isinstance(action.metavar, str) else ""
    # A path is a string to the parser, and so is whatever else is free text, where a file's name does no harm.
    return "file" if not action.option_strings or "STR" in shown else "value"


def first_sentence(text: str) -> str:
    """The first sentence of a help text, plain."""
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m|`", "", text).split())
    return re.split(r"(?<=\w)[.;:] | \(default", plain)[0].rstrip(".")
