"""`PTEConfig`: a thought adapter as PEFT describes adapters, in `adapter_config.json`.

Decides: the names of the options in PEFT's vocabulary (`r`, `target_modules`) and that the budget an adapter was
trained with travels with it. Which values are allowed, `pte.config_policy` says, as for every experiment. Importing
this module makes the configuration known to PEFT. Does not know models or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, get_args

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from pte.config_policy import AdapterConfig, CacheConfig
from pte.lora_folder import load_lora
from pte.method.adapter import LINEAR_MAPS, AdapterKind
from pte.method.thought import KeySpace, UpdateRule
from pte.peft_folder import PEFT_TYPE, TASK_TYPE

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

PEFT_VERSIONS = "0.21."


@dataclass
class PTEConfig(PeftConfig):
    """What a thought adapter is, and the budget under which it was trained.

    Raises:
        ValueError, TypeError: A value that no adapter or no cache can have.
    """

    peft_type: str = PEFT_TYPE
    task_type: str = TASK_TYPE
    r: int = 32
    """Rank of A, B and S. The paper uses 32."""
    target_modules: list[str] | None = None
    """Adapted linear maps of every adapted layer, by their own names; None for all seven."""
    layers: list[int] | None = None
    """Adapted layers, from 0; None for all."""
    scale: float = 1.0
    """Factor on the update."""
    kind: AdapterKind = "thought"
    """`thought`: evictions change S; `global_only`: S keeps its first value; `lora`: S = I."""
    update_rule: UpdateRule = "delta"
    """How evictions enter the state: `delta`, `read` or `paper`."""
    key_space: KeySpace = "pre_rotary"
    """Keys as they were before the rotary embedding (`pre_rotary`), or after it (`post_rotary`)."""
    global_tokens: int = 32
    """Learnable global tokens that give S its first value; kind `lora` has none. The paper uses 32."""
    down_start: Literal["queries", "random"] = "queries"
    """How B of a fresh adapter starts: as the base's own `queries`, or at `random`."""
    eviction: str = "window"
    """Which reasoning tokens leave, by the name that an experiment's `cache.policy` has; `none` for the full cache."""
    window_tokens: int = 1024
    """Reasoning tokens kept at most, a multiple of evict_tokens; the prompt comes on top."""
    evict_tokens: int = 256
    """Reasoning tokens evicted at once."""
    sink_tokens: int = 4
    """First reasoning tokens that never leave; read with eviction `sinks` only."""
    recent_tokens: int | None = None
    """Newest reasoning tokens that do not leave; read with evictions `h2o`, `scissorhands`, `snapkv`, `rkv` and
    `keydiff` only, each of which has a default (None)."""
    base_fingerprint: str | None = None
    """Of the only base that the adapter may be put on; None (null): any base of the same sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_type != PEFT_TYPE:
            raise ValueError(f"peft_type must be {PEFT_TYPE!r}, got {self.peft_type!r}; leave it out")
        if self.task_type != TASK_TYPE:
            raise ValueError(
                f"task_type must be {TASK_TYPE!r}: the cache is that of a causal language model, got "
                f"{self.task_type!r}; leave it out"
            )
        if isinstance(self.r, int) and self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}; the paper uses 32")
        self.target_modules = named_maps(self.target_modules)
        if self.kind not in get_args(AdapterKind):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(AdapterKind))}, got {self.kind!r}; use 'thought'"
            )
        self.adapter_options()
        self.cache_options()

    def adapter_options(self) -> AdapterConfig:
        """The adapter as an experiment names it."""
        assert self.target_modules is not None
        return AdapterConfig(
            kind=self.kind,
            rank=self.r,
            scale=self.scale,
            targets=tuple(self.target_modules),  # type: ignore[arg-type]
            layers=tuple(self.layers or ()),
            update_rule=self.update_rule,
            key_space=self.key_space,
            global_tokens=self.global_tokens,
            down_start=self.down_start,
        )

    def cache_options(self) -> CacheConfig:
        """The budget as an experiment names it."""
        return CacheConfig(
            policy=self.eviction,  # type: ignore[arg-type]
            window_tokens=self.window_tokens,
            evict_tokens=self.evict_tokens,
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
        )

    @classmethod
    def from_lora(cls, folder: str | Path, *, kind: AdapterKind = "lora") -> Self:
        """The options under which A and B of a LoRA adapter fit, ready for `start_from_lora`.

        Args:
            folder: What PEFT's `save_pretrained` wrote for a LoRA adapter.
            kind: `lora` computes what PEFT's LoRA does; `thought` and `global_only` start from its A and B.

        Raises:
            ValueError: The LoRA adapter has something that a thought adapter has not (`load_lora`).
        """
        options = load_lora(folder).options
        return cls(
            r=options.rank,
            target_modules=list(options.targets),
            layers=list(options.layers) or None,
            scale=options.scale,
            kind=kind,
        )


def named_maps(target_modules: list[str] | str | None) -> list[str]:
    """The adapted maps in the order that decides nothing but initial values: as given, a set as the layer has them.

    Raises:
        ValueError: A pattern, or a module that is no linear map of a layer.
    """
    if target_modules is None or target_modules == "all-linear":
        return list(LINEAR_MAPS)
    if isinstance(target_modules, str):
        raise ValueError(
            f"target_modules must be a list of names, got the pattern {target_modules!r}; use some of "
            f"{', '.join(LINEAR_MAPS)}, and layers for some of the layers"
        )
    unknown = sorted(set(target_modules) - set(LINEAR_MAPS))
    if unknown or not target_modules:
        raise ValueError(
            f"target_modules must be linear maps of a layer, got {unknown[0] if unknown else 'none'!r}; use some of "
            f"{', '.join(LINEAR_MAPS)}"
        )
    if isinstance(target_modules, set):
        return [name for name in LINEAR_MAPS if name in target_modules]
    return list(target_modules)


def check_peft_version(found: str) -> None:
    """Refuses a PEFT that these adapters were never tried with.

    Raises:
        ImportError: It is another version.
    """
    if not found.startswith(PEFT_VERSIONS):
        raise ImportError(
            f"adapters of peft_type {PEFT_TYPE} need peft {PEFT_VERSIONS}*, got {found}; in the checkout of "
            f"pte run pip install -e '.[peft]'"
        )


check_peft_version(version("peft"))
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = PTEConfig  # type: ignore[index]
