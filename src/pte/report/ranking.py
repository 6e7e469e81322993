"""The question of the main table: which arm answers right under which cache, and how much of the gap it closes.

Decides: its figure, tables and sentences; against which arms the gap is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from pte.report import style
from pte.report.figures import dot_figure, panel_title
from pte.report.measurements import Measurement, grouped, of_metric, seeds_of
from pte.report.section import Section, by_arm, interval_note
from pte.report.statistics import estimate, gap_closed
from pte.report.tables import NOTHING, Table, arm_name, means_table, stage_name

REFERENCES = ("lora_window", "lora_full")


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
