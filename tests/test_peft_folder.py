"""An adapter in a folder as PEFT writes it is a checkpoint like any other, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pte.checkpoint import load_adapter, save_adapter
from pte.cli import parse
from pte.config_policy import CacheConfig
from pte.method.eviction.registry import make_policy
from pte.peft_folder import convert_from_peft, convert_to_peft, is_peft_folder, load_peft_folder
from pte.session import Session
from short_runs import open_short

OPTIONS = {"adapter__rank": 3, "adapter__targets": ("o_proj", "v_proj"), "adapter__update_rule": "paper"}


def saved(tmp_path: Path, **options: object) -> tuple[Session, Path]:
    """A session whose adapter is far from zero, and its adapter as a PEFT folder."""
    config, session = open_short(double=False, **options)
    assert session.policy.adapter is not None
    for parameter in session.policy.adapter.parameters():
        torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "run", session.adapter_tensors(), metadata=session.metadata())
    convert_to_peft(tmp_path / "run", tmp_path / "peft", cache=config.cache)
    return session, tmp_path / "peft"


def change(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **fields}))


@pytest.mark.parametrize("options", [{}, OPTIONS, {"adapter__kind": "lora"}, {"adapter__layers": (1,)}])
def test_a_session_starts_from_a_peft_folder_as_from_our_own(options: dict[str, object], tmp_path: Path) -> None:
    session, folder = saved(tmp_path, **options)
    assert is_peft_folder(folder) and not is_peft_folder(tmp_path / "run")
    _, again = open_short(double=False, moved=False, **options, adapter__checkpoint=str(folder))
    mine, theirs = again.adapter_tensors(), session.adapter_tensors()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_peft_folder_brings_its_options_to_the_command(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, **OPTIONS)
    adapter = parse("eval", ["--adapter.checkpoint", str(folder)]).experiment.adapter
    assert (adapter.rank, adapter.targets, adapter.update_rule) == (3, ("o_proj", "v_proj"), "paper")


BUDGET = {"cache__policy": "h2o", "cache__window_tokens": 8, "cache__evict_tokens": 2, "cache__recent_tokens": 3}


def test_a_peft_folder_brings_the_budget_that_it_was_trained_with(tmp_path: Path) -> None:
    session, folder = saved(tmp_path, **BUDGET)
    (tmp_path / "file.toml").write_text("[cache]\nwindow_tokens = 64\nevict_tokens = 16\nrecent_tokens = 5\n")
    for command in ("eval", "train"):
        for file in ([], [str(tmp_path / "file.toml")]):
            config = parse(command, [*file, "--adapter.checkpoint", str(folder)]).experiment
            assert config.cache == CacheConfig("h2o", window_tokens=8, evict_tokens=2, recent_tokens=3)
            scored = make_policy(config.cache.registered, option=config.cache.policy_option)
            assert scored.name == session.policy.eviction.name == "h2o"
    # No null on the command line: an option that the folder leaves to the policy overrules the file's.
    change(folder, recent_tokens=None, eviction="tova")
    again = parse("eval", [str(tmp_path / "file.toml"), "--adapter.checkpoint", str(folder)]).experiment.cache
    assert again == CacheConfig("tova", window_tokens=8, evict_tokens=2)


def test_the_user_s_own_budget_wins_over_the_folder_s(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, **BUDGET)
    for flags in (["--cache.policy=none"], ["--cache.policy", "window", "--cache.window-tokens", "32"]):
        cache = parse("eval", [*flags, "--adapter.checkpoint", str(folder)]).experiment.cache
        assert cache.policy == flags[0].partition("=")[2] or (cache.policy, cache.window_tokens) == ("window", 32)
        assert (cache.evict_tokens, cache.recent_tokens) == (2, 3)


def test_an_adapter_of_a_run_leaves_the_budget_to_the_experiment(tmp_path: Path) -> None:
    saved(tmp_path, **BUDGET)
    assert parse("eval", ["--adapter.checkpoint", str(tmp_path / "run")]).experiment.cache == CacheConfig()


@pytest.mark.parametrize(
    "name", ["kind", "key_space", "r", "target_modules", "global_tokens", "eviction", "sink_tokens"]
)
def test_a_folder_without_one_of_our_options_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    content = json.loads((folder / "adapter_config.json").read_text())
    del content[name]
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"adapter_config.json .* PTE must say '{name}', got none in .*; add the value"
    ):
        parse("eval", ["--adapter.checkpoint", str(folder)])


@pytest.mark.parametrize("content", ["[]", "null", '"PTE"', "3"])
def test_a_configuration_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config.json must hold a JSON object, got .*; use another copy"):
        load_peft_folder(folder)


def test_a_folder_and_an_adapter_convert_back_bit_for_bit(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    convert_from_peft(folder, tmp_path / "back")
    (ours, metadata), (back, again) = (load_adapter(tmp_path / name) for name in ("run", "back"))
    assert metadata == again and ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)


def test_an_adapter_of_another_base_or_of_other_options_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)

    def refused(**options: object) -> str:
        with pytest.raises(ValueError) as refusal:
            open_short(**options, adapter__checkpoint=str(folder))
        return str(refusal.value)

    assert "adapter.rank must be that of the adapter that is loaded (4), got 5" in refused(adapter__rank=5)
    assert "adapter.layers must be that of the adapter that is loaded (None), got [1]" in refused(adapter__layers=(1,))
    change(folder, base_fingerprint="f" * 64)
    assert "the adapter must be trained on the loaded base 'embedded'" in refused()
    change(folder, base_fingerprint=None)
    open_short(adapter__checkpoint=str(folder))
    change(folder, peft_type="IA3")
    assert "must hold an adapter of peft_type 'PTE', got 'IA3'" in refused()


def test_sizes_alone_decide_where_the_folder_names_no_base(tmp_path: Path, make_wide: Callable[[Path], None]) -> None:
    _, folder = saved(tmp_path)
    change(folder, base_fingerprint=None)
    make_wide(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"must be made for the base's sizes, got .*; load the base .*'embedded'"):
        open_short(adapter__checkpoint=str(folder))


@pytest.fixture
def make_wide() -> Callable[[Path], None]:
    """Doubles the width of a saved adapter's global tokens."""

    def widen(file: Path) -> None:
        tensors = load_file(file)
        name = "base_model.pte_adapters.encoder.global_tokens"
        tensors[name] = tensors[name].repeat(1, 2)
        save_file(tensors, file, metadata={"format": "pt"})

    return widen
