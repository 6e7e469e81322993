"""The command `pte`: words to arguments to a command, and how errors look.

Decides: how an experiment file, a saved adapter's options and budget, and the user's flags become one configuration
(in this order, the last word is the user's), and exit statuses. Heavy imports come after parsing.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence

import tyro

from pte.arguments import (
    ARGUMENTS,
    EXAMPLES,
    OVERVIEW,
    PLAN_FLAGS,
    CompletionArguments,
    DoctorArguments,
    PlanArguments,
    ServeArguments,
    takes_experiment,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    0 is done, 1 means that the doctor found something wrong, 2 bad input, 3 stopped by a safety check or a lost rank.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(OVERVIEW)
        return 0 if words else 2
    command = words[0]
    if command not in ARGUMENTS:
        import difflib

        close = difflib.get_close_matches(command, ARGUMENTS, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "see pte --help"
        print(f"pte: unknown command {command!r}; {remedy}", file=sys.stderr)
        return 2
    try:
        return run(command, parse(command, words[1:]))
    except KeyboardInterrupt:
        resumed = "; a run goes on with --run.resume" if takes_experiment(command) else ""
        how = "; the same command goes on" if command == "evidence" else resumed
        print(f"\npte: interrupted{how}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        rank = os.environ.get("RANK", "0")
        speaker = command if rank == "0" else f"{command} (rank {rank})"
        print(f"pte {speaker}: {' '.join(str(error).split())}", file=sys.stderr)
        return 3 if type(error).__name__ in ("TrainingStopped", "RankLost") else 2


def run(command: str, parsed: object) -> int:
    """Does what a command does; returns its exit status.

    A shell reads completions as it starts, and the doctor looks where packages are broken: both without what the other
    commands import.
    """
    if isinstance(parsed, CompletionArguments):
        from pte.completion import completion_script

        print(completion_script(parsed.shell), end="")
        return 0
    if isinstance(parsed, DoctorArguments):
        from pte.doctor.command import doctor

        return doctor(output=parsed.output)
    from pte import commands

    commands.run(command, parsed)
    return 0


def parse(command: str, words: Sequence[str]) -> object:
    """The arguments of a command.

    Args:
        command: Its name.
        words: What the user wrote after it: perhaps an experiment file, then flags.

    Raises:
        ValueError, TypeError, FileNotFoundError: The file or a flag is wrong.
    """
    kind = ARGUMENTS[command]
    words = list(words)
    if takes_experiment(command):
        from pte.config_file import flags_from_file, refuse_flags

        refuse_flags(words)
        misplaced = [word for word in words[1:] if word.endswith(".toml")]
        if misplaced:
            raise ValueError(
                f"the experiment file must come first, got {misplaced[0]!r} later; write pte {command} {misplaced[0]} "
                f"and then the flags"
            )
        file_flags = flags_from_file(words.pop(0)) if words and not words[0].startswith("-") else []
        if kind is PlanArguments:
            words = plan_flags(words, has_file=bool(file_flags))
        words = [*file_flags, *adapter_flags([*file_flags, *words]), *words]
    if kind is ServeArguments:
        words = [*budget_flags(words), *words]
    return tyro.cli(
        kind,
        prog=f"pte {command}",
        description=f"{inspect.cleandoc(kind.__doc__ or '')}\n\nexamples:\n  {EXAMPLES[command]}",
        args=words,
    )


def plan_flags(words: Sequence[str], *, has_file: bool) -> list[str]:
    """Flags of the experiment for the short ones of `pte plan`, and what these leave open.

    Args:
        words: What the user wrote after the command and the file.
        has_file: There is an experiment file, which says what nobody else says.
    """
    pairs = [word.partition("=") for word in words]
    # tyro reads an underscore as a dash.
    dashed = [
        (name.replace("_", "-") if name.startswith("--") else name, equals, value) for name, equals, value in pairs
    ]
    flags = [PLAN_FLAGS.get(name, name) + equals + value for name, equals, value in dashed]
    names = {name.partition("=")[0] for name in flags}
    given: list[str] = []
    if "--cache.evict-tokens" not in names:
        for flag, following in zip(flags, [*flags[1:], ""], strict=True):
            name, equals, value = flag.partition("=")
            tokens = value if equals else following
            if name == "--cache.window-tokens" and tokens.isdigit():
                given = ["--cache.evict-tokens", str(max(1, int(tokens) // 4))]
    if not has_file and names & {"--gpu", "--gpu-memory"}:
        given += ["--model.dtype", "bfloat16"]
    return [*given, *flags]


def adapter_flags(flags: Sequence[str]) -> list[str]:
    """Flags with the options of the adapter that `--adapter.checkpoint` names, so that nobody repeats them.

    A PEFT folder of ours says the budget that it was trained with, too.
    """
    path = None
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name == "--adapter.checkpoint":
            path = value if equals else (flags[index + 1] if index + 1 < len(flags) else None)
    if path is None:
        return []
    from pte.lora_folder import saved_fields

    options: list[str] = []
    for name, saved in saved_fields(path).items():
        options.append(f"--{name.replace('_', '-')}")
        options += [str(item) for item in saved] if isinstance(saved, tuple) else [str(saved)]
    return options


def budget_flags(words: Sequence[str]) -> list[str]:
    """Flags with the budget of the first served adapter whose folder has one, so that nobody repeats them."""
    paths = [path for word in words if not word.startswith("-") for path in (word, word.partition("=")[2]) if path]
    if not paths:
        return []
    from pte.peft_folder import saved_budget

    budget = next(filter(None, map(saved_budget, paths)), {})
    options = {name: value for name, value in budget.items() if value is not None}
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


if __name__ == "__main__":
    sys.exit(main())
