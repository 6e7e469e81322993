"""What we rely on in PEFT, one sentence each: a failure here says what moved when PEFT changed."""

from __future__ import annotations

import dataclasses
import inspect

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method

from pte.integrations import peft_config
from pte.integrations.peft import PTEConfig, PTEModel
from tiny import tiny_base

# What PTEModel and AdaptedMap override, with the arguments that PEFT passes by name or in this order.
OVERRIDDEN = {
    (BaseTuner, "_pre_injection_hook"): ("model", "config", "adapter_name"),
    (BaseTuner, "_post_injection_hook"): ("model", "config", "adapter_name"),
    (BaseTuner, "inject_adapter"): (
        "model",
        "adapter_name",
        "autocast_adapter_dtype",
        "low_cpu_mem_usage",
        "state_dict",
    ),
    (BaseTuner, "_check_target_module_exists"): ("peft_config", "key"),
    (BaseTuner, "_create_and_replace"): (
        "peft_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
        "parameter_name",
    ),
    (BaseTuner, "set_adapter"): ("adapter_name", "inference_mode"),
    (BaseTuner, "_check_merge_allowed"): (),
    (BaseTuner, "unload"): (),
    (BaseTuner, "_remove_adapter_name_from_key"): ("key", "adapter_name"),
    (BaseTuner, "_remap_adapter_state_dict_for_load"): ("model", "config", "adapter_name", "state_dict"),
    (BaseTunerLayer, "_move_adapter_to_device_of_base_layer"): ("adapter_name", "device"),
}


def test_the_version_is_one_that_was_tried() -> None:
    assert peft.__version__.startswith(peft_config.PEFT_VERSIONS), (
        f"PEFT is {peft.__version__} now: read what changed, run these tests, then raise PEFT_VERSIONS, the extra in "
        f"pyproject.toml and constraints.txt together"
    )


@pytest.mark.parametrize(("owner", "method"), OVERRIDDEN, ids=lambda value: getattr(value, "__name__", value))
def test_methods_that_we_override_are_still_called_as_before(owner: type, method: str) -> None:
    assert hasattr(owner, method), f"{owner.__name__}.{method} is gone: PEFT no longer asks us, find what replaced it"
    names = tuple(name for name in inspect.signature(getattr(owner, method)).parameters if name != "self")
    assert names == OVERRIDDEN[owner, method], (
        f"{owner.__name__}.{method} takes {names} now instead of {OVERRIDDEN[owner, method]}: override it as it is "
        f"called now"
    )


def test_the_mappings_take_a_type_that_is_not_in_the_enumeration() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING["PTE"] is PTEConfig and PEFT_TYPE_TO_TUNER_MAPPING["PTE"] is PTEModel, (
        "PEFT looks methods up elsewhere than in its PEFT_TYPE_TO_ mappings now: register there"
    )
    assert PEFT_TYPE_TO_PREFIX_MAPPING["PTE"] == PTEModel.prefix
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        register_peft_method(name="pte", config_cls=PTEConfig, model_cls=PTEModel)


def test_the_registration_would_be_peft_s_own_if_it_could() -> None:
    source = inspect.getsource(register_peft_method)
    filled = ("PREFIX_MAPPING[peft_type] =", "CONFIG_MAPPING[peft_type] =", "TUNER_MAPPING[peft_type] =")
    assert all(f"PEFT_TYPE_TO_{mapping}" in source for mapping in filled), (
        "PEFT's registration fills other mappings than ours does now: fill the same"
    )


def test_a_forward_goes_through_the_hook_that_refuses_arguments() -> None:
    for method in (peft.PeftModelForCausalLM.forward, peft.PeftModelForCausalLM.generate):
        assert "_enable_peft_forward_hooks" in inspect.getsource(method), (
            "PEFT's forward no longer enters _enable_peft_forward_hooks: adapter_names would be dropped silently"
        )


def test_generate_of_a_model_is_still_asked_of_the_tuner() -> None:
    assert "self.base_model.generate(" in inspect.getsource(peft.PeftModelForCausalLM.generate), (
        "PEFT's generate no longer calls base_model.generate: Transformers' own loop would run without a budget"
    )
    assert type(peft.get_peft_model(tiny_base(), PTEConfig(r=2))) is peft.PeftModelForCausalLM, (
        "get_peft_model makes another class for CAUSAL_LM, whose generate may not ask the tuner"
    )


def test_direct_injection_knows_methods_with_shared_state() -> None:
    assert hasattr(BaseTuner, "uses_shared_state"), (
        "BaseTuner.uses_shared_state is gone: inject_adapter_in_model would lose our parameters, refuse it otherwise"
    )


def test_parameters_on_the_tuner_are_found_by_peft_s_state_dicts() -> None:
    model = peft.get_peft_model(tiny_base(dtype=torch.float32), PTEConfig(r=2, global_tokens=1))
    found = peft.get_peft_model_state_dict(model)
    own = model.base_model.pte_adapters["default"].state_dict()
    assert found.keys() == {f"base_model.pte_adapters.{name}" for name in own}, (
        "PEFT's selection of an adapter's tensors misses or adds some: see BaseTuner._get_adapter_state_dict"
    )


def test_a_configuration_is_a_dataclass_of_peft_with_our_fields_beside_its_own() -> None:
    theirs = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    ours = set(PTEConfig.__annotations__) - {"peft_type", "task_type"}
    assert not theirs & ours, f"PEFT's own configuration has {sorted(theirs & ours)} now: rename ours"
    assert {"peft_type", "task_type", "base_model_name_or_path", "inference_mode"} <= theirs
