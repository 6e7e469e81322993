"""Completion scripts: the same lists as bash, zsh and fish want them.

Decides: how each shell is told. An experiment is a .toml file as the first word; a flag that repeats goes on taking its
choices until the next flag. Does not know commands. bash: 3.2 and newer, also with `--flag=value`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Takes = tuple[str, ...] | Literal["file", "experiment", "value", "nothing"]


@dataclass(frozen=True)
class CompletedFlag:
    """A flag.

    Args:
        names: With their dashes; more than one for a switch with an opposite, and where a short one is the same.
        help: One sentence.
        takes: What follows it.
        repeats: Whether it takes several words.
    """

    names: tuple[str, ...]
    help: str
    takes: Takes
    repeats: bool


@dataclass(frozen=True)
class CompletedCommand:
    """A command.

    Args:
        name: As it is typed.
        help: One sentence.
        flags: In the order of its help.
        takes: What its words without a flag are.
    """

    name: str
    help: str
    flags: tuple[CompletedFlag, ...]
    takes: Takes


BASH = r"""# Completion of pte for bash. Read it once: source <(pte completion bash)
_pte() {
  local IFS=$'\n' command=${COMP_WORDS[1]} word=${COMP_WORDS[COMP_CWORD]} flag='' repeats='' takes='' flags='' index
  COMPREPLY=()
  # bash splits --flag=value into three words.
  [[ $word == '=' ]] && word=''
  for ((index = COMP_CWORD - 1; index > 1; index--)); do
    if [[ ${COMP_WORDS[index]} == --* ]]; then
      flag=${COMP_WORDS[index]}
      break
    fi
  done
  local between=$((COMP_CWORD - index))
  [[ $flag && ${COMP_WORDS[index + 1]} == '=' && $between -gt 1 ]] && ((between--))
  if [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=($(compgen -W $'@COMMANDS@' -- "$word"))
    return
  fi
  case $command in
@OF_COMMANDS@
    *) return ;;
  esac
  local own=$takes
  takes=''
  case $command:$flag in
@OF_FLAGS@
  esac
  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
    return
  fi
  # Behind a flag that takes one word, or nothing, come the command's own words.
  [[ $flag && $takes && ($between -eq 1 || $repeats) ]] || takes=$own
  case $takes in
    '@nothing' | '@value') ;;
    '@file') _pte_files '' ;;
    '@experiment') [[ $COMP_CWORD -eq 2 ]] && _pte_files '!*.toml' ;;
    *) COMPREPLY=($(compgen -W "$takes" -- "$word")) ;;
  esac
  [[ $takes == '@nothing' || $takes == '@experiment' ]] && [[ ! $word && ${#COMPREPLY[@]} -eq 0 ]] \
    && COMPREPLY=($(compgen -W "$flags"))
  return 0
}
_pte_files() {
  type compopt >/dev/null 2>&1 && compopt -o filenames 2>/dev/null
  COMPREPLY=($(compgen -f -X "$1" -- "$word") $([[ $1 ]] && compgen -d -- "$word"))
}
complete -F _pte pte
"""


def bash_script(commands: Sequence[CompletedCommand]) -> str:
    """The script for bash."""
    of_commands = [
        f"    {one.name}) takes={bash_words(taken(one.takes))}\n"
        f"      flags={bash_words(name for flag in one.flags for name in flag.names)} ;;"
        for one in commands
    ]
    cases: dict[tuple[Takes, bool], list[str]] = {}
    for command in commands:
        for flag in command.flags:
            if flag.takes != "nothing":
                patterns = cases.setdefault((flag.takes, flag.repeats), [])
                patterns += [f"{command.name}:{name}" for name in flag.names]
    of_flags = [
        f"    {' | '.join(patterns)})\n      takes={bash_words(taken(takes))} repeats={'1' if repeats else ''} ;;"
        for (takes, repeats), patterns in cases.items()
    ]
    return (
        BASH.replace("@COMMANDS@", r"\n".join(one.name for one in commands))
        .replace("@OF_COMMANDS@", "\n".join(of_commands))
        .replace("@OF_FLAGS@", "\n".join(of_flags))
    )


def taken(takes: Takes) -> Iterable[str]:
    """Choices, or the one word that stands for something else."""
    return takes if isinstance(takes, tuple) else (f"@{takes}",)


def bash_words(words: Iterable[str]) -> str:
    """Words as one quoted value, a line each."""
    return "$'" + r"\n".join(words) + "'"


def zsh_script(commands: Sequence[CompletedCommand]) -> str:
    """The script for zsh, for a file `_pte` in `fpath` or to be read after compinit."""
    described = "\n".join(f"    {zsh_quoted(f'{one.name}:{one.help}')}" for one in commands)
    cases = []
    for command in commands:
        specs = [f"'(- *)'{{-h,--help}}{zsh_quoted('[show the help]')}"]
        for flag in command.flags:
            if "--help" in flag.names:
                continue
            says = zsh_escaped(flag.help)
            values = {"file": ":file:_files", "value": ":value: "}.get(str(flag.takes), "")
            if isinstance(flag.takes, tuple):
                values = f":value:({' '.join(flag.takes)})"
            if flag.repeats and values:
                values = f":*-*{values}"
            specs += [zsh_quoted(f"{name}[{says}]{values}") for name in flag.names]
        if isinstance(command.takes, tuple):
            specs.append(zsh_quoted(f"1:{command.name}:({' '.join(command.takes)})"))
        elif command.takes == "experiment":
            specs.append(zsh_quoted('1:experiment:_files -g "*.toml"'))
        elif command.takes == "file":
            specs.append(zsh_quoted("*:file:_files"))
        joined = " \\\n        ".join(specs)
        cases.append(f"    {command.name})\n      _arguments -S \\\n        {joined} ;;")
    return f"""#compdef pte
# Completion of pte for zsh: a file _pte in a directory of fpath, or read after compinit.
_pte() {{
  local -a commands
  commands=(
{described}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{chr(10).join(cases)}
  esac
}}
if [[ $funcstack[1] == _pte ]]; then
  _pte "$@"
else
  compdef _pte pte
fi
"""


def zsh_quoted(text: str) -> str:
    """A text between single quotes."""
    return "'" + text.replace("'", "'\\''") + "'"


def zsh_escaped(text: str) -> str:
    """A text in which nothing ends a description."""
    return text.replace("\\", "").replace("[", "(").replace("]", ")").replace(":", " ")


def fish_script(commands: Sequence[CompletedCommand]) -> str:
    """The script for fish."""
    lines = [
        "# Completion of pte for fish: a file pte.fish in ~/.config/fish/completions.",
        "function __pte_command_is",
        "    set -l words (commandline -opc)",
        "    test (count $words) -ge 2; and contains -- $words[2] $argv",
        "end",
        "function __pte_words_are",
        "    test (count (commandline -opc)) -eq $argv[1]",
        "end",
        "function __pte_flag_is",
        "    set -l flags (string match -- '--*' (commandline -opc))",
        "    test (count $flags) -ge 1; and contains -- $flags[-1] $argv",
        "end",
        "complete -c pte -f",
    ]
    for command in commands:
        lines.append(f"complete -c pte -n '__pte_words_are 1' -a {command.name} -d {fish_quoted(command.help)}")
    for command in commands:
        here = f"__pte_command_is {command.name}"
        if isinstance(command.takes, tuple):
            lines.append(
                f"complete -c pte -n '{here}; and __pte_words_are 2' -a {fish_quoted(' '.join(command.takes))}"
            )
        elif command.takes == "experiment":
            first = f"complete -c pte -n '{here}; and __pte_words_are 2'"
            lines.append(f"{first} -a '(__fish_complete_suffix .toml)'")
        elif command.takes == "file":
            lines.append(f"complete -c pte -n '{here}' -F")
        for flag in command.flags:
            takes = "" if flag.takes == "nothing" else " -r -F" if flag.takes == "file" else " -x"
            if isinstance(flag.takes, tuple):
                takes += f" -a {fish_quoted(' '.join(flag.takes))}"
            if flag.repeats and isinstance(flag.takes, tuple):
                again = f"{here}; and __pte_flag_is {' '.join(flag.names)}"
                lines.append(f"complete -c pte -n '{again}' -a {fish_quoted(' '.join(flag.takes))}")
            names = " ".join(f"-l {name.removeprefix('--')}" for name in flag.names)
            lines.append(f"complete -c pte -n '{here}' {names}{takes} -d {fish_quoted(flag.help)}")
    return "\n".join(lines) + "\n"


def fish_quoted(text: str) -> str:
    """A text between single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
