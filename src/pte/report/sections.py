"""From runs to a report: which sections there are, in which order, and where everything comes from.

Decides: the order of questions, the facts at the top, the table of provenance, which completions the viewer gets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.report import questions, ranking, style, work
from pte.report.derived import measurements_of
from pte.report.measurements import Measurement, grouped, of_metric, seeds_of, words
from pte.report.section import Section
from pte.report.tables import NOTHING, Table

if TYPE_CHECKING:
    from pte.report.runs import RecordedRun, Row

QUESTIONS: dict[str, Callable[[Sequence[Measurement]], Section]] = {
    "arms": ranking.arms_section,
    "capacity": questions.capacity_section,
    "forgetting": questions.forgetting_section,
    "length": questions.length_section,
    "ablation": questions.ablation_section,
    "transfer": questions.transfer_section,
    "memory": work.memory_section,
    "cost": work.cost_section,
    "rl": work.rl_section,
    "rules": questions.rules_section,
}
STOPPED = "stopped_at_step"
LOGPROB_DIGITS = 5
COMMIT_LETTERS = 10


@dataclass(frozen=True)
class Report:
    """Everything that a page and a Markdown file show.

    Args:
        title: Of both.
        lead: A sentence on what was read.
        facts: Names and values for the top.
        notes: Sentences on what is missing.
        sections: In order.
        viewer: Groups of completions, as the page's script reads them; empty without any.
        provenance: Tables of runs and parts.
        configurations: Recorded configurations, by run.
        command: What made it.
    """

    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]
    viewer: tuple[Mapping[str, object], ...]
    provenance: tuple[Table, ...]
    configurations: tuple[tuple[str, str], ...]
    command: str


def build_report(runs: Sequence[RecordedRun], *, command: str, notes: Sequence[str] = ()) -> Report:
    """The report of any runs.

    Args:
        runs: At least one.
        command: As the user gave it.
        notes: On runs that could not be read.
    """
    measurements = measurements_of(runs)
    sections = [*([comparison] if (comparison := stages_section(runs)) is not None else [])]
    failed: list[str] = []
    stopped = of_metric(measurements, STOPPED)
    by_question = grouped((one for one in measurements if one.metric != STOPPED), lambda one: one.question)
    for question in [*QUESTIONS, *sorted(set(by_question) - set(QUESTIONS))]:
        if question in by_question:
            try:
                sections.append(section_of(question, by_question[question]))
            except ValueError as error:
                failed.append(f"Question {question!r} is shown as a plain table: {error}.")
                sections.append(questions.generic_section(question, by_question[question]))
    learning = work.learning_section(runs)
    if learning is not None:
        sections.append(learning)
    kinds = {"train": "training run", "compare": "comparison", "evidence": "evidence run"}
    counts = [
        f"{count} {kinds[kind]}{'s' if count > 1 else ''}"
        for kind in kinds
        if (count := sum(run.kind == kind for run in runs))
    ]
    viewer = viewer_groups(runs)
    return Report(
        title=f"Evidence: {runs[0].name}"
        if all(run.kind == "evidence" for run in runs)
        else f"Report: {', '.join(dict.fromkeys(run.name for run in runs))}",
        lead=f"Read from {' and '.join(counts)}. Intervals are 95 %; captions say what was measured and how often.",
        facts=facts(runs, measurements),
        notes=(*notes, *(note for run in runs for note in run.notes), *map(stopped_note, stopped), *failed),
        sections=tuple(sections),
        viewer=viewer,
        provenance=tuple(provenance(runs)),
        configurations=tuple(
            (run.path, json.dumps(run.record["config"], indent=2)) for run in runs if run.record.get("config")
        ),
        command=command,
    )


def stopped_note(stop: Measurement) -> str:
    """What a training that ended early was, and where it ended."""
    where = ", ".join(filter(None, (stop.task, words(stop.setting), f"seed {stop.seed}")))
    return (
        f"{style.label(stop.arm)} ({where}) stopped at step {stop.value:.0f}, as its loss, gradient or log-prob gap "
        f"was not sound; it has no scores in the section {stop.question!r}."
    )


def section_of(question: str, measurements: Sequence[Measurement]) -> Section:
    """The section of a question; of an unknown one, or of one without the metric it is about, a plain table."""
    needs_accuracy = question in ("capacity", "transfer")
    if question not in QUESTIONS or (needs_accuracy and all(one.metric != "accuracy" for one in measurements)):
        return questions.generic_section(question, measurements)
    return QUESTIONS[question](measurements)


def stages_section(runs: Sequence[RecordedRun]) -> Section | None:
    """What the stages of a comparison brought, from its summary; None without a comparison that has ended."""
    rows = []
    for run in runs:
        summary = run.summary
        if run.kind != "compare" or "final_reward" not in summary:
            continue
        rows.append(
            (
                run.path,
                str(run.arms[0].seed) if run.arms else NOTHING,
                f"{summary.get('distill_steps')} + {summary.get('grpo_steps')}",
                bracketed(summary, "warm_start_reward"),
                bracketed(summary, "final_reward"),
                NOTHING if not isinstance(gap := summary.get("gap_closed"), float) else f"{100 * gap:.0f} %",
                NOTHING if not isinstance(gap := summary.get("max_logprob_gap"), float) else f"{gap:.1e} nats",
                NOTHING if not isinstance(took := summary.get("seconds"), float) else style.shown("seconds", took),
            )
        )
    if not rows:
        return None
    table = Table(
        "Comparisons",
        (
            "run",
            "seed",
            "steps, warm start + GRPO",
            "PTE's reward after the warm start [95 %]",
            "after GRPO [95 %]",
            "gap closed by PTE",
            "largest gap, rollout to replay",
            "wall time",
        ),
        tuple(rows),
        note="Rewards are those of samples at the rollouts' temperature on the held-out problems.",
    )
    return Section(
        "comparison",
        "Comparisons",
        "What did each stage bring: a warm start on right traces, then GRPO?",
        tables=(table,),
    )


def bracketed(summary: Row, key: str) -> str:
    """A value of a summary with its interval."""
    value, interval = summary.get(key), summary.get(f"{key}_ci95")
    if not isinstance(value, (int, float)):
        return NOTHING
    if not isinstance(interval, list) or len(interval) != 2:
        return f"{value:.3f}"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def facts(runs: Sequence[RecordedRun], measurements: Sequence[Measurement]) -> tuple[tuple[str, str], ...]:
    """What stands at the top."""
    found: list[tuple[str, str]] = []
    if measurements:
        seeds = seeds_of(measurements)
        found.append(("seeds", ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{len(seeds)} seeds"))
        found.append(("tasks", ", ".join(sorted({one.task for one in measurements}))))
        found.append(("arms and rules", str(len({one.arm for one in measurements}))))
        found.append(("measurements", f"{len(measurements):,}"))
    parts = [part for run in runs for part in run.parts]
    if parts:
        found.append(
            ("parts, time measured", f"{len(parts)}, {style.shown('seconds', sum(part.seconds for part in parts))}")
        )
    commits = sorted({short(commit) for run in runs for commit in commits_of(run)})
    if commits:
        found.append(("commit", ", ".join(commits)))
    machines = sorted({machine for run in runs if (machine := hardware_words(run.record.get("hardware")))})
    if machines:
        found.append(("hardware", "; ".join(machines)))
    return tuple(found)


def commits_of(run: RecordedRun) -> list[str]:
    """Commits that a run and its parts were measured at."""
    named = [run.record.get("commit"), *(part.commit for part in run.parts)]
    return list(dict.fromkeys(str(commit) for commit in named if commit))


def short(commit: str) -> str:
    """A commit as readers quote it; `-dirty` stays."""
    base, dash, rest = commit.partition("-")
    return base[:COMMIT_LETTERS] + dash + rest


def hardware_words(hardware: object) -> str:
    """A machine as text."""
    if not isinstance(hardware, Mapping):
        return str(hardware) if hardware else ""
    words = []
    if hardware.get("cpu"):
        cores = hardware.get("cores")
        words.append(f"{cores} cores of {hardware['cpu']}" if cores else str(hardware["cpu"]))
    memory = hardware.get("memory_bytes")
    if isinstance(memory, (int, float)):
        words.append(style.shown("bytes", memory))
    gpus = hardware.get("gpus")
    if isinstance(gpus, list) and gpus:
        words.append(", ".join(map(str, gpus)))
    elif isinstance(gpus, list):
        words.append("no GPU")
    return ", ".join(words)


def command_of(run: RecordedRun) -> str:
    """What made a run: as it is recorded, else as its kind says."""
    recorded = run.record.get("command")
    if recorded:
        return str(recorded)
    preset = run.record.get("preset")
    return f"pte {run.kind}" + (f" --preset {preset}" if preset else "")


def provenance(runs: Sequence[RecordedRun]) -> list[Table]:
    """Runs, and the parts of evidence runs."""
    rows = []
    for run in runs:
        recorded = run.record.get("seeds")
        seeds = recorded if isinstance(recorded, list) else sorted({arm.seed for arm in run.arms})
        versions = run.record.get("versions")
        rows.append(
            (
                run.path,
                command_of(run),
                ", ".join(map(short, commits_of(run))) or NOTHING,
                hardware_words(run.record.get("hardware")) or NOTHING,
                ", ".join(map(str, seeds)) or NOTHING,
                ", ".join(f"{name} {one}" for name, one in versions.items())
                if isinstance(versions, Mapping)
                else NOTHING,
            )
        )
    tables = [Table("Runs", ("run", "command", "commit", "hardware", "seeds", "versions"), tuple(rows), names=6)]
    parts = [
        (
            part.name,
            part.question,
            f"{len(part.measurements):,}",
            style.shown("seconds", part.seconds),
            short(part.commit or NOTHING),
        )
        for run in runs
        for part in run.parts
    ]
    if parts:
        tables.append(
            Table("Parts", ("part", "question", "measurements", "wall time", "commit"), tuple(parts), names=2)
        )
    return tables


def viewer_groups(runs: Sequence[RecordedRun]) -> tuple[Mapping[str, object], ...]:
    """Completions for the viewer: a group for each arm that has some, PTE's own first."""
    found: list[tuple[str, str, Sequence[Row]]] = []
    for run in runs:
        for arm in run.arms:
            name = f"{run.name}: {style.label(arm.name)}" if run.kind == "compare" else arm.name
            found.append((name, arm.name, arm.rollouts))
        for name, rollouts in run.rollouts.items():
            found.append((f"{run.name}: {style.label(name)}", name, rollouts))
    found.sort(key=lambda one: not one[1].startswith("pte"))
    return tuple(
        {"label": label, "rollouts": [rounded(rollout) for rollout in rollouts]}
        for label, _, rollouts in found
        if rollouts
    )


def rounded(rollout: Row) -> Row:
    """The same with log-probs of as many digits as anyone reads."""
    logprobs = rollout.get("logprobs")
    assert isinstance(logprobs, list)
    return {
        **rollout,
        "logprobs": [round(value, LOGPROB_DIGITS) for value in logprobs if isinstance(value, (int, float))],
    }
