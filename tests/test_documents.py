"""What is written down is true: experiments load, every field is read, every example of the command parses."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from pte.arguments import ARGUMENTS, EXAMPLES, OVERVIEW
from pte.bench.table import bench_table, read_baselines, with_table
from pte.cli import parse
from pte.config import ExperimentConfig
from pte.config_file import SECTIONS, load_experiment, read_experiment_file
from pte.method.eviction.registry import POLICIES
from pte.report.command import read_runs
from pte.report.page import render_markdown
from pte.report.sections import build_report
from pte.tasks.families import FAMILIES
from pte.tasks.problems import Problem
from pte.tasks.suites import SUITES

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for path in (ROOT / "src" / "pte").rglob("*.py")
    if not path.name.startswith("config") and path.name != "cli.py"
]
EXPERIMENTS = sorted((ROOT / "configs").glob("*.toml"))


def test_there_are_experiments() -> None:
    assert {"embedded.toml", "gsm8k.toml"} <= {path.name for path in EXPERIMENTS}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_loads_and_is_trainable(path: Path) -> None:
    config = load_experiment(path)
    config.check_trainable()
    assert config.run.name == path.stem, "each experiment has a run directory of its own"
    for section, values in read_experiment_file(path).items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value


def test_the_main_job_is_the_one_that_was_asked_for() -> None:
    config = load_experiment(ROOT / "configs" / "embedded.toml")
    trace_tokens = 10 * config.task.num_statements + 4
    assert trace_tokens >= 4 * config.cache.window_tokens, "traces are at least four windows long"
    assert config.rollout.max_new_tokens >= trace_tokens and config.eval.max_new_tokens >= trace_tokens
    assert config.eval.problems is not None and config.eval.problems >= 512
    assert config.eval.temperature == 0
    assert config.distill.steps and config.train.steps


def test_the_run_on_real_problems_is_the_one_that_was_asked_for() -> None:
    config = load_experiment(ROOT / "configs" / "gsm8k.toml")
    assert config.train.steps >= 20
    assert "gsm8k_train" in str(config.task.train_path)
    assert [Path(name).stem for name in config.task.eval_paths] == ["gsm8k_test", "aime24"]
    assert not {config.task.train_path} & set(config.task.eval_paths)


def test_every_data_file_lies_in_a_directory_that_the_reader_makes_and_has_a_source() -> None:
    named = {f"data/{one.file}" for one in SUITES["math6"]}
    for path in EXPERIMENTS:
        task = load_experiment(path).task
        named |= {name for name in (task.train_path, *task.eval_paths) if name is not None}
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `") and ".jsonl` |" in line]
    sourced = {f"data/{file}" for row in rows for file in re.findall(r"`(\w+\.jsonl)`", row.split(" | ")[0])}
    assert named == sourced
    (example,) = re.findall(r"^\{.*\}$", text, re.MULTILINE)
    assert list(json.loads(example)) == [field.name for field in dataclasses.fields(Problem)]


@pytest.mark.parametrize("file", ["config_policy.py", "integrations/peft_config.py"])
def test_recent_tokens_names_every_policy_that_reads_it(file: str) -> None:
    text = (ROOT / "src" / "pte" / file).read_text(encoding="utf-8")
    described = re.search(r'recent_tokens: int \| None = None\n    """(.*?)"""', text, re.DOTALL)
    assert described is not None
    readers = [name for name, entry in POLICIES.items() if entry.option == "recent_tokens"]
    assert re.findall(r"`(\w+)`", described[1]) == readers


@cache
def fields_read() -> set[tuple[str, str]]:
    """(section, field) for every attribute that the sources read of a section.

    A section is reached as `config.<section>.<field>`, or through a name that was assigned a section or annotated with
    its class, as in `task = config.task` or `stage: TrainConfig`.
    """
    classes = {cls.__name__: name for name, cls in SECTIONS.items()}
    found = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            names: dict[str, set[str]] = {}
            for node in ast.walk(function):
                if isinstance(node, ast.arg) and node.annotation is not None:
                    written = ast.unparse(node.annotation)
                    names.setdefault(node.arg, set()).update(
                        section for name, section in classes.items() if re.search(rf"\b{name}\b", written)
                    )
                if isinstance(node, ast.Assign):
                    for target, value in pairs(node):
                        if isinstance(value, ast.Attribute) and value.attr in SECTIONS:
                            names.setdefault(target, set()).add(value.attr)
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    owner = node.value
                    if isinstance(owner, ast.Attribute) and owner.attr in SECTIONS:
                        found.add((owner.attr, node.attr))
                    elif isinstance(owner, ast.Name):
                        found |= {(section, node.attr) for section in names.get(owner.id, ())}
    return found


def pairs(node: ast.Assign) -> list[tuple[str, ast.expr]]:
    """Names and values of an assignment, also of `a, b = c, d`."""
    plain = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            plain += [(t.id, v) for t, v in zip(target.elts, node.value.elts, strict=False) if isinstance(t, ast.Name)]
        elif isinstance(target, ast.Name):
            plain.append((target.id, node.value))
    return plain


# Read inside the configuration itself: the schedule, the eviction policy and the task get them, as a property.
READ_BY_A_PROPERTY = {
    ("cache", "window_tokens"): "schedule",
    ("cache", "evict_tokens"): "schedule",
    ("cache", "sink_tokens"): "policy_option",
    ("cache", "recent_tokens"): "policy_option",
    ("cache", "policy"): "registered",
    ("task", "mixture"): "families",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_of_a_section_is_read_somewhere(section: str) -> None:
    read = fields_read() | {("task", name) for family in FAMILIES.values() for name in family.shape_fields}
    for field in dataclasses.fields(SECTIONS[section]):
        name = READ_BY_A_PROPERTY.get((section, field.name), field.name)
        assert (section, name) in read, f"nothing reads {section}.{field.name}"


def test_a_field_that_nothing_reads_would_be_noticed() -> None:
    read = fields_read()
    assert ("train", "steps") in read and ("train", "rank") not in read and ("run", "steps") not in read


def examples() -> list[str]:
    texts = [OVERVIEW.partition("examples:")[2], *EXAMPLES.values()]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip().startswith("pte ")]


@pytest.mark.parametrize("line", [line for line in examples() if " COMMAND " not in line])
def test_every_example_of_the_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A saved adapter is somebody's run; all else of the example is checked without it.
    line = re.sub(r"--adapter\.checkpoint \S+", "", line)
    monkeypatch.chdir(ROOT)
    _, command, *words = shlex.split(line)
    parsed = parse(command, words)
    assert isinstance(parsed, ARGUMENTS[command])


def test_every_command_has_an_example_and_a_line_in_the_overview() -> None:
    assert EXAMPLES.keys() == ARGUMENTS.keys()
    for command in ARGUMENTS:
        assert re.search(rf"^  {command} +[a-z]", OVERVIEW, re.MULTILINE)


def commands_of_readme() -> list[str]:
    readme = ROOT / "README.md"
    if not readme.is_file():
        return []
    # Text and code take turns: text, (language, code), text, ...
    parts = re.split(r"^```(\w*)\n(.*?)^```$", readme.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    blocks = [code for language, code in zip(parts[1::3], parts[2::3], strict=True) if language != "python"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines]


def test_every_pte_command_of_the_readme_parses_and_every_make_target_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = commands_of_readme()
    if not any(line.startswith("pte ") for line in lines):
        pytest.skip("the README has no commands yet")
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["pte"] and len(words) > 1 and words[1] in ARGUMENTS:
            parse(words[1], shlex.split(re.sub(r"--adapter\.checkpoint[ =]\S+", "", line), comments=True)[2:])
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets, line


def test_the_readme_is_at_most_150_lines() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README yet")
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_says_of_every_policy_in_a_line_which_tokens_leave() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, table = readme.partition("| eviction policy |")
    named = re.findall(r"^\| `(\w+)` \| \S", table.partition("\n\n")[0], re.MULTILINE)
    assert named == [*POLICIES, "none"]


def test_the_configuration_has_the_sections_of_its_files() -> None:
    assert [field.name for field in dataclasses.fields(ExperimentConfig)] == list(SECTIONS)


def test_the_evidence_page_is_what_the_report_makes_of_the_recorded_parts() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"Made by `(pte report [^`]*)`", page)
    runs, notes = read_runs([str(ROOT / "benchmarks" / "evidence")])
    assert command.split()[2] == "benchmarks/evidence"
    made = render_markdown(build_report(runs, command=command, notes=notes), images="figures")
    assert made.replace(f"{ROOT}/", "") == page
    for image in re.findall(r"\]\((figures/[^)]*)\)", page):
        assert (ROOT / "docs" / image).is_file(), image


def test_the_readme_s_table_of_speed_is_what_the_baseline_files_make() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README yet")
    page = readme.read_text(encoding="utf-8")
    assert page == with_table(page, bench_table(read_baselines(ROOT))), "run python scripts/bench_table.py"


def defined_names(file: Path) -> set[str]:
    """Names of a module and, behind a dot, of its classes."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for name in bound_names(node):
            names.add(name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in bound_names(inner)}
    return names


def bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_the_paper_map_names_functions_and_tests_that_there_are() -> None:
    page = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    named = [
        (ROOT / folder / path, name)
        for folder, pattern in (
            (ROOT / "tests", r"`([\w/]+\.py)::(\w+)`"),
            (ROOT / "src/pte", r"`([\w/]+\.py):([\w.]+)`"),
        )
        for path, name in re.findall(pattern, page)
    ]
    known = {file: defined_names(file) if file.is_file() else set() for file, _ in named}
    assert [f"{file.relative_to(ROOT)}: {name}" for file, name in named if name not in known[file]] == []
    laws = page.partition("## Laws")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\d+) ", laws, re.MULTILINE) == [str(law) for law in range(1, 11)]
    assert len(named) > 200
