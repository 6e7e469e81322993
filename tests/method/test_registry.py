"""The registry: a name, a file, a class; and what can be named follows from it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from pte.config import CacheConfig
from pte.method.eviction import registry
from pte.method.eviction.registry import POLICIES, PolicyName, make_policy
from pte.open_policy import eviction_policy

SHARED = {"__init__", "policy", "registry", "scored"}


def test_every_file_of_a_policy_is_registered_and_every_class_bears_its_name() -> None:
    folder = Path(registry.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - SHARED == {entry.file for entry in POLICIES.values()}
    for name, entry in POLICIES.items():
        assert getattr(import_module(f"pte.method.eviction.{entry.file}"), entry.class_name).name == name


def test_what_can_be_named_is_what_is_registered_and_the_full_cache() -> None:
    assert get_args(PolicyName) == (*POLICIES, "none")
    with pytest.raises(ValueError, match="policy must be one of 'window', 'sinks', .*'keydiff', 'none', got 'newest'"):
        CacheConfig(policy="newest")


@pytest.mark.parametrize("name", POLICIES)
def test_a_named_policy_is_made_with_its_option_and_fits_its_budget(name: str) -> None:
    config = CacheConfig(policy=name, window_tokens=64, evict_tokens=16, sink_tokens=5, recent_tokens=7)
    policy = eviction_policy(config)
    assert policy.name == name
    policy.check(64, 16)
    option = POLICIES[name].option
    assert config.policy_option == {None: None, "sink_tokens": 5, "recent_tokens": 7}[option]
    if option is not None:
        assert getattr(policy, option) == config.policy_option


def test_the_full_cache_asks_nobody() -> None:
    assert eviction_policy(CacheConfig(policy="none")).name == "window"


def test_an_option_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="sink_tokens must be at least 1"):
        make_policy(POLICIES["sinks"], option=0)
