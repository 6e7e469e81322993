"""The adapted linear maps against (W + scale A S B) x, with the matrix built."""

from itertools import combinations

import pytest
import torch
from torch import nn

from pte.method.adapter import INPUT_GROUPS, LINEAR_MAPS, BoundAdapter, LayerSizes, ThoughtAdapter, ThoughtLinear

SIZES = LayerSizes(
    layers=2,
    kv_dim=4,
    hidden_size=6,
    maps={
        "q_proj": (6, 8),
        "k_proj": (6, 4),
        "v_proj": (6, 4),
        "o_proj": (8, 6),
        "gate_proj": (6, 10),
        "up_proj": (6, 10),
        "down_proj": (10, 6),
    },
)
SUBSETS = [*combinations(LINEAR_MAPS, 1), *combinations(LINEAR_MAPS, 2), ("v_proj", "down_proj", "q_proj"), LINEAR_MAPS]


def moved_adapter(**options: object) -> ThoughtAdapter:
    """An adapter whose A is not zero, float64."""
    adapter = ThoughtAdapter(SIZES, **{"rank": 3, "global_tokens": 2, **options}).double()
    generator = torch.Generator().manual_seed(9)
    for name, parameter in adapter.named_parameters():
        if name.endswith(".up"):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return adapter


def adapted_maps(adapter: ThoughtAdapter, layer: int) -> dict[str, ThoughtLinear]:
    torch.manual_seed(layer)
    maps = {}
    for group, names in enumerate(adapter.groups(layer)):
        for member, name in enumerate(names):
            base = nn.Linear(*SIZES.maps[name], dtype=torch.float64)
            maps[name] = ThoughtLinear(base, layer=layer, group=group, member=member, binding=adapter.binding)
    return maps


def inputs_by_group() -> dict[str, torch.Tensor]:
    """One input per group, as in a layer, where the maps of a group read the same tensor."""
    generator = torch.Generator().manual_seed(3)
    inputs = {}
    for names in INPUT_GROUPS:
        x = torch.randn(2, 5, SIZES.maps[names[0]][0], generator=generator, dtype=torch.float64)
        inputs |= dict.fromkeys(names, x)
    return inputs


@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_an_adapted_map_is_w_plus_scale_a_s_b(targets: tuple[str, ...]) -> None:
    adapter = moved_adapter(targets=targets, scale=1.7)
    states = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bound = BoundAdapter(adapter.weights(torch.float64), tuple(states.transpose(2, 3).unbind(0)))
    with torch.no_grad(), adapter.binding.bound(bound):
        for layer in range(2):
            inputs = inputs_by_group()
            for name, linear in adapted_maps(adapter, layer).items():
                out = linear(inputs[name])
                pair = adapter.layers[layer][name]
                for row in range(2):
                    matrix = linear.base.weight + 1.7 * pair.up @ states[layer, row] @ pair.down
                    expected = inputs[name][row] @ matrix.T + linear.base.bias
                    torch.testing.assert_close(out[row], expected, rtol=0, atol=1e-12)


def test_a_state_of_one_is_plain_lora() -> None:
    adapter = moved_adapter(kind="lora", scale=0.5)
    inputs = inputs_by_group()
    identity = tuple(torch.eye(3, dtype=torch.float64).expand(2, 3, 3) for _ in range(2))
    weights = adapter.weights(torch.float64)
    with torch.no_grad():
        for name, linear in adapted_maps(adapter, 1).items():
            pair = adapter.layers[1][name]
            lora = linear.base(inputs[name]) + 0.5 * (inputs[name] @ pair.down.T) @ pair.up.T
            for states in (None, identity):
                with adapter.binding.bound(BoundAdapter(weights, states)):
                    torch.testing.assert_close(linear(inputs[name]), lora, rtol=0, atol=1e-12)


def test_two_inputs_of_one_group_are_not_mixed_up() -> None:
    # The product with B is shared by the maps of a group while they read one tensor, and only then.
    adapter = moved_adapter()
    maps = adapted_maps(adapter, 0)
    first, second = torch.randn(2, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = adapter.weights(torch.float64)
    with torch.no_grad():
        with adapter.binding.bound(BoundAdapter(weights, None)):
            maps["q_proj"](first)
            mixed = maps["k_proj"](second)
        with adapter.binding.bound(BoundAdapter(weights, None)):
            alone = maps["k_proj"](second)
    assert torch.equal(mixed, alone)


def test_layers_that_read_one_tensor_use_their_own_weights() -> None:
    adapter = moved_adapter()
    x = inputs_by_group()["q_proj"]
    weights = adapter.weights(torch.float64)
    first, second = (adapted_maps(adapter, layer)["q_proj"] for layer in (0, 1))
    with torch.no_grad():
        with adapter.binding.bound(BoundAdapter(weights, None)):
            first(x)
            after_another_layer = second(x)
        with adapter.binding.bound(BoundAdapter(weights, None)):
            alone = second(x)
    assert torch.equal(after_another_layer, alone)


def test_an_unbound_map_is_the_base() -> None:
    adapter = moved_adapter()
    linear = adapted_maps(adapter, 0)["q_proj"]
    x = inputs_by_group()["q_proj"]
    assert torch.equal(linear(x), linear.base(x))


def test_a_binding_ends_with_its_block_and_restores_the_one_before() -> None:
    adapter = moved_adapter()
    outer, inner = (BoundAdapter(adapter.weights(torch.float64), None) for _ in range(2))
    with adapter.binding.bound(outer):
        with pytest.raises(RuntimeError, match="inside"), adapter.binding.bound(inner):
            assert adapter.binding.current is inner
            raise RuntimeError("inside")
        assert adapter.binding.current is outer
    assert adapter.binding.current is None


def test_gradients_of_an_adapted_map_are_those_of_the_built_matrix() -> None:
    adapter = moved_adapter(targets=("q_proj", "k_proj", "v_proj"), scale=1.3)
    maps = adapted_maps(adapter, 0)
    x = inputs_by_group()["q_proj"]
    state = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64, requires_grad=True)
    pairs = [adapter.layers[0][name] for name in maps]
    wanted = [state, *(p for pair in pairs for p in (pair.up, pair.down))]
    bound = BoundAdapter(adapter.weights(torch.float64), tuple(state.transpose(2, 3).unbind(0)))
    with adapter.binding.bound(bound):
        ours = torch.autograd.grad(sum(linear(x).sin().sum() for linear in maps.values()), wanted)
    built = 0.0
    for linear, pair in zip(maps.values(), pairs, strict=True):
        for row in range(2):
            matrix = linear.base.weight + 1.3 * pair.up @ state[0, row] @ pair.down
            built = built + (x[row] @ matrix.T + linear.base.bias).sin().sum()
    for mine, theirs in zip(ours, torch.autograd.grad(built, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_parameters_are_float32_and_of_the_paper_s_shapes() -> None:
    adapter = ThoughtAdapter(SIZES, rank=3, global_tokens=2)
    shapes = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    expected = {
        "encoder.query": (2, 3, 4),
        "encoder.query_map": (2, 3, 4),
        "encoder.key_map": (2, 3, 4),
        "encoder.value_map": (2, 3, 4),
        "encoder.global_tokens": (2, 6),
    }
    for layer in range(2):
        for name, (inputs, outputs) in SIZES.maps.items():
            expected[f"layers.{layer}.{name}.up"] = (outputs, 3)
            expected[f"layers.{layer}.{name}.down"] = (3, inputs)
    assert shapes == expected
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(p.count_nonzero() == 0 for n, p in adapter.named_parameters() if n.endswith(".up"))
    assert all(p.count_nonzero() > 0 for n, p in adapter.named_parameters() if not n.endswith(".up"))


def test_a_start_from_queries_reads_the_address_of_the_keys_that_a_query_looks_for() -> None:
    adapter = ThoughtAdapter(SIZES, rank=3, global_tokens=2).double()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    generator = torch.Generator().manual_seed(4)
    query_maps = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    adapter.start_from_queries(query_maps)
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    for layer, query_map in enumerate(query_maps):
        keys = (query_map @ x).expand(2, 1, 1, 4)  # what x looks for, as keys of both layers
        address = adapter.encoder.mapped(keys, keys)[0][layer, 0, 0]
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            down, size = adapter.pair(layer, name).down, before[f"layers.{layer}.{name}.down"].norm()
            read = down @ x
            torch.testing.assert_close(read / read.norm(), address / address.norm(), rtol=0, atol=1e-12)
            torch.testing.assert_close(down.norm(), size, rtol=1e-12, atol=0)
        for name in ("o_proj", "down_proj"):
            assert torch.equal(adapter.pair(layer, name).down, before[f"layers.{layer}.{name}.down"])
    moved = {name for name, p in adapter.named_parameters() if not torch.equal(p, before[name])}
    assert all(name.endswith(".down") for name in moved), "A stays zero, the encoder as it is"


def test_an_adapter_without_an_encoder_has_no_addresses_to_start_from() -> None:
    with pytest.raises(ValueError, match="start_from_queries needs an encoder, got an adapter of kind 'lora'"):
        ThoughtAdapter(SIZES, kind="lora", rank=3).start_from_queries([torch.zeros(4, 6)] * 2)


def test_queries_of_a_base_with_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="query_maps must be one for each of 2 layers, got 1; use those of"):
        ThoughtAdapter(SIZES, rank=3).start_from_queries([torch.zeros(4, 6)])


def test_only_the_thought_kind_folds_and_only_lora_has_no_encoder() -> None:
    kinds = {kind: ThoughtAdapter(SIZES, kind=kind, rank=3) for kind in ("thought", "global_only", "lora")}
    assert {kind: adapter.folds for kind, adapter in kinds.items()} == {
        "thought": True,
        "global_only": False,
        "lora": False,
    }
    assert {kind for kind, adapter in kinds.items() if adapter.encoder is None} == {"lora"}


def test_options_rebuild_the_same_adapter() -> None:
    adapter = ThoughtAdapter(
        SIZES, rank=5, targets=("o_proj", "q_proj"), scale=2.0, update_rule="paper", key_space="post_rotary",
        global_tokens=4, seed=7,
    )  # fmt: skip
    options = adapter.options()
    twin = ThoughtAdapter(SIZES, **{**options, "targets": tuple(options["targets"])}, seed=7)
    assert twin.options() == options
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in adapter.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), adapter.parameters(), strict=True))
    other = ThoughtAdapter(SIZES, **{**options, "targets": tuple(options["targets"])}, seed=8)
    assert not torch.equal(other.layers[0]["q_proj"].down, adapter.layers[0]["q_proj"].down)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0; the paper uses 32"),
        ({"global_tokens": -1}, "global_tokens must be 0 or more, got -1; the paper uses 32"),
        (
            {"kind": "global_only", "global_tokens": 0},
            "global_only needs global_tokens of at least 1, got 0; the state would always be zero",
        ),
        ({"targets": ()}, f"targets must name at least one linear map, got none; use some of {', '.join(LINEAR_MAPS)}"),
        (
            {"targets": ("q_proj", "lm_head")},
            f"targets must be linear maps of a layer, got 'lm_head'; use some of {', '.join(LINEAR_MAPS)}",
        ),
        (
            {"targets": ("q_proj", "q_proj")},
            "targets must not repeat a linear map, got q_proj, q_proj; name each once",
        ),
    ],
)
def test_options_that_no_adapter_can_have_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        ThoughtAdapter(SIZES, **options)
    assert str(caught.value) == text


def test_only_the_adapted_layers_have_parameters_and_weights() -> None:
    adapter = ThoughtAdapter(SIZES, rank=3, global_tokens=2, layers=(1,))
    assert {name.split(".")[1] for name, _ in adapter.named_parameters() if name.startswith("layers.")} == {"1"}
    first, second = adapter.weights(torch.float32)
    assert all(group is None for group in first) and all(group is not None for group in second)
    assert adapter.options()["layers"] == [1]
    twin = ThoughtAdapter(SIZES, **{**adapter.options(), "targets": adapter.targets, "layers": (1,)})
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in adapter.named_parameters()]


@pytest.mark.parametrize("layers", [(), (0, 0), (2,), (-1,)])
def test_layers_that_a_model_does_not_have_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layers must be different indices from 0 to 1, at least one, got"):
        ThoughtAdapter(SIZES, layers=layers)
