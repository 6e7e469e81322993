"""What learning and memory cost, and how it goes: cost, memory over tokens, GRPO against time and tokens.

Decides: figures, tables and sentences of these questions, as `questions` does for the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pte.report import style
from pte.report.curves import learning_figure, rl_figure
from pte.report.derived import PLACES
from pte.report.figures import Scale, panel_title
from pte.report.grids import breakdown_metrics, stacked_figure
from pte.report.measurements import Measurement, grouped, of_metric, seeds_of, state_bytes_note, with_state_bytes
from pte.report.naming import names_of_lines
from pte.report.section import Section, by_arm, over_condition
from pte.report.statistics import Estimate, estimate
from pte.report.tables import NOTHING, Table, arm_name, means_table

if TYPE_CHECKING:
    from pte.report.runs import RecordedRun, Row

STATE_WORK = ("fold_seconds", "read_seconds")
STATE_SHARE = "state_fraction"
FLAT = 1.05


def learning_section(runs: Sequence[RecordedRun]) -> Section | None:
    """Learning curves: one figure for each comparison, one for all single runs together; None without a step."""
    groups: dict[str, Mapping[str, Sequence[Row]]] = {}
    lines = names_of_lines(runs)
    single = {lines[run.path]: arm.metrics for run in runs if run.path in lines for arm in run.arms if arm.metrics}
    if single:
        groups["runs"] = single
    for run in runs:
        metrics = {arm.name: arm.metrics for arm in run.arms if arm.metrics}
        if run.kind == "compare" and metrics:
            name = f"{run.name}-seed-{run.arms[0].seed}"
            groups[name if name not in groups else run.path] = metrics
    figures = [
        drawn
        for name, rows in groups.items()
        if (drawn := learning_figure(rows, name=f"learning-{style.file_name(name)}")) is not None
    ]
    if not figures:
        return None
    return Section(
        "learning",
        "Learning curves",
        "How do loss, reward, entropy and length move, and do rollout and replay stay one policy throughout?",
        figures=tuple(figures),
    )


def rl_section(measurements: Sequence[Measurement]) -> Section:
    """GRPO against wall time and tokens.

    Raises:
        ValueError: A measurement has no place on a curve.
    """
    measurements = sorted(measurements, key=place_on_curve)
    figures = []
    for title, group in grouped(by_arm(measurements), rl_title).items():
        drawn = rl_figure(group, name=f"rl-{style.file_name(title)}", caption=f"{title}: GRPO of every arm.")
        figures += [] if drawn is None else [drawn]
    rows, findings = [], []
    for (title, arm), group in grouped(by_arm(measurements), lambda one: (rl_title(one), one.arm)).items():
        first, last = (ends(group, part) for part in ("first", "last"))
        gaps = [one.value for one in of_metric(group, "logprob_gap_max")]
        spent = [
            max((one.number(key) for one in group if one.at(key) is not None), default=0)
            for key in ("seconds", "tokens")
        ]
        rows.append(
            (
                title,
                style.label(arm),
                str(len(seeds_of(group))),
                NOTHING if first is None else style.shown_estimate("reward", first),
                NOTHING if last is None else style.shown_estimate("reward", last),
                style.shown("seconds", spent[0]) if spent[0] else NOTHING,
                style.shown("tokens", spent[1]) if spent[1] else NOTHING,
                f"{max(gaps):.1e} nats" if gaps else NOTHING,
            )
        )
    gaps = [one.value for one in of_metric(measurements, "logprob_gap_max")]
    if gaps:
        findings.append(
            f"The largest gap between rollout and replay over all steps of all arms is {max(gaps):.1e} nats."
        )
    table = Table(
        "Reward at both ends of GRPO",
        ("task", "arm", "seeds", "reward, first tenth", "reward, last tenth", "wall time", "tokens", "largest gap"),
        tuple(rows),
        names=2,
        note="Rewards: means over the first and the last tenth of the steps; brackets: t over several seeds.",
    )
    return Section(
        "rl",
        "Reinforcement learning",
        "How far does GRPO lift a policy, against wall time and against tokens, and does the gap law hold?",
        tuple(findings),
        tuple(figures),
        (table,),
    )


def rl_title(one: Measurement) -> str:
    """Task, setting without the place on the curve, and learning stages: GRPO with and without a warm start differ."""
    stage = {"both": "after a warm start", "grpo": "without a warm start"}.get(one.stage, "")
    return f"{panel_title(one, *PLACES)} {stage}".rstrip()


def place_on_curve(one: Measurement) -> float:
    """Its step, or else its seconds or tokens.

    Raises:
        ValueError: It has none of them.
    """
    return one.number(next((key for key in PLACES if one.at(key) is not None), PLACES[0]))


def ends(measurements: Sequence[Measurement], part: str) -> Estimate | None:
    """The estimate over seeds of the mean reward of the first or last tenth of the steps; None without a reward."""
    means = []
    for group in grouped(of_metric(measurements, "reward"), lambda one: one.seed).values():
        rows = sorted(group, key=place_on_curve)
        count = max(1, len(rows) // 10)
        chosen = rows[:count] if part == "first" else rows[-count:]
        one = chosen[0]
        mean = statistics.fmean(row.value for row in chosen)
        means.append(Measurement(one.question, one.task, one.arm, one.stage, one.seed, (), one.metric, mean))
    return estimate(means) if means else None


def cost_section(measurements: Sequence[Measurement]) -> Section:
    """Speed, arithmetic, memory, and where the wall time goes."""
    found = by_arm(measurements)
    metrics = list(dict.fromkeys(one.metric for one in found))
    parts = breakdown_metrics(metrics)
    figures, tables, findings = [], [], []
    timed = {
        title: group for title, group in grouped([one for one in found if one.metric in parts], panel_title).items()
    }
    if timed:
        figures.append(
            stacked_figure(
                timed,
                name="cost",
                caption="Wall time of a step by what it is spent on; fold and read are the state's work. Means over "
                "the seeds of the table below, which has their intervals.",
            )
        )
    for title, group in grouped(found, panel_title).items():
        here = [metric for metric in metrics if any(one.metric == metric for one in group)]
        ordered = [metric for metric in here if metric not in parts] + [metric for metric in parts if metric in here]
        shares = {
            arm: share
            for arm, rows in grouped(group, lambda one: one.arm).items()
            if (share := state_share(rows)) is not None
        }
        findings += [
            f"{title}: {style.label(arm)} spends {style.shown('time_share', share)} of its wall time on the state."
            for arm, share in shares.items()
            if share > 0
        ]
        more = (
            [
                (
                    "fold + read",
                    lambda rows: NOTHING if (share := state_share(rows)) is None else style.shown("time_share", share),
                )
            ]
            if shares and STATE_SHARE not in here
            else []
        )
        tables.append(means_table(group, title=title, names=[("arm", arm_name)], metrics=ordered, more=more))
    return Section(
        "cost",
        "Cost",
        "What do rollout and update cost in wall time, arithmetic and memory, and how much of it is the state's work?",
        tuple(findings),
        tuple(figures),
        tuple(tables),
    )


def state_share(measurements: Sequence[Measurement]) -> float | None:
    """The share of fold and read in a step's wall time, as measured or from its parts; None without either."""
    by_metric = grouped(measurements, lambda one: one.metric)
    if STATE_SHARE in by_metric:
        return estimate(by_metric[STATE_SHARE]).mean
    seconds = {metric: estimate(by_metric[metric]).mean for metric in breakdown_metrics(by_metric)}
    if not any(metric in seconds for metric in STATE_WORK) or not sum(seconds.values()):
        return None
    return sum(seconds.get(metric, 0.0) for metric in STATE_WORK) / sum(seconds.values())


def memory_section(measurements: Sequence[Measurement]) -> Section:
    """A flat line against a rising one; the cache with the state, where its bytes were measured beside it."""
    told = state_bytes_note(measurements)
    measurements = with_state_bytes(measurements)
    figures, tables = over_condition(
        measurements,
        name="memory",
        scale=Scale("tokens", "tokens generated"),
        caption=" ".join(filter(None, ("Memory over the tokens of a completion.", told))),
        column_label="tokens generated",
    )
    findings = []
    for (title, metric), group in grouped(
        by_arm(measurements), lambda one: (panel_title(one, "tokens"), one.metric)
    ).items():
        words = []
        for arm, rows in grouped(group, lambda one: one.arm).items():
            values = {
                place: estimate(found).mean for place, found in grouped(rows, lambda one: one.number("tokens")).items()
            }
            middle = (min(values) + max(values)) / 2
            early, late = (
                [value for place, value in values.items() if (place > middle) is after] for after in (False, True)
            )
            if late and max(late) <= FLAT * max(early):
                words.append(f"{style.label(arm)} stays flat at {style.shown(metric, max(late))}")
            elif len(values) > 1:
                last = max(values)
                words.append(f"{style.label(arm)} rises to {style.shown(metric, values[last])} at {last:,.0f} tokens")
        if words:
            findings.append(f"{title}, {style.metric_label(metric)}: {'; '.join(words)}.")
    return Section(
        "memory",
        "Memory",
        "Does memory stay flat while completions grow? Flat: at most 5 % more in the second half.",
        tuple(findings),
        figures,
        tables,
    )
