"""`pte plan`: a configuration and a machine in, a table and sentences out.

Decides: the order of work, refusals first. Does not know formulas or words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pte.plan.arms import plan_arms, planned_work
from pte.plan.machine import planned_machine
from pte.plan.model_sizes import model_sizes
from pte.plan.report import as_json, memory_table, sentences, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from pte.config import ExperimentConfig


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for; the fields of `PlanArguments`.

    Args:
        experiment: Of the PTE arm.
        gpu_memory: Of the GPU.
        host_memory: Beside it, or of a machine without one.
        gpu: Name of the GPU.
        bandwidth: Of its memory, bytes a second.
        flops: Of its matrix products, operations a second.
        prompt: Tokens of the longest prompt.
        output: JSON file, or None.
    """

    experiment: ExperimentConfig
    gpu_memory: str | None
    host_memory: str | None
    gpu: str | None
    bandwidth: float | None
    flops: float | None
    prompt: int
    output: str | None


def write_plan(request: PlanRequest, console: Console) -> None:
    """Plans the three arms, prints the table and what it means, writes the file.

    Raises:
        ValueError, FileNotFoundError: The machine, the model or the experiment cannot be planned.
    """
    config = request.experiment
    machine = planned_machine(
        gpu=request.gpu,
        gpu_memory=request.gpu_memory,
        host_memory=request.host_memory,
        bandwidth=request.bandwidth,
        flops=request.flops,
    )
    sizes = model_sizes(config.model.path, trust_remote_code=config.model.trust_remote_code)
    plans = plan_arms(config, sizes, machine, prompt_tokens=request.prompt)
    work = planned_work(config, prompt_tokens=request.prompt)
    place = "GPU" if machine.cuda else "CPU"
    console.print(
        f"{config.model.path}, {sizes.parameters:,} parameters, {config.model.dtype}, on a {place} with "
        f"{size_text(machine.device_bytes)}: prompt {work.prompt_tokens}, completion {work.completion_tokens}, window "
        f"{config.cache.window_tokens} less {config.cache.evict_tokens} at once, {work.slots} slots, "
        f"{work.sequences} sequences a step in groups of {work.group_size}, micro-batch {work.micro_batch}, gradient "
        f"mode {work.gradient_mode}",
        highlight=False,
    )
    console.print(memory_table(plans, machine, work))
    for sentence in sentences(plans, machine):
        console.print(sentence, highlight=False)
    if request.output is not None:
        Path(request.output).write_text(json.dumps(as_json(plans, machine), indent=2) + "\n", encoding="utf-8")
