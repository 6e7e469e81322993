"""The arms of every comparison, after the paper's tables and with the controls that a memory needs.

Decides: what each arm is, as a change of one PTE experiment: kind of adapter, update rule, cache, control of the state,
and nothing else. "At equal bytes" means that an arm without a state gets the state's bytes as window.

Paper: its tables compare the base, LoRA with the full cache, LoRA_c (LoRA under the window) and PTE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pte.model.load import dtype_named, load_cache_shape
from pte.tasks.chained import embedded_model_dir

if TYPE_CHECKING:
    from pte.config import CacheConfig, ExperimentConfig
    from pte.method.thought import UpdateRule

STATE_BYTES_PER_NUMBER = 4


@dataclass(frozen=True)
class Arm:
    """How an arm differs from the PTE experiment that it is compared in.

    Args:
        adapter: Kind of adapter; None keeps the experiment's.
        update_rule: Of the state; None keeps the experiment's.
        cache: The full cache, the experiment's window, or that window enlarged by the state's bytes.
        policy: Who leaves; None keeps the experiment's policy.
        state_control: A control scores the trained arm that it is named after.
    """

    adapter: Literal["none", "lora", "global_only"] | None = None
    update_rule: UpdateRule | None = None
    cache: Literal["full", "window", "larger"] = "window"
    policy: Literal["window", "random", "h2o", "rkv"] | None = None
    state_control: Literal["own", "zeroed", "shuffled"] = "own"


ARMS: dict[str, Arm] = {
    "base_full": Arm(adapter="none", cache="full"),
    "base_window": Arm(adapter="none"),
    "lora_full": Arm(adapter="lora", cache="full"),
    "lora_window": Arm(adapter="lora"),
    "lora_window_larger": Arm(adapter="lora", cache="larger"),
    "lora_random": Arm(adapter="lora", cache="larger", policy="random"),
    "lora_h2o": Arm(adapter="lora", cache="larger", policy="h2o"),
    "lora_rkv": Arm(adapter="lora", cache="larger", policy="rkv"),
    "global_only": Arm(adapter="global_only"),
    "pte": Arm(),
    "pte_paper": Arm(update_rule="paper"),
    "pte_read": Arm(update_rule="read"),
    "pte_delta": Arm(update_rule="delta"),
    "pte_zeroed": Arm(state_control="zeroed"),
    "pte_shuffled": Arm(state_control="shuffled"),
}


def arm_config(config: ExperimentConfig, name: str) -> ExperimentConfig:
    """The experiment of one arm: the same but for adapter, cache and control.

    Args:
        config: Of the PTE arm.
        name: One of `ARMS`.
    """
    arm = ARMS[name]
    adapter = replace(
        config.adapter,
        kind=arm.adapter or config.adapter.kind,
        update_rule=arm.update_rule or config.adapter.update_rule,
    )
    return replace(
        config,
        adapter=adapter,
        cache=arm_cache(config, arm),
        eval=replace(config.eval, state_control=arm.state_control),
    )


def arm_cache(config: ExperimentConfig, arm: Arm) -> CacheConfig:
    """The cache of an arm; an enlarged window evicts the same fraction."""
    if arm.cache == "full":
        return replace(config.cache, policy="none")
    cache = replace(config.cache, policy=arm.policy or config.cache.policy)
    if arm.cache == "window":
        return cache
    blocks = cache.window_tokens // cache.evict_tokens
    evict = math.ceil((cache.window_tokens + state_tokens(config)) / blocks)
    return replace(cache, window_tokens=blocks * evict, evict_tokens=evict)


def state_tokens(config: ExperimentConfig) -> int:
    """Reasoning tokens whose keys and values take the bytes of one sequence's state, rounded up."""
    path = str(embedded_model_dir()) if config.model.path == "embedded" else config.model.path
    shape = load_cache_shape(path, trust_remote_code=config.model.trust_remote_code)
    state = shape.layers * config.adapter.rank**2 * STATE_BYTES_PER_NUMBER
    return math.ceil(state / shape.token_bytes(dtype_named(config.model.dtype)))
