"""A policy that is planned for a base, with the adapter and the cache of `tiny.tiny_policy` unless said otherwise."""

from __future__ import annotations

from pte.method.adapter import LINEAR_MAPS
from pte.method.schedule import EvictionSchedule
from pte.plan.memory import PlannedPolicy
from pte.plan.model_sizes import ModelSizes


def planned(base, **changes) -> PlannedPolicy:
    settings = {
        "sizes": ModelSizes.of(base.config),
        "dtype": base.dtype,
        "float8": False,
        "kind": "thought",
        "rank": 4,
        "targets": LINEAR_MAPS,
        "adapted_layers": 2,
        "global_tokens": 3,
        "schedule": EvictionSchedule(8, 4),
        "segments_per_stretch": 2,
        "cuda": False,
    }
    return PlannedPolicy(**{**settings, **changes})
