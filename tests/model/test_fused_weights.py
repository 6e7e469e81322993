"""The base whose weights were fused against what it was, and its products against those of the maps."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional

from pte.method.adapter import INPUT_GROUPS
from pte.model.fused_weights import FusedProduct, FusedWeights
from pte.model.policy import BoundedPolicy, attach_adapter, detach_adapter, linear_of
from pte.model.segment import adapter_weights
from tiny import ARCHITECTURES, tiny_base, tiny_policy


def loaded_products(policy: BoundedPolicy) -> list[list[FusedProduct]]:
    """By layer and group, with the adapter of the policy in them."""
    adapter, weights = policy.adapter, adapter_weights(policy)
    fused = FusedWeights.of(policy.base, rank=0 if adapter is None else adapter.rank)
    products = []
    for layer, groups in enumerate(fused.layers):
        products.append([])
        for place, (group, names) in enumerate(zip(groups, INPUT_GROUPS, strict=True)):
            adapted = () if adapter is None else tuple(map(names.index, adapter.groups(layer)[place]))
            product = FusedProduct(group, adapted=adapted, rank=0 if adapter is None else adapter.rank)
            if weights is not None and weights[layer][place] is not None:
                product.load(weights[layer][place])
            products[-1].append(product)
    return products


@pytest.mark.parametrize(
    ("options", "biases"),
    [
        ({}, {}),
        ({"rank": 20}, {"attention_bias": True, "mlp_bias": True}),
        ({"targets": ("q_proj", "v_proj", "up_proj"), "scale": 1.6}, {}),
        ({"layers": (1,)}, {}),
        ({"kind": None}, {"attention_bias": True}),
    ],
    ids=str,
)
def test_a_product_is_the_outputs_of_its_maps_then_b_x_padded_with_zeros(options: dict, biases: dict) -> None:
    policy = tiny_policy(base=tiny_base("llama", **biases), **options)
    adapter = policy.adapter
    for index, products in enumerate(loaded_products(policy)):
        layer = policy.base.get_decoder().layers[index]
        for product, names, adapted in zip(
            products, INPUT_GROUPS, adapter.groups(index) if adapter else ((),) * 4, strict=True
        ):
            x = torch.randn(3, linear_of(layer, names[0]).in_features, dtype=torch.float64)
            parts = [linear_of(layer, name)(x) for name in names]
            for name in adapted:
                low = functional.linear(x, adapter.pair(index, name).down)
                parts.append(functional.pad(low, (0, product.padded - adapter.rank)))
            torch.testing.assert_close(product(x), torch.cat(parts, dim=1), rtol=0, atol=1e-12)
            update = product.update(None)
            assert (update is None) == (not adapted)
            if update is not None:
                for name, up in zip(names, update.up.split(product.group.widths), strict=True):
                    expected = torch.zeros_like(up)
                    if name in adapted:
                        expected[:, : adapter.rank] = adapter.scale * adapter.pair(index, name).up
                    assert torch.equal(up, expected), name


def test_an_adapter_is_loaded_in_place_over_the_one_before() -> None:
    policy = tiny_policy()
    pointers = []
    for factor in (1.0, 1.5):
        for parameter in policy.adapter.parameters():
            parameter.data.mul_(factor)
        products = [product for layer in loaded_products(policy) for product in layer]
        pointers.append([product.group.matrix.data_ptr() for product in products])
    assert pointers[0] == pointers[1]
    product, weights = products[0], adapter_weights(policy)
    (up, places), pointer = (product.up, product.places), product.up.data_ptr()
    policy.adapter.pair(0, "k_proj").up.data.zero_()
    weights = adapter_weights(policy)
    product.load(weights[0][0])
    # 16 queries, then 8 keys: A of the keys is gone, where it lay.
    assert product.up is up and product.up.data_ptr() == pointer and product.places == places == (0, 1, 2)
    assert not up[16:24].any() and up[:16, :4].all() and not up[:, 4:].any()


def test_nothing_of_a_larger_adapter_is_left_behind_b() -> None:
    policy = tiny_policy(rank=20)
    loaded_products(policy)
    detach_adapter(policy.base)
    product = loaded_products(tiny_policy(base=policy.base, rank=4))[0][0]
    lows = product(torch.randn(3, 16, dtype=torch.float64))[:, product.group.outputs :].view(3, 3, 16)
    assert lows[:, :, :4].all() and not lows[:, :, 4:].any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fusing_leaves_the_base_as_it_was_to_run_to_save_and_to_detach(tmp_path, architecture: str, tied: bool) -> None:
    policy = tiny_policy(base=tiny_base(architecture, tied=tied, dtype=torch.float32), dtype=torch.float32)
    base = policy.base
    detach_adapter(base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    parameters = dict(base.named_parameters())
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = base(tokens).logits
        attach_adapter(base, policy.adapter)
        loaded_products(policy)
        detach_adapter(base)
        assert torch.equal(base(tokens).logits, logits)
    after = base.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value) and after[name].is_contiguous(), name
    assert {name: id(value) for name, value in base.named_parameters()} == {
        name: id(value) for name, value in parameters.items()
    }
    assert not any(value.requires_grad for value in parameters.values())
    base.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_every_map_of_a_group_is_a_view_of_one_matrix_and_nothing_exists_twice() -> None:
    base = tiny_base("llama", hidden_size=64, intermediate_size=96, attention_bias=True)
    plain = sum(value.nbytes for value in base.parameters())
    fused = FusedWeights.of(base, rank=8)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in base.parameters()}
    # Spare: 16 rows for each of seven maps in two layers, of 64 numbers, or of 96 behind the down projection; and a
    # bias for each spare row of the four maps that have biases.
    assert sum(storages.values()) == plain + 8 * 16 * 2 * (6 * 64 + 96) + 8 * 16 * 2 * 4
    for layer, groups in zip(base.get_decoder().layers, fused.layers, strict=True):
        for names, group in zip(INPUT_GROUPS, groups, strict=True):
            for name in names:
                weight = linear_of(layer, name).weight
                assert weight.untyped_storage().data_ptr() == group.matrix.untyped_storage().data_ptr(), name


def test_weights_are_fused_once_and_again_when_the_base_was_cast_or_the_rank_grew() -> None:
    base = tiny_base()
    first = FusedWeights.of(base, rank=4)
    assert FusedWeights.of(base, rank=16) is first and FusedWeights.of(base, rank=0) is first
    second = FusedWeights.of(base, rank=17)
    assert second is not first and second.holds_the_weights() and not first.holds_the_weights()
    base.float()
    third = FusedWeights.of(base, rank=0)
    assert third is not second and third.layers[0][0].matrix.dtype == torch.float32


def test_a_copy_of_a_fused_base_has_weights_of_its_own() -> None:
    base = tiny_base()
    fused = FusedWeights.of(base, rank=4)
    copied = deepcopy(base)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert (
        FusedWeights.of(copied, rank=4) is not fused and not FusedWeights.of(copied, rank=4).layers[0][0].matrix.any()
    )
    assert fused.layers[0][0].matrix.any() and FusedWeights.of(base, rank=4) is fused


def test_what_is_loaded_into_the_base_later_is_what_products_multiply_with() -> None:
    base, other = tiny_base(), tiny_base(seed=1)
    fused = FusedWeights.of(base, rank=0)
    base.load_state_dict(other.state_dict())
    for layer, groups in zip(other.get_decoder().layers, fused.layers, strict=True):
        for names, group in zip(INPUT_GROUPS, groups, strict=True):
            assert torch.equal(group.matrix, torch.cat([linear_of(layer, name).weight for name in names]))
