"""LoRA adapters that PEFT saved, as the start of ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_models import SMALL, logits_of, thought_adapter, token_ids
from pte.cli import adapter_flags, parse
from pte.integrations.peft import PTEConfig, policy_of, start_from_lora
from pte.lora_folder import PLAIN_LORA, load_lora
from pte.method.adapter import LINEAR_MAPS
from pte.model.load import load_base
from pte.rollout.record import collate
from pte.rollout.replay import Replay
from pte.session import open_session
from pte.tasks.chained import embedded_model_dir
from short_runs import short_flags
from tiny import ARCHITECTURES, random_sequences, tiny_base

LORAS = {
    "all maps": {"r": 4, "lora_alpha": 6, "target_modules": list(LINEAR_MAPS)},
    "some maps of one layer": {
        "r": 3,
        "lora_alpha": 8,
        "target_modules": ["v_proj", "down_proj", "q_proj"],
        "layers_to_transform": [1],
    },
    "rank-stabilised": {"r": 4, "lora_alpha": 2, "target_modules": ["o_proj", "up_proj"], "use_rslora": True},
    "bias off, gaussian": {"r": 2, "target_modules": ["k_proj"], "bias": "none", "init_lora_weights": "gaussian"},
}


def save_lora(directory: Path, architecture: str = "qwen2", *, base=None, **options: object) -> PeftModel:
    """PEFT's own LoRA on a base, far from zero, saved by PEFT."""
    base = tiny_base(architecture) if base is None else base
    model = get_peft_model(base, LoraConfig(**options, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            # Exact in float32, in which ours keeps it.
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.25
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("lora", LORAS)
def test_a_lora_of_peft_and_ours_of_kind_lora_are_one_function(lora: str, tmp_path: Path) -> None:
    tokens, theirs = token_ids(), save_lora(tmp_path, **LORAS[lora])
    mine = get_peft_model(tiny_base(), PTEConfig.from_lora(tmp_path))
    start_from_lora(thought_adapter(mine), tmp_path)
    thought_adapter(mine).double()
    expected = logits_of(theirs, tokens)
    assert (expected - logits_of(tiny_base(), tokens)).abs().max() > 0.05
    torch.testing.assert_close(logits_of(mine, tokens), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bounded_policy_starts_as_peft_s_lora(architecture: str, tmp_path: Path) -> None:
    theirs = save_lora(tmp_path, architecture, **LORAS["all maps"])
    mine = get_peft_model(tiny_base(architecture), PTEConfig.from_lora(tmp_path))
    start_from_lora(thought_adapter(mine), tmp_path)
    thought_adapter(mine).double()
    (prompt, *_), (completion, *_) = random_sequences(1, completion=(12, 20))
    batch = collate([prompt], [completion], stream_seeds=[0], temperature=1.0)
    logprobs = Replay(policy_of(mine))(batch).policy_logprobs[0]  # a window of 1024: nothing is evicted
    logits = logits_of(theirs, torch.tensor([[*prompt, *completion]]))[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)


def test_a_thought_adapter_takes_a_and_b_and_keeps_its_own_fresh_encoder(tmp_path: Path) -> None:
    tokens, theirs = token_ids(), save_lora(tmp_path, **LORAS["all maps"])
    mine = get_peft_model(tiny_base(), PTEConfig.from_lora(tmp_path, kind="thought"))
    fresh = {name: p.clone() for name, p in thought_adapter(mine).encoder.named_parameters()}
    start_from_lora(thought_adapter(mine), tmp_path)
    adapter = thought_adapter(mine)
    lora = theirs.get_base_model().get_decoder().layers[1].mlp.up_proj
    assert torch.equal(adapter.pair(1, "up_proj").down, lora.lora_A["default"].weight.float())
    assert torch.equal(adapter.pair(1, "up_proj").up, lora.lora_B["default"].weight.float())
    assert adapter.scale == lora.scaling["default"] == 1.5
    assert all(torch.equal(p, fresh[name]) for name, p in adapter.encoder.named_parameters())
    # S is not the identity: another function from the start.
    adapter.double()
    assert (logits_of(mine, tokens) - logits_of(theirs, tokens)).abs().max() > 0.05


def test_a_lora_folder_gives_the_flags_of_an_experiment(tmp_path: Path) -> None:
    save_lora(tmp_path, **LORAS["some maps of one layer"])
    flags = adapter_flags(["--adapter.checkpoint", str(tmp_path)])
    scale = str(8 / 3)
    expected = "--adapter.kind lora --adapter.rank 3 --adapter.scale {} --adapter.targets q_proj v_proj down_proj"
    assert flags == [*expected.format(scale).split(), "--adapter.layers", "1"]


@pytest.mark.parametrize("kind", ["lora", "thought"])
def test_a_session_starts_from_a_lora_folder(kind: str, tmp_path: Path) -> None:
    base = load_base(embedded_model_dir(), dtype=torch.float32, device="cpu")
    save_lora(tmp_path, base=base, r=3, lora_alpha=6, target_modules=["o_proj", "v_proj"])
    words = [*short_flags(adapter__rank=3), "--adapter.checkpoint", str(tmp_path), "--adapter.kind", kind]
    session = open_session(parse("eval", words).experiment)
    adapter = session.policy.adapter
    assert adapter is not None and (adapter.kind, adapter.scale, adapter.targets) == (kind, 2.0, ("v_proj", "o_proj"))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for layer in range(len(base.get_decoder().layers)):
        for name in adapter.targets:
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora"
            pair = adapter.pair(layer, name)
            assert torch.equal(pair.down, saved[f"{key}_A.weight"]) and torch.equal(pair.up, saved[f"{key}_B.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora of a LoRA adapter must be False"),
        ({"bias": "all"}, "bias of a LoRA adapter must be 'none'"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern of a LoRA adapter must be {} .*{'q_proj': 2}"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights of a LoRA adapter must leave the base as it is"),
        ({"target_modules": ["q_proj", "lm_head"]}, "must adapt linear maps of decoder layers alone, .*lm_head"),
        (
            {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
            "the same maps in each of its layers",
        ),
    ],
)
def test_a_lora_that_a_b_and_a_scale_do_not_describe_is_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    save = {"r": 2, "target_modules": ["q_proj"], **options}
    model = get_peft_model(tiny_base(dtype=torch.float32), LoraConfig(**save, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PTEConfig.from_lora(tmp_path)


VARIANTS = {
    "alora_invocation_tokens": [3, 4],
    "layer_replication": [[0, 2], [1, 2]],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.0001},
    "monteclora_config": {"use_entropy": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_under_lora_s_tensor_names_is_refused_by_name(name: str, tmp_path: Path) -> None:
    save_lora(tmp_path, r=2, target_modules=["q_proj"])
    load_lora(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    assert not content[name], "PEFT writes it, and plain LoRA leaves it out"
    file.write_text(json.dumps({**content, name: VARIANTS[name]}))
    with pytest.raises(ValueError, match=f"^{name} of a LoRA adapter must be .*; train it without$"):
        load_lora(tmp_path)


def test_an_activated_lora_of_peft_is_refused(tmp_path: Path) -> None:
    save_lora(tmp_path, r=2, target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    with pytest.raises(ValueError, match=r"alora_invocation_tokens of a LoRA adapter must be None .*\[3, 4\]"):
        load_lora(tmp_path)


def test_every_variant_that_peft_knows_is_judged() -> None:
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    # VeLoRA stores less for the backward pass; its function is LoRA's.
    assert known and known - {"velora_config"} <= PLAIN_LORA.keys()


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_lora_that_does_not_say_its_scale_is_refused(name: str, tmp_path: Path) -> None:
    save_lora(tmp_path, r=2, target_modules=["q_proj"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != name}))
    with pytest.raises(ValueError, match=f"of peft_type LORA must say '{name}', got none"):
        load_lora(tmp_path)


def test_an_adapter_of_other_options_or_sizes_is_refused(tmp_path: Path) -> None:
    save_lora(tmp_path, **LORAS["all maps"])
    for options, message in (
        ({"r": 3}, "adapter.rank must be that of the adapter that is loaded .4., got 3; set adapter.rank to 4"),
        ({"scale": 1.0}, "adapter.scale must be that of the adapter that is loaded .1.5., got 1.0"),
        ({"scale": 1.5, "target_modules": ["q_proj"]}, "adapter.targets must be that"),
        ({"scale": 1.5, "layers": [0]}, "adapter.layers must be that"),
    ):
        model = get_peft_model(tiny_base(), PTEConfig(**{**SMALL, "kind": "lora", **options}))
        with pytest.raises(ValueError, match=message):
            start_from_lora(thought_adapter(model), tmp_path)
    other = get_peft_model(tiny_base(hidden_size=32), PTEConfig.from_lora(tmp_path))
    before = {name: p.clone() for name, p in thought_adapter(other).named_parameters()}
    with pytest.raises(ValueError, match="must be made for the base's sizes"):
        start_from_lora(thought_adapter(other), tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in thought_adapter(other).named_parameters())


def test_another_method_is_no_lora(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="must hold a LoRA adapter of PEFT, got peft_type 'IA3'"):
        PTEConfig.from_lora(tmp_path)
