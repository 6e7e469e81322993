"""From runs to a report: which sections there are and in which order.

Decides: the order of questions, what is said of measurements that fit no section, which completions the viewer gets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pte.report import questions, ranking, style, work
from pte.report.completions import rounded
from pte.report.derived import unrepeated
from pte.report.measurements import STOPPED, Measurement, grouped, of_metric, words
from pte.report.naming import names_of_lines, with_names
from pte.report.provenance import facts, provenance
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
    runs = with_names(runs)
    measurements, repeated = unrepeated(runs)
    sections = [*([comparison] if (comparison := stages_section(runs)) is not None else [])]
    failed: list[str] = []
    stopped = of_metric(measurements, STOPPED)
    # The table of arms says at which seeds an arm stopped; elsewhere the note above does.
    shown = [one for one in measurements if one.metric != STOPPED or one.question == "arms"]
    by_question = grouped(shown, lambda one: one.question)
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
        notes=(
            *notes,
            *(note for run in runs for note in run.notes),
            *repeated,
            *map(stopped_note, stopped),
            *failed,
        ),
        sections=with_names_of_figures(sections),
        viewer=viewer,
        provenance=tuple(provenance(runs)),
        configurations=tuple(
            (run.path, json.dumps(run.record["config"], indent=2)) for run in runs if run.record.get("config")
        ),
        command=command,
    )


def with_names_of_figures(sections: Sequence[Section]) -> tuple[Section, ...]:
    """The same with names of figures that are file names, each another."""
    taken: set[str] = set()
    found = []
    for section in sections:
        figures = []
        for drawn in section.figures:
            name = style.file_name(drawn.name)
            number = 1
            while name in taken:
                number += 1
                name = f"{style.file_name(drawn.name)}-{number}"
            taken.add(name)
            figures.append(replace(drawn, name=name))
        found.append(replace(section, figures=tuple(figures)))
    return tuple(found)


def stopped_note(stop: Measurement) -> str:
    """What a training that ended early was, and where it ended."""
    where = ", ".join(filter(None, (stop.task, words(stop.setting), f"seed {stop.seed}")))
    return (
        f"{style.label(stop.arm)} ({where}) stopped at step {stop.value:.0f}, as its loss, gradient or log-prob gap "
        f"was not sound; it has no scores in the section {stop.question!r}."
    )


def section_of(question: str, measurements: Sequence[Measurement]) -> Section:
    """The section of a question; of an unknown one, or of one without the metric it is about, a plain table."""
    needs_accuracy = question in ("capacity", "length", "transfer")
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
    if not isinstance(interval, list) or [isinstance(one, (int, float)) for one in interval] != [True, True]:
        return f"{value:.3f}"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def viewer_groups(runs: Sequence[RecordedRun]) -> tuple[Mapping[str, object], ...]:
    """Completions for the viewer: a group for each arm that has some, PTE's own first."""
    lines = names_of_lines(runs)
    found: list[tuple[str, str, Sequence[Row]]] = []
    for run in runs:
        for arm in run.arms:
            name = (
                f"{run.told_apart or run.name}: {style.label(arm.name)}" if run.kind == "compare" else lines[run.path]
            )
            found.append((name, arm.name, arm.rollouts))
        for name, rollouts in run.rollouts.items():
            found.append((f"{run.name}: {style.label(name)}", name, rollouts))
    found.sort(key=lambda one: not one[1].startswith("pte"))
    return tuple(
        {"label": label, "rollouts": [rounded(rollout) for rollout in rollouts]}
        for label, _, rollouts in found
        if rollouts
    )
