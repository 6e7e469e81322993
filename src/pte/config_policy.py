"""The sections of an experiment that say what the policy is: its base, its adapter, its cache.

Decides: their fields, their defaults and the rules that a value must obey. Every refusal gives name, rule, value and
remedy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pte.config_rules import check_types, require, require_above_zero, require_at_least
from pte.method.eviction.registry import POLICIES, PolicyName, RegisteredPolicy
from pte.method.schedule import EvictionSchedule

LinearMap = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base."""

    path: str = "embedded"
    """Directory or hub name of a Transformers causal LM; `embedded` is the tiny reasoner shipped with pte."""
    dtype: Literal["float32", "bfloat16", "float16", "float8"] = "float32"
    """Of the base's weights, keys and values; the adapter and its state are float32 in any case. `float8`: linear maps
    and cache in float8, all else in bfloat16 (docs/precision.md)."""
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1` or `mps`."""
    trust_remote_code: bool = False
    """Run code that the checkpoint brings along."""
    allow_beyond_trained_positions: bool = False
    """Allow prompt plus completion to exceed the positions that the base was trained on."""

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.path), "path", rule="name a model", value=self.path, remedy="use 'embedded'")
        require(
            re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device) is not None,
            "device",
            rule="be 'cpu', 'mps', 'cuda' or 'cuda:<index>'",
            value=self.device,
            remedy="use 'cpu' where there is no accelerator",
        )


@dataclass(frozen=True)
class AdapterConfig:
    """The trainable update on the base's linear maps, DeltaW = A S B."""

    kind: Literal["thought", "global_only", "lora", "none"] = "thought"
    """`thought`: evictions change S; `global_only`: S keeps its first value; `lora`: S = I; `none`: the base alone."""
    rank: int = 32
    """Of A, B and S. The paper uses 32."""
    scale: float = 1.0
    """Factor on the update."""
    targets: tuple[LinearMap, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Adapted linear maps of every adapted layer."""
    layers: tuple[int, ...] = ()
    """Adapted layers, from 0; leave it out for all."""
    update_rule: Literal["delta", "read", "paper"] = "delta"
    """`paper` normalises S at every eviction; `read` keeps the plain sum and normalises where it is read; `delta` first
    removes what S already answers to a token's key."""
    key_space: Literal["pre_rotary", "post_rotary"] = "pre_rotary"
    """Keys as they were before the rotary embedding, or after it."""
    global_tokens: int = 32
    """Learnable global tokens that give S its first value. The paper uses 32."""
    down_start: Literal["queries", "random"] = "queries"
    """How B starts: `queries`: as the base's own queries, so that it reads what they would attend to; `random`: as in
    LoRA. An adapter of kind `lora` always starts at random."""
    checkpoint: str | None = None
    """Directory of a saved adapter or of a run to start from; a folder of PEFT, too, of peft_type PTE or LORA (whose A
    and B start an adapter of kind `lora`, or of another kind with a fresh encoder)."""

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(1, "rank", value=self.rank, remedy="the paper uses 32")
        require_above_zero("scale", value=self.scale, remedy="use 1.0")
        require(
            bool(self.targets),
            "targets",
            rule="name at least one linear map",
            value=self.targets,
            remedy="leave it out for all seven",
        )
        require(
            len(set(self.targets)) == len(self.targets),
            "targets",
            rule="name each linear map once",
            value=self.targets,
            remedy="drop the repetition",
        )
        require(
            len(set(self.layers)) == len(self.layers) and all(layer >= 0 for layer in self.layers),
            "layers",
            rule="name different layers, the first being 0",
            value=self.layers,
            remedy="leave it out for all layers",
        )
        require_at_least(0, "global_tokens", value=self.global_tokens, remedy="the paper uses 32")
        require(
            self.kind != "global_only" or self.global_tokens > 0,
            "global_tokens",
            rule="be at least 1 with kind 'global_only' (the state would always be zero)",
            value=self.global_tokens,
            remedy="the paper uses 32",
        )


@dataclass(frozen=True)
class CacheConfig:
    """The budget of the KV cache. It counts reasoning tokens; the prompt comes on top and is never evicted."""

    policy: PolicyName = "window"
    """Which tokens leave: the oldest (`window`), the oldest but the first few, random ones, by a score of attention
    (`h2o`, `scissorhands`, `tova`, `snapkv`), of keys (`keydiff`) or of both (`rkv`), or none (the full cache)."""
    window_tokens: int = 1024
    """Reasoning tokens kept at most, a multiple of evict_tokens; unused with policy `none`."""
    evict_tokens: int = 256
    """Reasoning tokens evicted at once. The paper evicts 25 % of the window."""
    sink_tokens: int = 4
    """First reasoning tokens that never leave; read with policy `sinks` only."""
    recent_tokens: int | None = None
    """Newest reasoning tokens that do not leave; read with `h2o` (unset: half the window), `scissorhands` (10),
    `snapkv` (32, at most a block: they observe), `rkv` (a block) and `keydiff` (0). Defaults leave room for a block."""

    def __post_init__(self) -> None:
        check_types(self)
        EvictionSchedule(self.window_tokens, evict_tokens=self.evict_tokens)
        require_at_least(1, "sink_tokens", value=self.sink_tokens, remedy="use policy 'window' for no sinks")
        require(
            self.policy != "sinks" or self.sink_tokens + self.evict_tokens <= self.window_tokens,
            "sink_tokens",
            rule=f"leave room for a block: sink_tokens + evict_tokens ({self.evict_tokens}) at most window_tokens "
            f"({self.window_tokens})",
            value=self.sink_tokens,
            remedy=f"use at most {self.window_tokens - self.evict_tokens}, or a larger window",
        )
        require_at_least(0, "recent_tokens", value=self.recent_tokens, remedy="leave it out for the policy's default")
        protects = self.registered.option == "recent_tokens"
        require(
            not protects or self.protected_tokens + self.evict_tokens <= self.window_tokens,
            "recent_tokens",
            rule=f"leave room for a block: recent_tokens + evict_tokens ({self.evict_tokens}) at most window_tokens "
            f"({self.window_tokens})",
            value=self.recent_tokens,
            remedy=f"use at most {self.window_tokens - self.evict_tokens}, or a larger window",
        )
        require(
            not self.registered.recent_observe or 1 <= self.protected_tokens <= self.evict_tokens,
            "recent_tokens",
            rule=f"be from 1 to evict_tokens ({self.evict_tokens}) with policy {self.policy!r}, whose newest tokens "
            f"observe",
            value=self.protected_tokens,
            remedy=f"use for example {self.evict_tokens}, with a window of two blocks or more",
        )

    @property
    def registered(self) -> RegisteredPolicy:
        """What is known of the policy; of the window's, which nobody asks, for the full cache."""
        return POLICIES["window" if self.policy == "none" else self.policy]

    @property
    def protected_tokens(self) -> int:
        """`recent_tokens`, or the default of the policy."""
        if self.recent_tokens is not None:
            return self.recent_tokens
        default = self.registered.recent_tokens(self.window_tokens, self.evict_tokens)
        return min(default, self.window_tokens - self.evict_tokens)

    @property
    def policy_option(self) -> int | None:
        """What the policy is made with; None for one without options."""
        option = self.registered.option
        return {None: None, "sink_tokens": self.sink_tokens, "recent_tokens": self.protected_tokens}[option]

    @property
    def schedule(self) -> EvictionSchedule:
        """The budget as the method knows it; without a window for policy `none`."""
        if self.policy == "none":
            return EvictionSchedule(None)
        return EvictionSchedule(self.window_tokens, evict_tokens=self.evict_tokens)
