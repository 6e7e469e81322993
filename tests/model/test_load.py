"""What is loaded, how, and what is refused by name before any work."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BartConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3NextConfig,
    T5Config,
)

from pte.config import ModelConfig
from pte.method.float8 import FLOAT8, Float8Linear, float8_refusal, rounded_to_float8
from pte.model.load import (
    check_positions,
    check_supported,
    dtype_named,
    freeze,
    linear_maps,
    load_base,
    load_tokenizer,
    round_to_float8,
)
from pte.model.policy import detach_adapter
from pte.session import base_fingerprint
from tiny import ARCHITECTURES, tiny_base, tiny_policy

REMEDY = "use a model of type qwen2, qwen3, llama, mistral"
REFUSED = {
    "t5": (T5Config(), "model type 't5' is an encoder-decoder, and only decoders are supported"),
    "bart": (BartConfig(), "model type 'bart' is an encoder-decoder, and only decoders are supported"),
    "qwen3_next": (
        Qwen3NextConfig(),
        "model type 'qwen3_next' has linear-attention layers, which have no keys to evict",
    ),
    "gpt2": (GPT2Config(), "model type 'gpt2' is not supported: no test shows that its cache is exact"),
    "mistral with its window": (
        MistralConfig(sliding_window=4096),
        "model type 'mistral' with sliding-window layers (sliding_window=4096) is not supported: its own window would "
        "evict beside ours",
    ),
    "qwen2 with a window": (
        Qwen2Config(use_sliding_window=True, sliding_window=128, max_window_layers=1, num_hidden_layers=4),
        "model type 'qwen2' with sliding-window layers (sliding_window=128) is not supported: its own window would "
        "evict beside ours",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_model_is_refused_by_name(name: str) -> None:
    config, text = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        check_supported(config)
    assert str(caught.value).startswith(f"{text}; {REMEDY}")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_angles_that_depend_on_the_length_are_refused(rope_type: str) -> None:
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError) as caught:
        check_supported(config)
    assert str(caught.value) == (
        f"rotary embedding of type '{rope_type}' is not supported: its angles depend on the sequence length, so stored "
        f"keys would not fit later queries; use one of default, linear, llama3, yarn"
    )


def test_positions_beyond_the_trained_ones_are_refused_unless_allowed_by_name() -> None:
    config = LlamaConfig(max_position_embeddings=100)
    arguments = {"prompt_tokens": 40, "completion_tokens": 61}
    with pytest.raises(ValueError) as caught:
        check_positions(config, **arguments, allow_beyond_trained_positions=False)
    assert str(caught.value) == (
        "prompt plus completion must stay within the model's 100 trained positions, got 40 + 61 tokens; lower "
        "max_new_tokens to 60 or set allow_beyond_trained_positions"
    )
    check_positions(config, **arguments, allow_beyond_trained_positions=True)
    check_positions(config, prompt_tokens=40, completion_tokens=60, allow_beyond_trained_positions=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_comes_back_frozen_and_in_the_dtype_asked_for(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = tiny_base(architecture, dtype=torch.float32, tied=architecture == "qwen3")
    saved.save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype=dtype, device="cpu")
    assert not base.training
    expected = dict(saved.named_parameters())
    found = dict(base.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == dtype and not parameter.requires_grad
        assert torch.equal(parameter, expected[name].to(dtype)), name


def test_a_base_in_float8_is_the_bfloat16_one_rounded_and_has_its_fingerprint(tmp_path: Path) -> None:
    tiny_base(dtype=torch.float32).save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype=FLOAT8, device="cpu")
    plain = load_base(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert base.dtype == torch.bfloat16 and not base.training
    assert all(type(linear) is Float8Linear for linear in linear_maps(base))
    for rounded, linear in zip(linear_maps(base), linear_maps(plain), strict=True):
        assert torch.equal(rounded.rounded.wide(torch.float32), rounded_to_float8(linear.weight.float()))
        assert rounded.bias is None if linear.bias is None else torch.equal(rounded.bias, linear.bias)
    others = {name for name, _ in plain.named_parameters() if "_proj" not in name}
    assert {name for name, _ in base.named_parameters()} == others
    # Adapters know nothing of the precision: one fits both.
    assert base_fingerprint(base) == base_fingerprint(plain)


def test_devices_without_float8_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="dtype float8 needs an NVIDIA GPU, got mps; use dtype bfloat16"):
        load_base("nowhere", dtype=FLOAT8, device="mps")
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match="needs compute capability 8.9 or newer, got A100; use dtype bfloat16"):
        load_base("nowhere", dtype=FLOAT8, device="cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    assert float8_refusal(torch.device("cuda")) is None
    with pytest.raises(ValueError, match="sizes are multiples of 16 on a GPU, got 16 x 8; use dtype bfloat16"):
        round_to_float8(tiny_base(), "cuda")


def test_a_base_is_rounded_once_and_before_its_adapter() -> None:
    base = tiny_policy().base
    with pytest.raises(ValueError, match="plain torch.nn.Linear, got ThoughtLinear; round a base once, and before an"):
        round_to_float8(base, "cpu")
    detach_adapter(base)
    round_to_float8(base, "cpu")
    with pytest.raises(ValueError, match="got Float8Linear; round a base once"):
        round_to_float8(base, "cpu")


def test_every_dtype_of_a_configuration_has_its_own() -> None:
    named = {name: dtype_named(name) for name in get_args(get_type_hints(ModelConfig)["dtype"])}
    expected = (torch.float32, torch.bfloat16, torch.float16, FLOAT8)
    assert named == dict(zip(("float32", "bfloat16", "float16", "float8"), expected, strict=True))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    saved = tiny_base(dtype=torch.float32)
    saved.config.save_pretrained(tmp_path)
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_base(tmp_path, dtype=torch.float32, device="cpu")


def test_an_unsupported_model_is_refused_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported"):
        load_base(tmp_path, dtype=torch.float32, device="cpu")


def test_linear_maps_of_another_kind_are_refused() -> None:
    class Quantised(nn.Linear):
        pass

    base = tiny_base()
    base.get_decoder().layers[0].mlp.up_proj = Quantised(16, 24)
    with pytest.raises(ValueError) as caught:
        freeze(base)
    assert str(caught.value) == (
        "the base's linear maps must be plain torch.nn.Linear, got Quantised; load the model without quantisation and "
        "without another adapter"
    )


def test_linear_maps_of_another_kind_are_refused_in_any_layer() -> None:
    class Quantised(nn.Linear):
        pass

    base = tiny_base()
    base.get_decoder().layers[1].mlp.up_proj = Quantised(16, 24)
    with pytest.raises(ValueError, match="Quantised"):
        freeze(base)


def save_tokenizer(path: Path, **special: str) -> None:
    vocabulary = {"<end>": 0, "a": 1, "b": 2, "<unknown>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


def test_a_tokenizer_needs_an_end_token(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "with", eos_token="<end>")
    tokenizer = load_tokenizer(tmp_path / "with")
    assert tokenizer.eos_token_id == 0 and tokenizer("b a")["input_ids"] == [2, 1]
    save_tokenizer(tmp_path / "without")
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path / "without")
    assert str(caught.value) == (
        f"the tokenizer must have an end token, got none in {str(tmp_path / 'without')!r}; set eos_token in "
        f"tokenizer_config.json"
    )
