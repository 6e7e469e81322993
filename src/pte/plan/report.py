"""What a person and a program read of a plan: one table over the arms, sentences on what it means, and JSON.

Decides: words, units and order. Does not know how anything was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from rich.table import Table

from pte.plan.machine import CONTEXT_BYTES, FRAGMENTS_FRACTION
from pte.plan.memory import Row

if TYPE_CHECKING:
    from pte.plan.arms import ArmPlan
    from pte.plan.machine import Machine
    from pte.plan.memory import PhaseMemory, Workload

LABELS: dict[Row, str] = {
    "weights": "weights",
    "adapter": "adapter (float32, and copies in the base's dtype)",
    "optimizer": "optimizer (AdamW's two moments)",
    "gradients": "gradients",
    "slots": "slots: keys and values",
    "states": "states",
    "records": "records of every token",
    "prompts": "reading the prompts",
    "decode step": "decode step, its logits",
    "activations": "replay: activations",
    "LM head": "replay: LM head, beyond them",
    "evicted": "evicted keys and values",
}


def size_text(size: int) -> str:
    """Bytes for people: GB or MB, powers of 1000."""
    if size == 0:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.2f} MB"


def memory_table(plans: Sequence[ArmPlan], machine: Machine, work: Workload) -> Table:
    """Kinds of memory by arm and phase, then what fits and how long a step takes."""
    table = Table(title="peak of each phase, worst case", title_justify="left")
    table.add_column("")
    for plan in plans:
        for phase in ("rollout", "update"):
            table.add_column(f"{plan.name}\n{phase}", justify="right")
    for row in get_args(Row):
        cells = [phase.get(row, 0) for plan in plans for phase in on_device(plan)]
        if any(cells):
            table.add_row(LABELS[row], *map(size_text, cells))
    table.add_section()
    peaks = [sum(phase.values()) for plan in plans for phase in on_device(plan)]
    table.add_row("peak of tensors", *map(size_text, peaks))
    if machine.cuda:
        taken = [taken_bytes(plan, phase, machine) for plan in plans for phase in (plan.rollout, plan.update)]
        table.add_row("with context and fragments", *map(size_text, taken))
    hosts = [phase.host_bytes for plan in plans for phase in (plan.rollout, plan.update)]
    table.add_row("host memory" if machine.cuda else "of it: finished rollouts", *map(size_text, hosts))
    table.add_section()
    for label, words in summary_rows(plans, work):
        table.add_row(label, *(text for one in words for text in (one, "")))
    return table


def on_device(plan: ArmPlan) -> tuple[dict[Row, int], dict[Row, int]]:
    """All tensors of rollout and update, those that lie there for the whole of a run included."""
    whole = plan.policy.resident
    return with_phase(whole, plan, plan.rollout), with_phase(whole, plan, plan.update)


def with_phase(whole: dict[Row, int], plan: ArmPlan, phase: PhaseMemory) -> dict[Row, int]:
    """What lies there for the whole of a run and what a phase adds, by kind; on a CPU finished rollouts, too."""
    rows = dict(whole)
    for part in (phase.device,) if plan.policy.cuda else (phase.device, phase.host):
        for row, size in part.items():
            rows[row] = rows.get(row, 0) + size
    return rows


def taken_bytes(plan: ArmPlan, phase: PhaseMemory, machine: Machine) -> int:
    """Bytes of the device that are gone at a phase's peak."""
    on_cpu = 0 if machine.cuda else phase.host_bytes
    return machine.taken(resident=plan.resident_bytes, phase=phase.device_bytes + on_cpu)


def summary_rows(plans: Sequence[ArmPlan], work: Workload) -> list[tuple[str, list[str]]]:
    """What fits and how long a step takes, a cell for each arm."""
    rows = [
        ("fits", ["yes" if plan.fits else "no" for plan in plans]),
        ("largest slots", [str(plan.largest_slots) for plan in plans]),
        (
            f"largest micro-batch (of {work.sequences})",
            [str(plan.largest_micro_batch) for plan in plans],
        ),
        ("longest completion", [f"{plan.longest_completion:,}" for plan in plans]),
    ]
    times = [plan.time for plan in plans]
    if any(times):
        cells = [
            ("-",) * 4
            if time is None
            else (
                f"{time.tokens_per_second:,.0f}",
                f"{time.rollout_seconds:,.1f}",
                f"{time.update_seconds:,.1f}",
                f"{time.rollout_seconds + time.update_seconds:,.1f}",
            )
            for time in times
        ]
        labels = ("rollout tokens/s at the roofline", "rollout, s", "update, s", "step, s")
        rows += [(label, [cell[index] for cell in cells]) for index, label in enumerate(labels)]
    return rows


def sentences(plans: Sequence[ArmPlan], machine: Machine) -> list[str]:
    """What the table means, and what to lower where an arm does not fit."""
    said = []
    for plan in plans:
        if not plan.weights_fit:
            said.append(
                f"{plan.name} cannot run: weights, adapter and optimizer alone take "
                f"{size_text(plan.resident_bytes)} of {size_text(machine.device_bytes)}; use a smaller base, "
                f"--dtype bfloat16 or a larger device"
            )
        elif not plan.fits and plan.fits_recomputed:
            said.append(
                f"{plan.name} fits with --gradient-checkpointing, which computes each layer of the update twice"
                + (f", or with --micro-batch {plan.largest_micro_batch}" if plan.largest_micro_batch else "")
            )
        elif not plan.fits:
            said.append(
                f"{plan.name} does not fit: use --slots {max(plan.largest_slots, 1)} or less for the rollout and "
                f"--micro-batch {max(plan.largest_micro_batch, 1)} or less for the update"
                + recomputed_instead(plan)
                + ("" if plan.largest_slots and plan.largest_recomputed else ", and lower --completion or --window")
            )
    if machine.cuda:
        said.append(
            f"assumed, not measured on a GPU: {size_text(CONTEXT_BYTES)} for the CUDA context and "
            f"{FRAGMENTS_FRACTION:.0%} of a phase for what its allocator cannot use"
        )
    if any(plan.time for plan in plans):
        said.append(
            f"times are bounds: every completion of full length, each weight, key and value read once, nothing "
            f"computed twice; rates: {machine.rates_of}; expect 0.5 to 0.8 of the tokens/s"
        )
    return said


def recomputed_instead(plan: ArmPlan) -> str:
    """How many more sequences an update takes with gradient checkpointing, where it is more."""
    more = plan.largest_recomputed
    return f" (--gradient-checkpointing: {more})" if more > plan.largest_micro_batch else ""


def as_json(plans: Sequence[ArmPlan], machine: Machine) -> dict[str, object]:
    """The plan by arm, bytes and seconds."""
    arms = {}
    for plan in plans:
        rollout, update = on_device(plan)
        arms[plan.name] = {
            "fits": plan.fits,
            "largest_slots": plan.largest_slots,
            "largest_micro_batch": plan.largest_micro_batch,
            "fits_with_gradient_checkpointing": plan.fits_recomputed,
            "largest_micro_batch_with_gradient_checkpointing": plan.largest_recomputed,
            "longest_completion_tokens": plan.longest_completion,
            "rollout_bytes": rollout,
            "update_bytes": update,
            "rollout_taken_bytes": taken_bytes(plan, plan.rollout, machine),
            "update_taken_bytes": taken_bytes(plan, plan.update, machine),
            "rollout_host_bytes": plan.rollout.host_bytes,
            "update_host_bytes": plan.update.host_bytes,
            "time": None if plan.time is None else vars(plan.time),
        }
    return {"device_bytes": machine.device_bytes, "host_bytes": machine.host_bytes, "arms": arms}
