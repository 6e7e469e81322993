"""What a shell completes is what the command takes; the scripts are run by the shells themselves where they are there.

bash is part of every system that these tests run on; zsh and fish are asked where they are installed, otherwise their
scripts are compared with the same lists only.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pte.arguments import ARGUMENTS, OVERVIEW, PLAN_FLAGS, takes_experiment
from pte.cli import parse
from pte.completion import completed_commands, completion_script, first_sentence
from pte.method.eviction.registry import POLICIES
from pte.plan.machine import DEVICES

COMMANDS = {command.name: command for command in completed_commands()}


def test_commands_are_completed_in_the_order_of_the_overview() -> None:
    assert list(COMMANDS) == list(ARGUMENTS)
    for command in COMMANDS.values():
        assert f"  {command.name} " in OVERVIEW and command.help in OVERVIEW and command.help


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_flags_that_are_completed_are_those_of_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(name, ["--help"])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).partition("options")[2]
    # A line of the help that describes a flag begins with it, behind the box; a switch names its opposite, too.
    described = re.findall(r"^[│\s]*((?:-h, )?--[a-z][\w.-]*(?:, --[a-z][\w.-]*)?)", shown, re.MULTILINE)
    flags = {flag for line in described for flag in line.replace("-h, ", "").split(", ")}
    short = set(PLAN_FLAGS) if name == "plan" else set()
    assert {flag for one in COMMANDS[name].flags for flag in one.names} == flags | short


def test_an_experiment_is_completed_exactly_where_one_is_read() -> None:
    for name, command in COMMANDS.items():
        assert (command.takes == "experiment") is takes_experiment(name)


def test_a_flag_s_values_are_the_choices_that_the_parser_knows() -> None:
    flags = {name: flag for flag in COMMANDS["train"].flags for name in flag.names}
    assert flags["--cache.policy"].takes == (*POLICIES, "none")
    assert flags["--run.resume"].takes == flags["--run.no-resume"].takes == "nothing"
    assert flags["--train.steps"].takes == "value" and flags["--adapter.checkpoint"].takes == "file"
    assert flags["--adapter.targets"].repeats and not flags["--cache.policy"].repeats
    (gpu,) = (flag for flag in COMMANDS["plan"].flags if flag.names == ("--gpu",))
    assert gpu.takes == tuple(sorted(DEVICES))
    assert COMMANDS["completion"].takes == ("bash", "zsh", "fish") and COMMANDS["report"].takes == "file"


def test_a_help_text_is_cut_to_its_first_sentence() -> None:
    assert first_sentence("Of A, B and S. The paper uses 32. (default: 32)") == "Of A, B and S"
    assert first_sentence("`cpu`, `cuda:1` or\n  `mps`. (default: cpu)") == "cpu, cuda:1 or mps"
    assert first_sentence("Write the scores to this JSON file. (default: None)") == "Write the scores to this JSON file"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory to complete files in."""
    (tmp_path / "configs").mkdir()
    for name in ("configs/embedded.toml", "first try.toml", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def asked_of_bash(line: str, folder: Path) -> list[str]:
    """What bash offers at the end of a line, split as readline splits it: `=` is a word of its own, also the last."""
    words = [part for word in line.split(" ") for part in re.split(r"(=)", word) if part or not word]
    program = (
        f"set -u\nsource <(cat)\nCOMP_WORDS=({' '.join(map(shlex.quote, words))})\nCOMP_CWORD={len(words) - 1}\n"
        '_pte pte\nfor offered in "${COMPREPLY[@]}"; do printf "%s\\n" "$offered"; done'
    )
    return said(["bash", "--norc", "-c", program], script=completion_script("bash"), folder=folder)


def said(words: list[str], *, script: str, folder: Path) -> list[str]:
    """What a shell that reads a script prints in a folder, without a complaint."""
    done = subprocess.run(words, input=script, capture_output=True, text=True, cwd=folder, check=True, timeout=20)
    assert done.stderr == ""
    return done.stdout.splitlines()


ASKED = {
    "pte ": list(ARGUMENTS),
    "pte tr": ["train"],
    "pte q": [],
    "pte unheard-of --": [],
    "pte train --cache.w": ["--cache.window-tokens"],
    "pte train --run.": None,
    "pte eval --suite ": ["math6"],
    "pte eval --suite m": ["math6"],
    "pte train --model.dtype b": ["bfloat16"],
    "pte train --model.dtype=b": ["bfloat16"],
    "pte train --model.dtype=": ["float32", "bfloat16", "float16", "float8"],
    "pte train configs/embedded.toml --adapter.targets q_proj k": ["k_proj"],
    "pte train configs/embedded.toml --adapter.targets q_proj --adapter.kind l": ["lora"],
    "pte serve --policy keyd": ["keydiff"],
    "pte plan --w": ["--window"],
    "pte plan --gradient-mode h": ["horizon"],
    "pte plan --window ": [],
    "pte completion ": ["bash", "zsh", "fish"],
    "pte train ": ["first try.toml", "configs"],
    "pte train fi": ["first try.toml"],
    "pte train configs/": ["configs/embedded.toml"],
    "pte train --train.steps ": [],
    "pte report no": ["notes.txt"],
    "pte report --output x no": ["notes.txt"],
    "pte eval --output no": ["notes.txt"],
    "pte doctor ": ["--help", "--output"],
    "pte doctor --output no": ["notes.txt"],
}


@pytest.mark.parametrize("line", ASKED)
def test_bash_offers_what_can_follow(line: str, folder: Path) -> None:
    offered, wanted = asked_of_bash(line, folder), ASKED[line]
    if wanted is None:
        wanted = [name for flag in COMMANDS["train"].flags for name in flag.names if name.startswith("--run.")]
    assert sorted(offered) == sorted(wanted)


def test_behind_the_experiment_and_behind_a_switch_come_flags(folder: Path) -> None:
    flags = [name for flag in COMMANDS["train"].flags for name in flag.names]
    assert asked_of_bash("pte train configs/embedded.toml ", folder) == flags
    assert asked_of_bash("pte train configs/embedded.toml --dry-run ", folder) == flags
    assert asked_of_bash("pte train configs/embedded.toml --train.steps 3 ", folder) == flags


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize("line", [line for line in ASKED if "=" not in line and line != "pte doctor "])
def test_fish_offers_the_same(line: str, folder: Path) -> None:
    program = f"source (cat | psub); complete -C {shlex.quote(line)}"
    lines = said(["fish", "--no-config", "-c", program], script=completion_script("fish"), folder=folder)
    offered = [line.split("\t")[0].rstrip("/") for line in lines]
    wanted = ASKED[line]
    if wanted is not None:
        assert set(wanted) <= set(offered)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script() -> None:
    done = subprocess.run(["zsh", "-n"], input=completion_script("zsh"), capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_flag_and_every_choice_is_in_the_script_of_the_other_shells(shell: str) -> None:
    script = completion_script(shell)  # type: ignore[arg-type]
    for command in COMMANDS.values():
        for flag in command.flags:
            for name in flag.names:
                assert (f"-l {name[2:]} " in script) if shell == "fish" else (name in script)
            if isinstance(flag.takes, tuple):
                assert " ".join(flag.takes) in script


@pytest.mark.system
def test_the_script_is_printed_without_what_other_commands_import() -> None:
    program = (
        "import sys; from pte.cli import main; code = main(['completion', 'bash']);"
        "print(code, sorted({'torch', 'transformers', 'rich', 'pte.commands'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.splitlines() == ["0 []"] and done.stdout == completion_script("bash")
    assert "python" not in done.stdout.lower()


@pytest.mark.system
def test_a_shell_that_is_not_known_is_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("completion", ["powershell"])
    assert ended.value.code == 2 and "bash" in capsys.readouterr().err
