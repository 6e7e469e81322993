"""Memory of one step in a process of its own: `python -m pte.evidence.memory_process '{"config": {...}, ...}'`.

Decides: what is read. A short step first (libraries loaded, optimizer state made), then the growth at the peak of a
rollout, and of an update on it, each beyond what the process held before: of resident memory on a CPU, of tensors on a
GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping

import torch

from pte.config import ExperimentConfig
from pte.config_file import SECTIONS
from pte.config_rules import FieldValue
from pte.evidence.cost import warmup_tokens
from pte.evidence.step import CostStep
from pte.learn.scored import ScoredRollout
from pte.plan.process_memory import peak_growth_bytes, probe_available


def main(request: str) -> None:
    """Prints one JSON object, as `memory_over_tokens` describes it."""
    fields = json.loads(request)
    torch.set_num_threads(fields["threads"])
    print(json.dumps(read_memory(config_of(fields["config"]), fields["tokens"])))


def config_of(sections: Mapping[str, Mapping[str, FieldValue]]) -> ExperimentConfig:
    """The configuration whose `asdict` went through JSON."""
    return ExperimentConfig(
        **{
            section: SECTIONS[section](
                **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            )
            for section, values in sections.items()
        }
    )


def read_memory(config: ExperimentConfig, tokens: int) -> dict[str, float]:
    """Cache, state and peaks of one step, in this process."""
    step = CostStep(config)
    step.run(warmup_tokens(config, tokens), 0)
    scored: list[ScoredRollout] = []
    rollout_peak = growth(step.device, lambda: scored.extend(step.score(step.sample(tokens, 1), 1)))
    readings = {
        "tokens": float(tokens),
        "cache_bytes": float(step.cache_bytes),
        "state_bytes": float(step.state_bytes),
    }
    if rollout_peak is None:
        return readings
    readings["rollout_peak_bytes"] = rollout_peak
    update_peak = None if step.stage is None else growth(step.device, lambda: step.update(scored))
    return readings if update_peak is None else {**readings, "update_peak_bytes": update_peak}


def growth(device: torch.device, work: Callable[[], None]) -> float | None:
    """Bytes at the peak of some work beyond those before it; None, and nothing is done, where it cannot be read."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return float(torch.cuda.max_memory_allocated(device) - before)
    if not probe_available():
        return None
    return float(peak_growth_bytes(work))


if __name__ == "__main__":
    main(sys.argv[1])
