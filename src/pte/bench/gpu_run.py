"""Runs parts of `--preset gpu`: which rows, in which order, how long, and what is kept.

Decides: `run_gpu`. A row is on disk before the next one begins; a row that this commit has measured is not measured
again, so that the same command goes on where it was stopped, and parts run one by one into one file add up. A part
that would pass its time leaves rows out and says so in them; out of memory in a row is a result; an error of ours is
reported in its row, on stderr and by the exit status, and the other rows are measured.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

import torch

from pte.bench.device import bench_device, clear, device_facts, measure_rates
from pte.bench.figures import Figures, gpu_figures
from pte.bench.gpu_bench import Bench
from pte.bench.gpu_float8 import float8_cases, measure_float8
from pte.bench.gpu_kernels import kernel_cases, measure_kernel
from pte.bench.gpu_plan import GpuPlan, plan_for
from pte.bench.gpu_report import print_gpu_report
from pte.bench.gpu_rollout import long_cases, measure_long, measure_rollout, rollout_cases
from pte.bench.gpu_step import measure_step, step_cases
from pte.bench.gpu_update import measure_update, update_cases
from pte.bench.machine import commit, versions
from pte.bench.rows import Case, NotMeasured, Part, Row, RowBook, Values, first_line
from pte.plan.roofline import DecodeWork
from pte.plan.shapes import random_base, shape_named

PARTS: dict[Part, tuple[Callable[[GpuPlan], list[Case]], Callable[[Bench, Case], Values]]] = {
    "rollout": (rollout_cases, measure_rollout),
    "long": (long_cases, measure_long),
    "update": (update_cases, measure_update),
    "step": (step_cases, measure_step),
    "kernels": (kernel_cases, measure_kernel),
    "float8": (float8_cases, measure_float8),
}


@dataclass
class PartClock:
    """What is left of a part's time, and how long its next row may take, judged by the rows before.

    Args:
        seconds: Of the part.
    """

    seconds: float
    begin: float = field(default_factory=perf_counter)
    rates: dict[str, float] = field(default_factory=dict)
    worst: dict[bool, float] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Seconds since the part began."""
        return perf_counter() - self.begin

    def note(self, case: Case, seconds: float) -> None:
        """Keeps what a row took for its work, where no row of its arm took more."""
        bounded, rate = case.window_tokens is not None, seconds / case.work
        self.rates[case.arm] = max(rate, self.rates.get(case.arm, 0.0))
        self.worst[bounded] = max(rate, self.worst.get(bounded, 0.0))

    def expected(self, case: Case) -> float:
        """Seconds that a row may take: of its arm, or of the slowest arm of its kind of cache; 0 for the first."""
        worst = self.worst.get(case.window_tokens is not None, 0.0)
        return self.rates.get(case.arm, worst) * case.work

    def reason_to_leave_out(self, case: Case) -> str | None:
        """Why there is no time for a row, or None."""
        left, expected = self.seconds - self.spent, self.expected(case)
        if left > 0 and expected <= left:
            return None
        return (
            f"left out for time: {expected:.0f} s expected, {max(left, 0):.0f} s left of the part's {self.seconds:.0f}"
        )


def run_gpu(
    model: str, device_name: str, *, parts: Sequence[str], output: Path | None, plan: GpuPlan | None = None
) -> Figures:
    """Measures parts, prints tables and, as the last line, one JSON object; progress goes to stderr.

    Args:
        model: Name of the shape.
        device_name: `cuda`, or `cpu` for the tiny model.
        parts: Names of parts; none for all.
        output: File that the rows are kept in, and that rows of earlier runs come from.
        plan: Settings; those of the model when there are none.

    Returns:
        The figures.

    Raises:
        ValueError: An unknown model or part, no such device, or a file of something else.
        RuntimeError: A row failed; all other rows were measured, kept and printed.
    """
    shape, device = shape_named(model), bench_device(device_name, model=model)
    wanted = parts_named(parts)
    plan = plan or plan_for(model)
    facts = device_facts(device)
    header: Values = {
        "preset": "gpu",
        "model": model,
        "device": facts.get("gpu") or facts["cpu"],
        "plan": json.loads(json.dumps(asdict(plan))),
        "hardware": facts,
        "versions": versions(),
        "commit": commit(),
    }
    book = RowBook(output, header=header, identity=("preset", "model", "device", "plan"))
    progress(f"{model} on {header['device']}: random weights")
    bench = Bench(
        plan,
        shape,
        random_base(shape, dtype=plan.torch_dtype, device=device),
        device,
        DecodeWork.of(shape, plan.torch_dtype),
        measure_rates(device, plan),
    )
    progress(
        f"measured: {bench.rates.bytes_per_second / 1e9:.0f} GB/s, {bench.rates.flops_per_second / 1e12:.2f} TFLOP/s"
    )
    failures = [failure for part in wanted for failure in run_part(bench, book, part)]
    figures = gpu_figures(book.rows, model=model)
    print_gpu_report(book, figures=figures, suggestion=None if output else suggested_name(header, plan))
    if failures:
        raise RuntimeError(f"{len(failures)} rows failed, the others are kept: {'; '.join(failures)}")
    return figures


def parts_named(names: Sequence[str]) -> list[Part]:
    """Parts by name, in the order in which they are measured; none stands for all.

    Raises:
        ValueError: There is no such part.
    """
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {unknown[0]!r}; leave it out for all of them")
    return [part for part in PARTS if not names or part in names]


def run_part(bench: Bench, book: RowBook, part: Part) -> list[str]:
    """Measures the rows of a part that are not measured yet; returns what failed."""
    cases, measure = PARTS[part]
    clock = PartClock(bench.plan.part_seconds)
    failures: list[str] = []
    run: Values = {
        "commit": book.commit,
        "versions": book.header["versions"],
        "hardware": book.header["hardware"],
        "rates": asdict(bench.rates),
    }
    for case in cases(bench.plan):
        if book.has(case):
            continue
        row = measured_row(case, clock, lambda case=case: measure(bench, case), commit=book.commit)  # type: ignore[misc]
        clear(bench.device)
        if row.failed:
            failures.append(f"{case.label}: {row.not_measured}")
        book.parts[part] = {**run, "seconds": round(clock.spent, 1)}
        book.add(row)
        progress(f"{case.label}: {outcome(row)}")
    return failures


def measured_row(case: Case, clock: PartClock, measure: Callable[[], Values], *, commit: str | None) -> Row:
    """What becomes of a case."""
    reason = clock.reason_to_leave_out(case)
    if reason is not None:
        return Row(case, commit, {}, reason)
    begin, failed = perf_counter(), False
    try:
        values = measure()
    except NotMeasured as error:
        reason = str(error)
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {first_line(error)}"
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        traceback.print_exception(error, file=sys.stderr)
        reason, failed = first_line(error), True
    else:
        clock.note(case, perf_counter() - begin)
        return Row(case, commit, values)
    return Row(case, commit, {}, reason, failed)


def outcome(row: Row) -> str:
    """A row in a few words, with the way in which its tokens were computed."""
    if row.not_measured is not None:
        return f"not measured, {row.not_measured}"
    words = []
    for name, unit, scale in (
        ("seconds_per_step", "ms a step", 1e3),
        ("seconds", "s", 1),
        ("tokens_per_second", "tokens/s", 1),
        ("roofline_fraction", "of the roofline", 1),
        ("model_flops_fraction", "of the matrix rate", 1),
        ("bound_fraction", "of the bound", 1),
    ):
        found = row.number(name, "median") if row.number(name) is None else row.number(name)
        if found is not None:
            words.append(f"{found * scale:.3g} {unit}")
    path = row.values.get("path")
    return ", ".join(words + ([f"path: {path}"] if path else []))


def suggested_name(header: Values, plan: GpuPlan) -> str:
    """Where these rows belong: benchmarks/baselines/<hardware>-<model>-<setting>.json."""
    hardware = "-".join(str(header["device"]).lower().split())
    return f"benchmarks/baselines/{hardware}-{header['model']}-w{plan.window_tokens}.json"


def progress(line: str) -> None:
    """One line on stderr."""
    print(f"bench: {line}", file=sys.stderr, flush=True)
