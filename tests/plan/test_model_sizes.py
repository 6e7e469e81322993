"""Sizes from a configuration alone are those of the model and the adapter that are made later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from planned import planned
from pte.kernels.operands import padded_rank
from pte.method.adapter import LINEAR_MAPS, ThoughtAdapter
from pte.model.fused import products_of
from pte.model.fused_weights import FusedWeights
from pte.model.load import linear_maps, round_to_float8
from pte.model.policy import layer_sizes
from pte.plan.model_sizes import BUILT_IN, ModelSizes, model_sizes
from pte.plan.shapes import SHAPES, model_config
from tiny import ARCHITECTURES, tiny_base, tiny_policy


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_are_those_of_the_model_itself(architecture: str, tied: bool) -> None:
    base = tiny_base(architecture, tied=tied, dtype=torch.float32)
    sizes = ModelSizes.of(base.config)
    assert planned(base).weights_bytes == sum(parameter.nbytes for parameter in base.parameters())
    assert sizes.maps == layer_sizes(base).maps
    assert sizes.cache_shape == tiny_policy(architecture, base=base).cache_shape
    assert (sizes.vocab, sizes.max_positions) == (base.config.vocab_size, 256)
    assert sizes.head_norms == (architecture == "qwen3")


def test_float8_takes_a_byte_a_weight_of_the_layers_and_four_for_each_row() -> None:
    base = tiny_base(dtype=torch.bfloat16)
    wide, policy = planned(base), planned(base, float8=True)
    assert wide.weights_bytes == sum(parameter.nbytes for parameter in base.parameters())
    round_to_float8(base, "cpu")
    kept = [*base.parameters(), *(one for linear in linear_maps(base) for one in linear.buffers())]
    assert policy.weights_bytes == sum(one.nbytes for one in kept) < wide.weights_bytes
    assert policy.cache_dtype == tiny_policy(base=base).cache_dtype != wide.cache_dtype


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["thought", "global_only", "lora"])
@pytest.mark.parametrize(("targets", "layers"), [(LINEAR_MAPS, None), (("q_proj", "down_proj"), (1,))])
def test_the_adapter_has_as_many_parameters_as_are_planned(architecture, kind, targets, layers) -> None:
    base = tiny_base(architecture)
    adapter = ThoughtAdapter(
        layer_sizes(base), kind=kind, rank=4, targets=targets, layers=layers, global_tokens=3, seed=0
    )
    policy = planned(base, kind=kind, targets=targets, adapted_layers=len(layers or (0, 1)))
    assert policy.adapter_parameters == sum(parameter.numel() for parameter in adapter.parameters())
    assert policy.adapter_bytes == sum(parameter.nbytes for parameter in adapter.parameters())
    copies = [one for groups in adapter.weights(base.dtype) for group in groups if group is not None for one in
              (group.down, *group.ups)]  # fmt: skip
    assert policy.working_bytes == sum(copy.nbytes for copy in copies)


@pytest.mark.parametrize("targets", [LINEAR_MAPS, ("q_proj", "down_proj")])
def test_fused_weights_take_the_planned_rows_more_than_the_base(targets: tuple[str, ...]) -> None:
    base = tiny_base(dtype=torch.float32)
    adapter = ThoughtAdapter(layer_sizes(base), rank=4, targets=targets, global_tokens=3)
    own = sum(parameter.numel() for parameter in base.parameters())
    maps = sum(inputs * outputs for inputs, outputs in layer_sizes(base).maps.values()) * 2
    fused = FusedWeights(base, spare=padded_rank(4))
    matrices = sum(group.matrix.numel() for groups in fused.layers for group in groups)
    ups = sum(
        product.up.numel()
        for index, groups in enumerate(fused.layers)
        for product in products_of(groups, adapter, index)
    )
    policy = planned(base, targets=targets, cuda=True)
    assert policy.fused_numbers == matrices - maps + ups
    assert policy.weights_bytes == 4 * (own + policy.fused_numbers)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_shape_needs_no_file(name: str) -> None:
    sizes = model_sizes(name.upper())
    shape = SHAPES[BUILT_IN[name]]
    assert (sizes.layers, sizes.hidden_size, sizes.kv_dim) == (shape.layers, shape.hidden_size, shape.kv_dim)
    # 3,085,938,688 and 7,615,616,512 parameters on the cards of Qwen2.5, 8,030,261,248 on that of Llama-3.1-8B.
    assert sizes.parameters == {"3b": 3_085_938_688, "7b": 7_615_616_512, "8b": 8_030_261_248}[BUILT_IN[name]]
    # max_position_embeddings of Qwen2.5-3B-Instruct and 7B-Instruct, of Llama-3.1-8B-Instruct and R1-Distill-Llama-8B.
    assert sizes.max_positions == {"3b": 32_768, "7b": 32_768, "8b": 131_072}[BUILT_IN[name]]


def test_a_configuration_without_weights_is_enough(tmp_path: Path) -> None:
    model_config(SHAPES["tiny"]).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert model_sizes(str(tmp_path)) == ModelSizes.of(model_config(SHAPES["tiny"]))


def test_a_missing_configuration_is_refused_with_the_names_that_work_offline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.path must name a directory with a config.json.*qwen2.5-7b"):
        model_sizes(str(tmp_path))


def test_an_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported.*use a model of type qwen2"):
        model_sizes(str(tmp_path))
