"""What is served: one base, and a bounded policy for each adapter and for the base alone.

Decides: how adapters get their names, that each fits the base, and what all models share: window, limits, end tokens.
Everything is loaded and allocated before the first request. Does not know: requests, threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pte.checkpoint_files import check_adapter_fits
from pte.config_policy import CacheConfig
from pte.method.adapter import ThoughtAdapter
from pte.model.load import dtype_named, end_token_ids, load_base, load_tokenizer
from pte.model.policy import BoundedPolicy, layer_sizes
from pte.open_policy import eviction_policy
from pte.peft_folder import check_tensors_fit, load_any_adapter, saved_budget
from pte.rollout.generate import RolloutEngine
from pte.serve.body import Limits
from pte.session import base_fingerprint
from pte.tasks.chained import embedded_model_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pte.config_policy import ModelConfig


@dataclass(frozen=True)
class ServedModels:
    """Policies by name, and what they have in common.

    Args:
        policies: By the name that requests use; all on one base.
        tokenizer: Of the base.
        stop_token_ids: Tokens that end a completion.
        fingerprint: Of the base; equal seeds give equal completions only where it is equal.
        limits: What there is room for.
        allow_beyond_trained_positions: Run past the positions that the base was trained on.
    """

    policies: Mapping[str, BoundedPolicy]
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    fingerprint: str
    limits: Limits
    allow_beyond_trained_positions: bool = False

    @property
    def vocabulary(self) -> int:
        """Token ids of the base are below this."""
        (base, *_) = (policy.base for policy in self.policies.values())
        return len(base.get_parameter("model.embed_tokens.weight"))

    def engines(self) -> dict[str, RolloutEngine]:
        """An engine for every model, none of them open."""
        return {
            name: RolloutEngine(
                policy,
                slots=self.limits.slots,
                max_new_tokens=self.limits.max_new_tokens,
                temperature=1.0,
                stop_token_ids=self.stop_token_ids,
                allow_beyond_trained_positions=self.allow_beyond_trained_positions,
            )
            for name, policy in self.policies.items()
        }


def named_adapters(words: Sequence[str]) -> dict[str, Path]:
    """Adapters by the name that requests use.

    Args:
        words: NAME=PATH, or a PATH whose last part is the name.

    Raises:
        ValueError: Two have one name, or a name is empty.
    """
    found: dict[str, Path] = {}
    for word in words:
        before, equals, after = word.partition("=")
        named = bool(equals) and "/" not in before
        path = Path(after if named else word)
        name = before if named else path.resolve().name
        if not name or not str(path):
            raise ValueError(f"an adapter must be NAME=PATH or PATH, got {word!r}; write math=runs/math/pte")
        if name in found:
            raise ValueError(f"adapters must have different names, got {name!r} twice; write NAME=PATH")
        found[name] = path
    return found


def load_models(
    model: ModelConfig, *, adapters: Mapping[str, Path], cache: CacheConfig, limits: Limits
) -> ServedModels:
    """Loads the base and every adapter.

    Args:
        model: The base; it is served under its path as its name.
        adapters: By name.
        cache: The window of all models.
        limits: What there is to be room for.

    Raises:
        ValueError, FileNotFoundError, OSError: Something is missing, unsupported or does not fit.
    """
    for place in adapters.values():
        check_budget(place, cache)
    path = str(embedded_model_dir()) if model.path == "embedded" else model.path
    if model.path in adapters:
        raise ValueError(f"an adapter must not have the name of the base, got {model.path!r}; write NAME=PATH")
    tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code)
    base = load_base(
        path, dtype=dtype_named(model.dtype), device=model.device, trust_remote_code=model.trust_remote_code
    )
    alone = BoundedPolicy(base, None, cache.schedule, eviction_policy(cache))
    policies = {model.path: alone}
    for name, place in adapters.items():
        adapter = open_adapter(base, place, base_name=model.path)
        policies[name] = BoundedPolicy(base, adapter, alone.schedule, alone.eviction)
    assert isinstance(tokenizer.eos_token_id, int)
    return ServedModels(
        policies=policies,
        tokenizer=tokenizer,
        stop_token_ids=tuple(dict.fromkeys((tokenizer.eos_token_id, *end_token_ids(base)))),
        fingerprint=base_fingerprint(base),
        limits=limits,
        allow_beyond_trained_positions=model.allow_beyond_trained_positions,
    )


def check_budget(path: Path, cache: CacheConfig) -> None:
    """Refuses an adapter whose folder says that it was trained under another budget than that of all models.

    Raises:
        ValueError: The budgets differ.
    """
    saved = saved_budget(path)
    trained = CacheConfig(**saved) if saved else cache  # type: ignore[arg-type]
    if parts_of_budget(trained) != parts_of_budget(cache):
        said, given = (", ".join(map(str, parts_of_budget(one))) for one in (trained, cache))
        raise ValueError(
            f"the budget must be the one that the adapter in {path} was trained under ({said}), got {given}; leave out "
            f"--policy and its options, and serve adapters of other budgets by another server"
        )


def parts_of_budget(cache: CacheConfig) -> tuple[object, ...]:
    """What tells two budgets apart: fields that the policy does not read do not."""
    schedule = cache.schedule
    return cache.policy, schedule.window_tokens, schedule.evict_tokens, cache.policy_option


def open_adapter(base: PreTrainedModel, path: Path, *, base_name: str) -> ThoughtAdapter:
    """An adapter that a run or PEFT saved, made for the base but not yet on it.

    Raises:
        ValueError, FileNotFoundError: There is none, or it belongs to another base.
    """
    tensors, metadata = load_any_adapter(path)
    check_adapter_fits(metadata, base_name=base_name, base_fingerprint=base_fingerprint(base))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in metadata.options.items()}
    adapter = ThoughtAdapter(layer_sizes(base), **cast(Mapping[str, object], options))  # type: ignore[arg-type]
    check_tensors_fit(tensors, expected=adapter.state_dict(), base_name=metadata.base_name)
    adapter.load_state_dict(dict(tensors))
    return adapter.to(base.device)
