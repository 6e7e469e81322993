"""Which adapters can be served, and under which budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peft_models import peft_model
from pte.arguments import ServeArguments
from pte.cli import main, parse
from pte.config import CacheConfig, ModelConfig
from pte.integrations.peft import policy_of
from pte.model.load import load_base
from pte.model.policy import attach_adapter
from pte.peft_folder import saved_budget
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest
from pte.serve.models import load_models
from pte.tasks.chained import embedded_model_dir
from served import WINDOW, limits

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT saved of an adapter that was trained under a window of 8 with blocks of 2, and one rollout of it."""
    directory = tmp_path_factory.mktemp("peft") / "math"
    base = load_base(str(embedded_model_dir()), dtype=torch.float32, device="cpu")
    model = peft_model(base=base, dtype=torch.float32, window_tokens=8, evict_tokens=2)
    model.save_pretrained(directory)
    torch.save(completion(policy_of(model)).completion_ids, directory.parent / "expected")
    return directory


def completion(policy: object, prompt_ids: tuple[int, ...] = (5, 6, 7, 8)) -> Rollout:
    """A greedy completion with a dozen evictions."""
    engine = RolloutEngine(policy, slots=1, max_new_tokens=32, temperature=0.0, stop_token_ids=())
    (rollout,) = engine.run([RolloutRequest(prompt_ids, 1)])
    return rollout


def test_a_folder_that_peft_saved_is_served_as_the_model_that_was_saved(folder: Path) -> None:
    models = load_models(ModelConfig(), adapters={"math": folder}, cache=WINDOW, limits=limits())
    policy = models.policies["math"]
    plain = completion(models.policies["embedded"])
    attach_adapter(policy.base, policy.adapter)
    rollout = completion(policy)
    assert rollout.completion_ids == torch.load(folder.parent / "expected") != plain.completion_ids
    assert rollout.evictions == 12


def test_the_command_takes_the_budget_of_the_folder_and_the_user_s_word_is_the_last(folder: Path) -> None:
    for named in (str(folder), f"math={folder}"):
        for words in ([named, "--slots", "3"], ["--slots", "3", "--model", "embedded", named]):
            parsed = parse("serve", words)
            assert isinstance(parsed, ServeArguments) and (parsed.cache, parsed.adapters) == (WINDOW, (named,))
    parsed = parse("serve", [str(folder), "--window-tokens", "16"])
    assert isinstance(parsed, ServeArguments) and parsed.cache == CacheConfig(window_tokens=16, evict_tokens=2)
    assert isinstance(plain := parse("serve", ["a=runs/none"]), ServeArguments) and plain.cache == CacheConfig()


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--window-tokens", "16"], "window, 16, 2, None"),
        (["--evict-tokens", "4"], "window, 8, 4, None"),
        (["--policy", "none"], "none, None, None, None"),
        (["--policy", "sinks"], "sinks, 8, 2, 4"),
    ],
)
def test_flags_against_the_budget_of_a_folder_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], given: str
) -> None:
    assert main(["serve", f"math={folder}", "--port", "0", *words]) == 2
    said = capsys.readouterr().err
    trained = f"the budget must be the one that the adapter in {folder} was trained under (window, 8, 2, None)"
    assert f"{trained}, got {given};" in said
    # What the policy does not read is nobody's budget.
    cache = CacheConfig(window_tokens=8, evict_tokens=2, sink_tokens=3, recent_tokens=2)
    assert "math" in load_models(ModelConfig(), adapters={"math": folder}, cache=cache, limits=limits()).policies


def test_what_is_no_folder_of_ours_has_no_budget(folder: Path, tmp_path: Path) -> None:
    assert CacheConfig(**saved_budget(folder)) == WINDOW
    assert saved_budget(tmp_path) == saved_budget("/nowhere") == {}


def test_a_folder_of_another_method_or_another_base_is_refused(tmp_path: Path) -> None:
    peft_model(dtype=torch.float32, window_tokens=8, evict_tokens=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="a saved adapter must be made for the base's sizes|must hold every tensor"):
        load_models(ModelConfig(), adapters={"other": tmp_path / "other"}, cache=WINDOW, limits=limits())
    content = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({**content, "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="must hold an adapter of peft_type 'PTE', got 'LORA'"):
        load_models(ModelConfig(), adapters={"other": tmp_path / "other"}, cache=WINDOW, limits=limits())
