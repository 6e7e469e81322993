"""What is asked of a policy's memory, and how it is answered: arms, capacity, forgetting, length, ablations, transfer.

Decides: for each question, its figures, tables and the sentences that follow from the numbers. A question that is not
known here gets a table of everything that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.report import style
from pte.report.figures import Scale, dot_figure, line_figure, matrix_figure, panel_title
from pte.report.measurements import Measurement, grouped, of_metric, seeds_of, sort_key, words
from pte.report.statistics import KNEE, Estimate, estimate, gap_closed, knee
from pte.report.tables import NOTHING, Table, arm_name, means_table, pivot, stage_name

if TYPE_CHECKING:
    from pte.report.style import DrawnFigure

REFERENCES = ("lora_window", "lora_full")


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Args:
        name: Of its anchor.
        title: Heading.
        question: What is asked, a sentence or two.
        findings: Sentences that follow from the numbers.
        figures: In order.
        tables: In order.
    """

    name: str
    title: str
    question: str
    findings: tuple[str, ...] = ()
    figures: tuple[DrawnFigure, ...] = ()
    tables: tuple[Table, ...] = ()


def by_arm(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The same, arms in their order."""
    order = style.ordered(one.arm for one in measurements)
    return sorted(measurements, key=lambda one: order.index(one.arm))


def arms_section(measurements: Sequence[Measurement]) -> Section:
    """Accuracy of every arm, and the gap closed."""
    groups = grouped(by_arm(measurements), panel_title)
    accuracies = {title: of_metric(group, "accuracy") for title, group in groups.items()}
    accuracies = {title: group for title, group in accuracies.items() if group}
    every = [one for group in accuracies.values() for one in group]
    trained = {one.stage for one in every} - {"none"}
    figures = []
    # Evidence and single runs have settings of other names: one figure for each kind of setting.
    kinds = grouped(every, lambda one: tuple(key for key, _ in one.setting))
    for number, kind in enumerate(kinds.values(), start=1):
        figures.append(
            dot_figure(
                grouped(kind, panel_title),
                name="arms" if number == 1 else f"arms-{number}",
                row=lambda one: one.arm,
                rows=style.ordered(one.arm for one in kind),
                hue=(lambda one: one.stage) if len({one.stage for one in kind} - {"none"}) > 1 else None,
                caption="Accuracy of every arm on held-out problems.",
            )
        )
    tables, findings = [], []
    for title, group in groups.items():
        closed = gaps(of_metric(group, "accuracy"))
        best = max(closed, key=lambda key: closed[key], default=None)
        if best is not None:
            findings.append(
                f"{title}: {style.label(best[0])} ({style.STAGES.get(best[1], best[1])}) closes "
                f"{100 * closed[best]:.0f} % of the gap from LoRA_c to full-cache LoRA."
            )
        tables.append(arms_table(title, group, closed=closed, stages=len(trained) > 1))
    return Section(
        "arms",
        "Arms",
        "Which policy answers right under which cache? Gap closed is (arm - LoRA_c) / (LoRA with the full cache - "
        "LoRA_c), of the means.",
        tuple(findings),
        tuple(figures),
        tuple(tables),
    )


def gaps(measurements: Sequence[Measurement]) -> dict[tuple[str, str], float]:
    """Gap closed by (arm, stage), against the references that had learned in the same way."""
    means = {key: estimate(group).mean for key, group in grouped(measurements, lambda o: (o.arm, o.stage)).items()}
    found = {}
    for (arm, stage), mean in means.items():
        low, high = (means.get((reference, stage)) for reference in REFERENCES)
        if arm not in REFERENCES and low is not None and high is not None:
            closed = gap_closed(mean, low=low, high=high)
            if closed is not None:
                found[arm, stage] = closed
    return found


def arms_table(
    title: str, measurements: Sequence[Measurement], *, closed: dict[tuple[str, str], float], stages: bool
) -> Table:
    """One task and setting."""
    metrics = list(dict.fromkeys(one.metric for one in measurements))
    metrics = [one for one in ("accuracy",) if one in metrics] + [one for one in metrics if one != "accuracy"]

    def gap(group: Sequence[Measurement]) -> str:
        value = closed.get((group[0].arm, group[0].stage))
        return NOTHING if value is None else f"{100 * value:.0f} %"

    columns = [("arm", arm_name), *([("learned by", stage_name)] if stages else [])]
    return means_table(
        by_arm(measurements),
        title=title,
        names=columns,
        metrics=metrics,
        more=[("gap closed", gap), ("seeds", lambda group: str(len(seeds_of(group))))],
        note=interval_note(of_metric(measurements, "accuracy"), lambda one: (one.arm, one.stage)),
    )


def interval_note(measurements: Sequence[Measurement], key: Callable[[Measurement], Hashable]) -> str:
    """A sentence on what the brackets are."""
    estimates = [estimate(group) for group in grouped(measurements, key).values()]
    kinds = {one.interval for one in estimates} - {"none"}
    if not kinds:
        return ""
    totals = sorted({one.total for one in estimates if one.total})
    answers = (
        ""
        if not totals
        else f" of {totals[0]} answers"
        if len(totals) == 1
        else f" of {totals[0]} to {totals[-1]} answers"
    )
    names = {
        "t over seeds": "Student's t over the seeds",
        "Wilson": f"Wilson's{answers} (one seed, or seeds that agree)",
    }
    return f"Brackets: 95 % intervals, {'; '.join(names[kind] for kind in sorted(kinds))}."


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
        line_label=lambda rank: f"rank {rank}",
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
    findings = [f"{row[0]}, rank {row[1]}: knee at {row[3]} facts." for row in table.rows if row[3] != NOTHING]
    return Section(
        "capacity",
        "Capacity",
        "How many facts does a state of a given rank hold before recall breaks down?",
        tuple(findings),
        (figure,),
        (table,),
    )


def over_condition(
    measurements: Sequence[Measurement],
    *,
    name: str,
    scale: Scale,
    caption: str,
    column_label: str,
) -> tuple[tuple[DrawnFigure, ...], tuple[Table, ...]]:
    """A figure and a table for each metric over a condition of the setting, lines for arms, panels for the rest."""
    figures, tables = [], []
    hidden = [scale.key, *([scale.mark] if scale.mark else [])]
    metrics = list(dict.fromkeys(one.metric for one in measurements))
    for metric in metrics:
        found = by_arm(of_metric(measurements, metric))
        several = f"-{metric}" if len(metrics) > 1 else ""
        figures.append(
            line_figure(
                found,
                name=f"{name}{several}".replace("_", "-"),
                metric=metric,
                scale=scale,
                panel=lambda one: panel_title(one, *hidden),
                line=lambda one: one.arm,
                caption=caption,
            )
        )
        for title, group in grouped(found, lambda one: panel_title(one, *hidden)).items():
            shown = spread({one.number(scale.key) for one in group})
            tables.append(
                pivot(
                    [one for one in group if one.number(scale.key) in shown],
                    title=f"{title}: {style.metric_label(metric)} by {column_label}",
                    names=[("arm", arm_name)],
                    column=lambda one: one.number(scale.key),
                    column_label=lambda value: f"{value:,.0f}" if float(str(value)).is_integer() else f"{value:g}",
                    note=interval_note(group, lambda one: (one.arm, one.setting)),
                )
            )
    return tuple(figures), tuple(tables)


def spread(values: Iterable[float], *, at_most: int = 9) -> list[float]:
    """All of a few values; of many, some that are spread over them, both ends among them."""
    values = sorted(values)
    if len(values) <= at_most:
        return values
    return [values[round(place * (len(values) - 1) / (at_most - 1))] for place in range(at_most)]


def forgetting_section(measurements: Sequence[Measurement]) -> Section:
    """Accuracy by the age of the eviction."""
    figures, tables = over_condition(
        measurements,
        name="forgetting",
        scale=Scale("evictions_ago", "evictions since the value left the window, log scale", base=2),
        caption="Accuracy of recalling a value over how many evictions ago it left the cache.",
        column_label="evictions ago",
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
        measurements,
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
    """One factor at a time: accuracy against time and memory."""
    figures, tables = [], []
    for factor, group in grouped(measurements, lambda one: str(one.at("factor"))).items():
        values = sorted({str(one.at("value")) for one in group}, key=sort_key)
        name = factor.replace("_", " ")
        arms = {one.arm for one in group}
        figures.append(
            dot_figure(
                grouped(group, lambda one: f"{panel_title(one, 'factor', 'value')}: {style.metric_label(one.metric)}"),
                name=f"ablation-{style.file_name(factor)}",
                row=lambda one: str(one.at("value")),
                rows=values,
                hue=(lambda one: one.arm) if len(arms) > 1 else None,
                caption=f"What {name} changes, all else as in the main arms.",
            )
        )
        tables.append(
            means_table(
                sorted(group, key=lambda one: (one.task, sort_key(str(one.at("value"))))),
                title=f"Ablation of {name}",
                names=[
                    (name, lambda one: str(one.at("value"))),
                    ("arm", arm_name),
                    ("task", lambda one: panel_title(one, "factor", "value")),
                ],
                metrics=list(dict.fromkeys(one.metric for one in group)),
                more=[("seeds", lambda rows: str(len(seeds_of(rows))))],
                note=interval_note(of_metric(group, "accuracy"), lambda one: (one.arm, one.task, one.setting)),
            )
        )
    return Section(
        "ablation",
        "Ablations",
        "What does each choice cost or bring: accuracy against time and memory?",
        figures=tuple(figures),
        tables=tuple(tables),
    )


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
        f"question-{name}".replace("_", "-"),
        name.replace("_", " ").capitalize(),
        "Everything that was measured for this question.",
        tables=(table,),
    )
