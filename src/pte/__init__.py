"""Progressive Thought Encoding: train reasoning models by RL under a fixed KV cache.

The public names below are imported when they are first used, so that `import pte` loads neither torch nor Transformers.
PEFT learns of our adapters, lm-evaluation-harness of our models, when it is imported, before or after pte.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pte.import_hook import import_after

if TYPE_CHECKING:
    from pte.method.adapter import ThoughtAdapter
    from pte.method.schedule import EvictionSchedule
    from pte.model.load import load_base, load_tokenizer
    from pte.model.policy import BoundedPolicy, attach_adapter, detach_adapter, layer_sizes
    from pte.rollout.generate import RolloutEngine
    from pte.rollout.record import Rollout, RolloutRequest, collate_rollouts
    from pte.rollout.replay import Replay

__all__ = [
    "BoundedPolicy",
    "EvictionSchedule",
    "Replay",
    "Rollout",
    "RolloutEngine",
    "RolloutRequest",
    "ThoughtAdapter",
    "attach_adapter",
    "collate_rollouts",
    "detach_adapter",
    "layer_sizes",
    "load_base",
    "load_tokenizer",
    "query_maps",
]

_HOMES = {
    "pte.method.adapter": ("ThoughtAdapter",),
    "pte.method.schedule": ("EvictionSchedule",),
    "pte.model.load": ("load_base", "load_tokenizer"),
    "pte.model.policy": ("BoundedPolicy", "attach_adapter", "detach_adapter", "layer_sizes", "query_maps"),
    "pte.rollout.generate": ("RolloutEngine",),
    "pte.rollout.record": ("Rollout", "RolloutRequest", "collate_rollouts"),
    "pte.rollout.replay": ("Replay",),
}


def __getattr__(name: str) -> object:
    """A public name, imported at its first use."""
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})


import_after("peft", "pte.integrations.peft_tuner")
import_after("lm_eval", "pte.integrations.lm_eval")
