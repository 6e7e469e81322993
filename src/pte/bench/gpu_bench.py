"""What the parts of `--preset gpu` share: one base on one device, its rates, and how a few quantities are read.

Decides: that all arms of a part run on the same base, adapters being put on and taken off, and that decode steps are
timed by a difference: (seconds of a run of n2 tokens - of one of n1) / (n2 - n1). What a run costs once, prompts read
and graphs captured, cancels; evictions and folds are in it with their share, n2 - n1 being whole blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from pte.bench.device import clear, elapsed_seconds, free_bytes
from pte.bench.rows import NotMeasured, Values
from pte.bench.timing import summary
from pte.plan.roofline import DecodeWork, DeviceRates, step_bound_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pte.bench.gpu_plan import GpuPlan
    from pte.plan.shapes import ModelShape

RESERVED_BYTES = 6 * 2**30
LOGIT_BYTES = 12
SMALLER_BATCH = 0.9
TRIES = 4


@dataclass(frozen=True)
class BoundedSteps:
    """A steady decode step of a bounded arm.

    Args:
        values: Of its row.
        fill_seconds: Of a run until the window is full.
        step_seconds: Of a step from then on.
    """

    values: Values
    fill_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Bench:
    """Where and with what rows are measured.

    Args:
        plan: Settings.
        shape: Of the base.
        base: Random weights.
        device: Where it lies.
        work: Of one decode step.
        rates: Of the device.
        bounded: Steady steps that were timed already, by arm, batch and window.
    """

    plan: GpuPlan
    shape: ModelShape
    base: PreTrainedModel
    device: torch.device
    work: DecodeWork
    rates: DeviceRates
    bounded: dict[tuple[str, int, int], BoundedSteps] = field(default_factory=dict)

    def readings(self, read: Callable[[int], float]) -> list[float]:
        """Readings of a row: as many as the plan allows, one at least, no further one after `row_seconds`.

        Args:
            read: Gets the number of the reading.
        """
        begin, found = perf_counter(), [read(0)]
        while len(found) < self.plan.repeats and perf_counter() - begin < self.plan.row_seconds:
            found.append(read(len(found)))
        return found

    def steps_by_difference(self, run: Callable[[int, int], object], *, short: int, long: int) -> list[float]:
        """Seconds of one decode step, several readings.

        Args:
            run: Makes a rollout of so many tokens with a seed.
            short: n1.
            long: n2.

        Raises:
            NotMeasured: The longer run did not take longer: it is too short for this clock.
        """

        def read(repeat: int) -> float:
            before = elapsed_seconds(self.device, lambda: run(short, repeat))
            return (elapsed_seconds(self.device, lambda: run(long, repeat)) - before) / (long - short)

        seconds = self.readings(read)
        if statistics.median(seconds) <= 0:
            raise NotMeasured(
                f"a run of {long} tokens took no longer than one of {short}: the clock sees no difference"
            )
        return seconds

    def step_values(self, seconds: Sequence[float], *, batch: int, attended_tokens: float) -> Values:
        """A decode step against its bound."""
        median = statistics.median(seconds)
        bound = step_bound_seconds(self.work, self.rates, batch=batch, attended_tokens=attended_tokens)
        return {
            "sequences": batch,
            "seconds_per_step": reading(seconds),
            "tokens_per_second": batch / median,
            "attended_tokens": attended_tokens,
            "bound_seconds_per_step": bound,
            "roofline_fraction": bound / median,
        }

    def largest_batch(self, tokens: int) -> int:
        """Sequences whose whole keys and values fit beside the weights, with room for logits and work space.

        Args:
            tokens: Of prompt and completion.

        Raises:
            NotMeasured: Not even one fits.
        """
        free = free_bytes(self.device)
        if free is None:
            return self.plan.largest_batch
        # One layer's keys and values exist twice while a growing cache is written anew.
        sequence = tokens * self.work.kv_token_bytes * (1 + 2 / self.shape.layers) + self.shape.vocab * LOGIT_BYTES
        fit = int((free - RESERVED_BYTES) // sequence)
        if fit < 1:
            raise NotMeasured(f"one sequence of {tokens} tokens needs {sequence / 2**30:.1f} GiB, too much is taken")
        return min(fit, self.plan.largest_batch)

    def with_largest_batch(self, tokens: int, measure: Callable[[int], Values]) -> Values:
        """What `measure` says of the largest batch that fits: a tenth less whenever memory does not suffice."""
        batch = self.largest_batch(tokens)
        for _ in range(TRIES - 1):
            try:
                return measure(batch)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            clear(self.device)
            batch = max(1, int(batch * SMALLER_BATCH))
        return measure(batch)


def reading(values: Sequence[float]) -> Values:
    """Median, least, largest and number of readings."""
    return {**summary(values), "repeats": len(values)}
