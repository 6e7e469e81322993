"""Thought adapters saved and loaded by PEFT: every parameter survives, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peft_models import SMALL, add_adapter, logits_of, peft_model, thought_adapter, token_ids
from pte.checkpoint import load_adapter, save_adapter
from pte.checkpoint_files import AdapterMetadata
from pte.config_policy import CacheConfig
from pte.integrations.peft import PTEConfig, convert_from_peft, convert_to_peft, policy_of
from pte.method.adapter import ThoughtAdapter
from pte.peft_folder import load_peft_folder
from pte.session import base_fingerprint
from tiny import tiny_base

OPTIONS = {
    "kind": "thought",
    "update_rule": "read",
    "key_space": "post_rotary",
    "target_modules": ["v_proj", "q_proj", "down_proj"],
    "layers": [1],
    "scale": 1.6,
    "eviction": "sinks",
    "sink_tokens": 2,
    "down_start": "random",
}


def same_parameters(mine: ThoughtAdapter, theirs: ThoughtAdapter) -> bool:
    mine_by_name, theirs_by_name = mine.state_dict(), theirs.state_dict()
    assert mine_by_name.keys() == theirs_by_name.keys()
    return all(torch.equal(mine_by_name[name], theirs_by_name[name]) for name in mine_by_name)


def own_fields(config: PTEConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in PTEConfig.__annotations__}


@pytest.fixture(autouse=True)
def warnings_of_peft_are_failures():
    """PEFT only warns of keys that are missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"kind": "lora"}], ids=["default", "all options", "lora"])
def test_every_parameter_and_option_survives_a_round_trip(
    options: dict[str, object], low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    tokens, model = token_ids(), peft_model(dtype=torch.float32, **options)
    before = logits_of(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_base(dtype=torch.float32), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, torch_device="cpu"
    )
    assert same_parameters(thought_adapter(loaded), thought_adapter(model))
    # Tensors assigned where they lie in the file round differently.
    torch.testing.assert_close(logits_of(loaded, tokens), before, rtol=0, atol=1e-5 if low_cpu_mem_usage else 0)
    assert own_fields(loaded.peft_config["default"]) == own_fields(model.peft_config["default"])
    mine, theirs = policy_of(model), policy_of(loaded)
    assert (mine.schedule, mine.adapter.options()) == (theirs.schedule, theirs.adapter.options())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == {f"base_model.pte_adapters.{name}" for name, _ in thought_adapter(model).named_parameters()}


def test_a_second_adapter_takes_every_parameter_under_its_own_name(tmp_path: Path) -> None:
    model = peft_model(dtype=torch.float32)
    other = add_adapter(model, "other", seed=5, r=3)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "other",
    }
    loaded = PeftModel.from_pretrained(tiny_base(dtype=torch.float32), tmp_path, is_trainable=True)
    result = loaded.load_adapter(tmp_path / "other", "second", torch_device="cpu")
    assert result.missing_keys == [] == result.unexpected_keys
    assert same_parameters(thought_adapter(loaded, "second"), other)
    assert same_parameters(thought_adapter(loaded), thought_adapter(model))
    # Loading left the first adapter active and trainable, the second frozen.
    assert loaded.active_adapters == ["default"]
    assert {n.split(".")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {"default"}
    loaded.load_adapter(tmp_path / "other", "third", is_trainable=True, torch_device="cpu")
    assert {n.split(".")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {"default", "third"}


def test_copies_that_look_for_the_adapter_s_name_copy_every_parameter() -> None:
    # As trainers copy a policy into a reference: .default. is replaced in every name.
    model = peft_model(dtype=torch.float32)
    reference = add_adapter(model, "ref", seed=5)
    assert not same_parameters(reference, thought_adapter(model))
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    assert same_parameters(reference, thought_adapter(model))


def test_an_adapter_of_a_bfloat16_base_stays_float32(tmp_path: Path) -> None:
    model = get_peft_model(tiny_base(dtype=torch.bfloat16), PTEConfig(**SMALL))
    for parameter in thought_adapter(model).parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_base(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, torch_device="cpu"
        )
        assert {parameter.dtype for parameter in thought_adapter(loaded).parameters()} == {torch.float32}
        assert same_parameters(thought_adapter(loaded), thought_adapter(model))


def saved_base(directory: Path, **changes: object) -> PreTrainedModel:
    """A base on the disk and as it is loaded from there."""
    tiny_base("llama", dtype=torch.float32, **changes).save_pretrained(directory)
    return type(tiny_base("llama")).from_pretrained(directory, dtype=torch.float32)


def test_auto_peft_model_finds_base_and_adapter(tmp_path: Path) -> None:
    tokens = token_ids()
    model = peft_model(base=saved_base(tmp_path / "base"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "adapter"), PTEConfig)


def test_a_folder_as_the_hub_s_cache_holds_it_is_loaded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = token_ids()
    model = peft_model(base=saved_base(tmp_path / "base"), dtype=torch.float32)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--thoughts"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = {"cache_dir": str(tmp_path / "cache")}
    loaded = PeftModel.from_pretrained(saved_base(tmp_path / "base"), "someone/thoughts", **cache)
    assert same_parameters(thought_adapter(loaded), thought_adapter(model))
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_a_tied_model_is_saved_and_loaded(tmp_path: Path) -> None:
    tokens, model = token_ids(), peft_model("qwen3", base=tiny_base("qwen3", tied=True, dtype=torch.float32))
    model.base_model.pte_adapters.float()
    base = model.get_base_model()
    assert base.lm_head.weight is base.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert all(key.startswith("base_model.pte_adapters.") for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_base("qwen3", tied=True, dtype=torch.float32), tmp_path)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_the_state_dict_of_one_adapter_is_that_adapter_s_alone() -> None:
    model = peft_model(dtype=torch.float32)
    other = add_adapter(model, "other", seed=5)
    state = get_peft_model_state_dict(model, adapter_name="other")
    assert {key.removeprefix("base_model.pte_adapters.") for key in state} == set(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[key.split("pte_adapters.")[1]]) for key, value in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"must be made for the base's sizes, got .* of \(3, 16\) for \(3, 32\); load the base"),
        ({"intermediate_size": 20}, r"must be made for the base's sizes, got 'layers.0.down_proj.down'"),
        ({"num_hidden_layers": 3}, r"must be made for the base's sizes, got .* of \(2, .* for \(3, "),
    ],
)
def test_an_adapter_of_another_base_is_refused_with_the_one_to_load(
    changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    model = peft_model(base=saved_base(tmp_path / "base"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    other = tiny_base("llama", dtype=torch.float32, **changes)
    with pytest.raises(ValueError, match=message) as refusal:
        PeftModel.from_pretrained(other, tmp_path / "adapter", ignore_mismatched_sizes=True)
    assert str(tmp_path / "base") in str(refusal.value)


@pytest.mark.parametrize("change", ["missing", "too many"])
def test_a_file_that_lacks_or_adds_a_tensor_is_refused(change: str, tmp_path: Path) -> None:
    peft_model(dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if change == "missing":
        del tensors["base_model.pte_adapters.encoder.global_tokens"]
    else:
        tensors["base_model.pte_adapters.encoder.bias"] = torch.zeros(1)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"every tensor of the adapter that is loaded and no other.*encoder\."):
        PeftModel.from_pretrained(tiny_base(dtype=torch.float32), tmp_path)


def test_an_adapter_that_insists_on_its_base_refuses_a_twin_of_the_same_sizes(tmp_path: Path) -> None:
    model = peft_model(dtype=torch.float32, base_fingerprint=base_fingerprint(tiny_base(dtype=torch.float32)))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_base(dtype=torch.float32), tmp_path)
    twin = tiny_base(dtype=torch.float32, seed=1)
    with pytest.raises(ValueError, match="must be that of the loaded base .* set base_fingerprint to null"):
        PeftModel.from_pretrained(twin, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "base_fingerprint": None}))
    PeftModel.from_pretrained(twin, tmp_path)


@pytest.mark.parametrize("options", [{}, OPTIONS, {"kind": "lora"}], ids=["default", "all options", "lora"])
def test_peft_s_folder_and_ours_convert_into_each_other(options: dict[str, object], tmp_path: Path) -> None:
    tokens, model = token_ids(), peft_model(dtype=torch.float32, **options)
    model.save_pretrained(tmp_path / "peft")
    convert_from_peft(tmp_path / "peft", tmp_path / "ours")
    tensors, metadata = load_adapter(tmp_path / "ours")
    expected = thought_adapter(model)
    assert metadata.options == expected.options()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in tensors.items())
    convert_to_peft(tmp_path / "ours", tmp_path / "again", cache=model.peft_config["default"].cache_options())
    loaded = PeftModel.from_pretrained(tiny_base(dtype=torch.float32), tmp_path / "again")
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    mine, theirs = (own_fields(one.peft_config["default"]) for one in (loaded, model))
    unused = {"down_start"} | ({"global_tokens"} if options.get("kind") == "lora" else set())
    assert {name: mine[name] for name in mine if name not in unused} == {
        name: theirs[name] for name in theirs if name not in unused
    }


def test_a_converted_run_s_adapter_insists_on_the_base_of_the_run(tmp_path: Path) -> None:
    model = peft_model(dtype=torch.float32)
    adapter = thought_adapter(model)
    fingerprint = base_fingerprint(tiny_base(dtype=torch.float32))
    metadata = AdapterMetadata(options=adapter.options(), base_name="tiny", base_fingerprint=fingerprint)
    save_adapter(tmp_path / "run", adapter.state_dict(), metadata=metadata)
    convert_to_peft(tmp_path / "run", tmp_path / "peft", cache=CacheConfig(window_tokens=8, evict_tokens=4))
    assert load_peft_folder(tmp_path / "peft")[1] == metadata
    loaded = PeftModel.from_pretrained(tiny_base(dtype=torch.float32), tmp_path / "peft")
    assert same_parameters(thought_adapter(loaded), adapter)
    with pytest.raises(ValueError, match="of 'tiny'; load that base"):
        PeftModel.from_pretrained(tiny_base(dtype=torch.float32, seed=1), tmp_path / "peft")


def test_a_folder_that_is_no_thought_adapter_is_refused_by_our_reader(tmp_path: Path) -> None:
    model = peft_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "more", save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"the adapter's tensors alone, got .*save_embedding_layers=False"):
        load_peft_folder(tmp_path / "more")
    model.save_pretrained(tmp_path / "good")
    for name, content, message in (
        ("adapter_config.json", "{", "adapter_config.json is corrupt or truncated"),
        ("adapter_config.json", '{"peft_type": "IA3"}', "must hold an adapter of peft_type 'PTE', got 'IA3'"),
        ("adapter_model.safetensors", "{", "adapter_model.safetensors is corrupt or truncated"),
    ):
        shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_peft_folder(tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").unlink()
    shutil.copy(tmp_path / "good" / "adapter_config.json", tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="only safetensors are read; save the adapter with safe_serialization"):
        load_peft_folder(tmp_path / "bad")
