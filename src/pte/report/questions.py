"""What is asked of a state: capacity, forgetting, length, update rules, ablations, transfer, and anything else.

Decides: for each question, its figures, tables and the sentences that follow from the numbers. A question that is not
known here gets a table of everything that was measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pte.report import style
from pte.report.figures import Scale, dot_figure, line_figure, panel_title
from pte.report.grids import matrix_figure
from pte.report.measurements import (
    Measurement,
    grouped,
    of_metric,
    seeds_of,
    sort_key,
    state_bytes_note,
    with_state_bytes,
    words,
)
from pte.report.section import Section, by_arm, interval_note, over_condition
from pte.report.statistics import KNEE, Estimate, estimate, knee
from pte.report.tables import NOTHING, Table, arm_name, means_table, pivot

REFERENCE = "reference"
OWN_WINDOW = re.compile(r"\bof \d+ tokens$")


def capacity_section(measurements: Sequence[Measurement]) -> Section:
    """Accuracy over the number of facts, the knee of each rank and rule."""
    found = by_arm(of_metric(measurements, "accuracy"))
    figure = line_figure(
        found,
        name="capacity",
        metric="accuracy",
        scale=Scale("facts", "facts to recall, log scale", base=2, reference=KNEE),
        panel=lambda one: ": ".join(
            part for part in (style.label(one.arm), words(one.without("facts", "rank"))) if part
        ),
        line=lambda one: one.at("rank") or 0,
        line_label=lambda rank: f"rank {rank}" if rank else "no state",
        caption=f"Accuracy of recalling a fact that was evicted, over the number of facts, a line for each rank of the "
        f"state, a panel for each rule; dashed: {KNEE:.0%}.",
    )

    def knee_of(group: Sequence[Measurement]) -> str:
        reached = knee({x: estimate(rows).mean for x, rows in grouped(group, lambda one: one.number("facts")).items()})
        return NOTHING if reached is None else f"{reached:g}"

    table = pivot(
        sorted(found, key=lambda one: (style.ordered(o.arm for o in found).index(one.arm), sort_key(one.at("rank")))),
        title=f"Accuracy by facts; knee: most facts up to which accuracy is at least {KNEE:.0%}",
        names=[
            ("rule", arm_name),
            ("rank", lambda one: str(one.at("rank") or NOTHING)),
            ("task", lambda one: panel_title(one, "facts", "rank")),
        ],
        column=lambda one: one.number("facts"),
        column_label=lambda facts: f"{facts:g} facts",
        more=[("knee", knee_of)],
        note=interval_note(found, lambda one: (one.arm, one.setting)),
    )
    findings = [
        f"{row[0]}{'' if row[1] == NOTHING else f', rank {row[1]}'}: knee at {row[3]} facts."
        for row in table.rows
        if row[3] != NOTHING
    ]
    return Section(
        "capacity",
        "Capacity",
        "How many facts does a state of a given rank hold before recall breaks down?",
        tuple(findings),
        (figure,),
        (table,),
    )


def forgetting_section(measurements: Sequence[Measurement]) -> Section:
    """Accuracy by the age of the eviction, beside the share of the queries that were answered at all."""
    answered = [one for one in of_metric(measurements, "answered_fraction") if one.at("evictions_ago") is None]
    by_age = [one for one in measurements if one not in answered]
    if not by_age:
        return generic_section("forgetting", measurements)
    figures, tables = over_condition(
        by_age,
        name="forgetting",
        scale=Scale("evictions_ago", "evictions since the value left the window, log scale", base=2, zero="still kept"),
        caption="Accuracy of recalling a value over how many evictions ago it left the cache; apart: values that are "
        "still in it.",
        column_label="evictions ago",
        beside=answered,
    )
    return Section(
        "forgetting",
        "Forgetting",
        "Does the state forget early evictions after many later ones, and under which update rule?",
        figures=figures,
        tables=tables,
    )


def length_section(measurements: Sequence[Measurement]) -> Section:
    """Accuracy far beyond the training length."""
    figures, tables = over_condition(
        of_metric(measurements, "accuracy"),
        name="length",
        scale=Scale("windows", "windows generated, log scale", base=2, mark="trained_windows"),
        caption="Accuracy over the length of the completion, counted in windows; dotted: the longest trained on.",
        column_label="windows generated",
    )
    return Section(
        "length",
        "Length",
        "Does accuracy hold when completions grow far beyond the training length at a fixed window?",
        figures=figures,
        tables=tables,
    )


def rules_section(measurements: Sequence[Measurement]) -> Section:
    """What many evictions do to the state."""
    figures, tables = over_condition(
        measurements,
        name="rules",
        scale=Scale("evictions", "evictions, log scale", base=10, log_values=True),
        caption="What thousands of evictions do to the state under each update rule.",
        column_label="evictions",
    )
    return Section(
        "rules",
        "Update rules over many evictions",
        "Does the state stay bounded, and does what is read of it stay useful, over thousands of evictions?",
        figures=figures,
        tables=tables,
    )


def ablation_section(measurements: Sequence[Measurement]) -> Section:
    """One factor at a time: accuracy against time and memory, beside the reference that the factor varies."""
    figures, tables = [], []
    factors = grouped(measurements, lambda one: str(one.at("factor")))
    reference = factors.pop(REFERENCE, []) if len(factors) > 1 else []
    for factor, varied in factors.items():
        compared = comparable(reference, factor=factor, varied=varied)
        group = with_state_bytes([*compared, *varied])
        values = sorted({str(one.at("value")) for one in group}, key=reference_first)
        name = factor.replace("_", " ")
        arms = {one.arm for one in group}
        metrics = list(dict.fromkeys(one.metric for one in with_state_bytes(varied)))
        caption = f"What {name} changes, a row for each value"
        if compared:
            caption += f"; one factor at a time, all else as in the row {REFERENCE!r}"
        elif reference and OWN_WINDOW.search(factor):
            caption += f"; all rows have that window, which is not the window of the {REFERENCE}"
        figures.append(
            dot_figure(
                grouped(group, lambda one: f"{panel_title(one, 'factor', 'value')}: {style.metric_label(one.metric)}"),
                name=f"ablation-{style.file_name(factor)}",
                row=lambda one: str(one.at("value")),
                rows=values,
                hue=(lambda one: one.arm) if len(arms) > 1 else None,
                caption=f"{caption}.",
            )
        )
        tables.append(
            means_table(
                sorted(group, key=lambda one: (one.task, reference_first(str(one.at("value"))))),
                title=f"Ablation of {name}",
                names=[
                    (name, lambda one: str(one.at("value"))),
                    ("arm", arm_name),
                    ("task", lambda one: panel_title(one, "factor", "value")),
                ],
                metrics=metrics,
                more=[("seeds", lambda rows: str(len(seeds_of(rows))))],
                note=" ".join(
                    filter(
                        None,
                        (
                            interval_note(of_metric(group, "accuracy"), lambda one: (one.arm, one.task, one.setting)),
                            state_bytes_note([*compared, *varied]),
                        ),
                    )
                ),
            )
        )
    return Section(
        "ablation",
        "Ablations",
        "What does each choice cost or bring: accuracy against time and memory?",
        figures=tuple(figures),
        tables=tuple(tables),
    )


def comparable(reference: Sequence[Measurement], *, factor: str, varied: Sequence[Measurement]) -> list[Measurement]:
    """Measurements of the reference that a factor's own can be compared with: same task, arm, stage and metric.

    A factor whose name says of how many tokens, such as `evicted of 20 tokens`, has a window of its own, and nothing
    of the reference is comparable.
    """
    if OWN_WINDOW.search(factor):
        return []
    known = {(one.task, one.arm, one.stage, one.metric) for one in varied}
    return [one for one in reference if (one.task, one.arm, one.stage, one.metric) in known]


def reference_first(value: str) -> tuple[bool, tuple[int, str, float, str]]:
    """Orders the values of a factor."""
    return value != REFERENCE, sort_key(value)


def transfer_section(measurements: Sequence[Measurement]) -> Section:
    """Trained on one task, read on another."""
    found = by_arm(of_metric(measurements, "accuracy"))
    hidden = ("trained_on", "read_on")
    title = {
        one: ": ".join(part for part in (style.label(one.arm), words(one.without(*hidden))) if part) for one in found
    }
    figure = matrix_figure(
        grouped(found, lambda one: title[one]),
        name="transfer",
        metric="accuracy",
        keys=hidden,
        caption="Accuracy of an encoder trained on one task (down) and read on another (across).",
    )
    table = pivot(
        found,
        title="Accuracy by the task it is read on",
        names=[("arm", arm_name), ("trained on", lambda one: style.label(str(one.at("trained_on"))))],
        column=lambda one: str(one.at("read_on")),
        column_label=lambda task: f"read on {style.label(str(task))}",
        note=interval_note(found, lambda one: (one.arm, one.setting)),
    )
    return Section(
        "transfer",
        "Transfer",
        "Does what was learned of storing and reading on one kind of problem carry over to another?",
        figures=(figure,),
        tables=(table,),
    )


def generic_section(name: str, measurements: Sequence[Measurement]) -> Section:
    """Everything that was measured for a question without a form of its own."""
    rows = []
    for (task, arm, stage, setting, metric), group in grouped(
        by_arm(measurements), lambda one: (one.task, one.arm, one.stage, one.setting, one.metric)
    ).items():
        one: Estimate = estimate(group)
        rows.append(
            (
                task,
                style.label(arm),
                style.STAGES.get(stage, stage),
                words(setting) or NOTHING,
                style.metric_label(metric),
                style.shown_estimate(metric, one),
                str(one.seeds),
            )
        )
    table = Table(
        name.replace("_", " ").capitalize(),
        ("task", "arm", "learned by", "setting", "metric", "value [95 %]", "seeds"),
        tuple(rows),
        names=5,
    )
    return Section(
        f"question-{style.file_name(name)}",
        name.replace("_", " ").capitalize(),
        "Everything that was measured for this question.",
        tables=(table,),
    )
