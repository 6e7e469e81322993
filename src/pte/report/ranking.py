"""The question of the main table: which arm answers right under which cache, and how much of the gap it closes.

Decides: its figure, tables and sentences; against which arms the gap is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pte.report import style
from pte.report.figures import dot_figure, panel_title
from pte.report.measurements import (
    STOPPED,
    Measurement,
    grouped,
    of_metric,
    seeds_of,
    state_bytes_note,
    with_state_bytes,
)
from pte.report.section import Section, by_arm, interval_note
from pte.report.statistics import Estimate, estimate, gap_closed
from pte.report.tables import NOTHING, Table, arm_name, means_table, stage_name

REFERENCES = ("lora_window", "lora_full")


@dataclass(frozen=True)
class GapClosed:
    """How much of the gap between the references an arm closes.

    Args:
        estimate: A mean over the seeds that all three arms have, or of the means over each arm's own.
        paired: Whether it is over common seeds.
    """

    estimate: Estimate
    paired: bool

    def shown(self) -> str:
        """In percent, with its interval."""
        one = self.estimate
        text = f"{round(100 * one.mean)} %"
        return (
            text if one.low is None or one.high is None else f"{text} [{round(100 * one.low)}, {round(100 * one.high)}]"
        )


def arms_section(measurements: Sequence[Measurement]) -> Section:
    """Accuracy of every arm, and the gap closed.

    Args:
        measurements: Scores, and where a training stopped early.
    """
    groups = grouped(by_arm(measurements), panel_title)
    accuracies = {title: of_metric(group, "accuracy") for title, group in groups.items()}
    accuracies = {title: group for title, group in accuracies.items() if group}
    every = [one for group in accuracies.values() for one in group]
    trained = {one.stage for one in measurements} - {"none"}
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
        best = max(closed, key=lambda key: closed[key].estimate.mean, default=None)
        if best is not None:
            findings.append(
                f"{title}: {style.label(best[0])} ({style.STAGES.get(best[1], best[1])}) closes "
                f"{closed[best].shown()} of the gap from LoRA_c to full-cache LoRA."
            )
        tables.append(arms_table(title, group, closed=closed, stages=len(trained) > 1))
    return Section(
        "arms",
        "Arms",
        "Which policy answers right under which cache? Gap closed is (arm - LoRA_c) / (LoRA with the full cache - "
        "LoRA_c).",
        tuple(findings),
        tuple(figures),
        tuple(tables),
    )


def gaps(measurements: Sequence[Measurement]) -> dict[tuple[str, str], GapClosed]:
    """Gap closed by (arm, stage), against the references that had learned in the same way.

    Args:
        measurements: Accuracies of one task and setting.
    """
    groups = grouped(measurements, lambda one: (one.arm, one.stage))
    found = {}
    for (arm, stage), group in groups.items():
        low, high = (groups.get((reference, stage)) for reference in REFERENCES)
        if arm not in REFERENCES and low is not None and high is not None:
            closed = gap_of(group, low=low, high=high)
            if closed is not None:
                found[arm, stage] = closed
    return found


def gap_of(arm: Sequence[Measurement], *, low: Sequence[Measurement], high: Sequence[Measurement]) -> GapClosed | None:
    """Gap closed by an arm: the mean over common seeds; without a common seed with a gap, of the means; else None."""
    common = [seed for seed in seeds_of(arm) if seed in seeds_of(low) and seed in seeds_of(high)]
    paired = []
    for seed in common:
        value, below, above = (estimate([one for one in group if one.seed == seed]).mean for group in (arm, low, high))
        closed = gap_closed(value, low=below, high=above)
        if closed is not None:
            paired.append(replace(arm[0], seed=seed, metric="gap_closed", value=closed, right=None, total=None))
    if paired:
        return GapClosed(estimate(paired), paired=True)
    value, below, above = (estimate(group).mean for group in (arm, low, high))
    closed = gap_closed(value, low=below, high=above)
    if closed is None:
        return None
    return GapClosed(Estimate(closed, None, None, len(seeds_of(arm)), "none"), paired=False)


def gap_note(closed: Mapping[tuple[str, str], GapClosed]) -> str:
    """A sentence on how the gaps of a table were computed; empty without one."""
    paired = [one.estimate for one in closed.values() if one.paired]
    of_means = style.ordered(arm for (arm, _), one in closed.items() if not one.paired)
    words = []
    if paired:
        counts = sorted({one.seeds for one in paired})
        words.append(
            f"Gap closed: mean of the gaps of each seed that the arm and both references have (n: "
            f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''})"
            + (", 95 % intervals of Student's t" if any(one.low is not None for one in paired) else "")
            + "."
        )
    if of_means:
        words.append(
            f"Gap closed of {', '.join(map(style.label, of_means))}: of the means over all seeds of each arm, as no "
            f"seed with a gap is common to all three."
        )
    return " ".join(words)


def arms_table(
    title: str, measurements: Sequence[Measurement], *, closed: Mapping[tuple[str, str], GapClosed], stages: bool
) -> Table:
    """One task and setting."""
    scored = with_state_bytes(measurements)
    metrics = list(dict.fromkeys(one.metric for one in scored if one.metric != STOPPED))
    metrics = [one for one in ("accuracy",) if one in metrics] + [one for one in metrics if one != "accuracy"]

    def gap(group: Sequence[Measurement]) -> str:
        one = closed.get((group[0].arm, group[0].stage))
        return NOTHING if one is None else one.shown()

    columns = [("arm", arm_name), *([("learned by", stage_name)] if stages else [])]
    notes = (
        interval_note(of_metric(scored, "accuracy"), lambda one: (one.arm, one.stage)),
        gap_note(closed),
        state_bytes_note(measurements),
    )
    return means_table(
        by_arm(scored),
        title=title,
        names=columns,
        metrics=metrics,
        more=[("gap closed", gap), ("seeds", seed_count)],
        note=" ".join(note for note in notes if note),
    )


def seed_count(measurements: Sequence[Measurement]) -> str:
    """How many seeds an arm was scored at, such as `3`, or `2 of 3, 1 stopped` where trainings ended early."""
    stopped = set(seeds_of(of_metric(measurements, STOPPED)))
    scored = set(seeds_of(one for one in measurements if one.metric != STOPPED))
    if not stopped:
        return str(len(scored))
    return f"{len(scored)} of {len(scored | stopped)}, {len(stopped)} stopped"
