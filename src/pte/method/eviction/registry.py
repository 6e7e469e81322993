"""The eviction policies that an experiment can name: one entry, one file, one class.

Decides: the names, the class behind each, and which field of `CacheConfig` it is made with. What can be written in
`cache.policy` follows from here. A class is imported when it is made, so that reading an experiment needs no torch.
Does not know: what the policies do. One that has no entry works as well: give it to `BoundedPolicy`.

Paper: the ablation over eviction policies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pte.method.eviction.policy import EvictionPolicy


@dataclass(frozen=True)
class RegisteredPolicy:
    """Where the class of a policy is, and what it is made with.

    Args:
        file: Its module in this folder.
        class_name: The class.
        option: The field of the configuration that its constructor takes; None for a policy without options.
        recent_tokens: With that option, its default from the window's and the block's tokens.
        recent_observe: The queries of the recent tokens are what the policy looks at: 1 of them to a block.
    """

    file: str
    class_name: str
    option: Literal["sink_tokens", "recent_tokens"] | None = None
    recent_tokens: Callable[[int, int], int] = lambda window, block: 0
    recent_observe: bool = False


POLICIES: dict[str, RegisteredPolicy] = {
    "window": RegisteredPolicy("window", "OldestFirst"),
    "sinks": RegisteredPolicy("sinks", "AttentionSinks", "sink_tokens"),
    "random": RegisteredPolicy("random", "UniformRandom"),
    "h2o": RegisteredPolicy("h2o", "HeavyHitters", "recent_tokens", lambda window, block: window // 2),
    "scissorhands": RegisteredPolicy("scissorhands", "PersistentImportance", "recent_tokens", lambda window, block: 10),
    "tova": RegisteredPolicy("tova", "LastQueryAttention"),
    "snapkv": RegisteredPolicy(
        "snapkv", "ObservationWindow", "recent_tokens", lambda window, block: min(32, block), recent_observe=True
    ),
    "rkv": RegisteredPolicy("rkv", "RedundantKeys", "recent_tokens", lambda window, block: block),
    "keydiff": RegisteredPolicy("keydiff", "DistinctKeys", "recent_tokens"),
}

# `none` is the full cache, which asks no policy.
if TYPE_CHECKING:
    PolicyName = str
else:
    PolicyName = Literal[(*POLICIES, "none")]


def make_policy(entry: RegisteredPolicy, *, option: int | None) -> EvictionPolicy:
    """The policy of an entry.

    Args:
        entry: Of `POLICIES`.
        option: What its constructor takes; None for a policy without options.

    Raises:
        ValueError: The option is out of the policy's range.
    """
    made = getattr(import_module(f"{__package__}.{entry.file}"), entry.class_name)
    policy: EvictionPolicy = made() if entry.option is None else made(option)
    return policy
