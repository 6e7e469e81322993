"""The tuner behind peft_type PTE: PEFT's own functions make, switch, save and load `ThoughtAdapter`s.

Decides: which adapters lie on a base, which calls of PEFT are refused, and under which names parameters are saved. The
method itself is `pte.method`, used as it is. A plain forward (no budget, nothing evicted) computes with the first state
S_0, as the bounded policy does for its prompt; `generate` runs the bounded policy. Importing this module makes the
tuner known to PEFT, as importing `peft_config` does the configuration: PEFT's registration takes the names of its own
enumeration only, so the mappings that it fills are filled directly.

Paper: Section 3, the state before any eviction; DeltaW = A S_e B.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

# The module, not its class: importing PEFT imports this one, perhaps while that one is being imported.
from pte.integrations import peft_config
from pte.integrations.first_state import FirstStateHooks, check_encoder_dtype
from pte.integrations.generate import generate
from pte.integrations.peft_layer import AdaptedMap, active_adapter
from pte.method.adapter import LINEAR_MAPS, ThoughtAdapter
from pte.model.load import check_supported
from pte.model.policy import BoundedPolicy, home_of
from pte.open_policy import eviction_policy, new_adapter
from pte.peft_folder import KEY_PREFIX, PEFT_TYPE, check_tensors_fit
from pte.session import base_fingerprint

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerateDecoderOnlyOutput

PARAMETER_PREFIX = "pte_"


class PTEModel(BaseTuner):
    """Thought adapters of several names on one frozen causal language model.

    Attributes:
        pte_adapters: The `ThoughtAdapter` of each name.
    """

    prefix = PARAMETER_PREFIX
    tuner_layer_cls = AdaptedMap
    uses_shared_state = True

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Checks the base and makes room for adapters, before the first of them."""
        check_base(model)
        self.pte_adapters = nn.ModuleDict()

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Lets plain forwards of the base bind the first state, once the first adapter lies on it."""
        assert isinstance(model, PreTrainedModel)
        self.first_state_hooks = FirstStateHooks(model, active_adapter)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Makes a fresh adapter and puts it on the base; adapters that are there stay as they are.

        Raises:
            ValueError: The adapter's name is one of its parameters', or its configuration fits another base.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, peft_config.PTEConfig) and isinstance(model, PreTrainedModel)
        check_fingerprint(config, model)
        # As PEFT draws the initial values of its adapters: from torch's generator.
        seed = int(torch.randint(2**31, (), device="cpu"))
        adapter = new_adapter(config.adapter_options(), model, seed=seed)
        check_adapter_name(adapter_name, adapter)
        if not any(parameter.is_meta for parameter in adapter.parameters()):
            adapter.to(model.device)
        trained = {name: parameter.requires_grad for name, parameter in self.pte_adapters.named_parameters()}
        self.pte_adapters[adapter_name] = adapter
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        for name, requires_grad in trained.items():
            self.pte_adapters.get_parameter(name).requires_grad = requires_grad

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        """True for an adapted map of an adapted layer."""
        place = place_of(key)
        return place is not None and adapts(peft_config, layer=place[0], name=place[1])

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Puts one map of the new adapter in its place."""
        place = place_of(current_key)
        assert place is not None
        adapted = target
        if not isinstance(adapted, AdaptedMap):
            assert isinstance(target, nn.Linear)
            adapted = AdaptedMap(target, self.pte_adapters)
            setattr(parent, target_name, adapted)
        adapted.add(adapter_name, adapter_of(self, adapter_name), layer=place[0], name=place[1])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active.

        Raises:
            ValueError: Several are named.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"one thought adapter can be active at a time, because each has a state of its own, got "
                f"{', '.join(adapter_name)}; name one"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: object, **kwargs: object) -> Iterator[None]:
        """Refuses, before a forward, the arguments that PEFT would drop.

        Raises:
            ValueError: Adapters are named row by row.
        """
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} must be left out with adapters of peft_type {PEFT_TYPE}, got {kwargs[name]!r}; call "
                    f"set_adapter and run the rows of each adapter by themselves"
                )
        yield

    def active_policy(self) -> BoundedPolicy:
        """The active adapter under the budget of its configuration; the base alone under it where it is disabled.

        Raises:
            ValueError: No adapter is active, or it is in half precision.
        """
        if not self.active_adapters:
            raise ValueError("a policy needs an active adapter, got a model without any; call set_adapter first")
        (name,) = self.active_adapters
        config = self.peft_config[name]
        assert isinstance(config, peft_config.PTEConfig) and isinstance(self.model, PreTrainedModel)
        cache = config.cache_options()
        check_encoder_dtype(adapter_of(self, name))
        policy = BoundedPolicy(self.model, adapter_of(self, name), cache.schedule, eviction_policy(cache))
        disabled = any(module.disable_adapters for module in self.modules() if isinstance(module, AdaptedMap))
        return policy.without_adapter() if disabled else policy

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **arguments: object
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What PEFT calls for `generate` of its model: the active policy's own (`pte.integrations.generate`)."""
        return generate(self.active_policy(), inputs, generation_config=generation_config, arguments=arguments)

    def _check_merge_allowed(self) -> None:
        """Refuses to merge.

        Raises:
            ValueError: Always.
        """
        configs = (config for config in self.peft_config.values() if isinstance(config, peft_config.PTEConfig))
        kinds = sorted({config.kind for config in configs})
        raise ValueError(
            f"adapters of peft_type {PEFT_TYPE} cannot be merged into the base, got kind {', '.join(kinds)}: the "
            f"update A S B depends on the sequence, through the state S that its evicted tokens leave; keep the "
            f"adapter beside the base, or call unload() for the base alone"
        )

    def unload(self) -> nn.Module:
        """The base as it was, bit for bit."""
        base = super().unload()
        self.first_state_hooks.remove()
        return base

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A parameter's name in a saved adapter, from its name in a model."""
        return key.replace(f"{KEY_PREFIX}{adapter_name}.", KEY_PREFIX, 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Saved tensors under their names in a model.

        Raises:
            ValueError: They are not those of the adapter, one for one, or were made for a base of other sizes.
        """
        before = f"{KEY_PREFIX}{adapter_name}."
        saved = {key.removeprefix(KEY_PREFIX): value for key, value in state_dict.items() if key.startswith(KEY_PREFIX)}
        own = model.state_dict()
        check_tensors_fit(
            saved,
            expected={key.removeprefix(before): value for key, value in own.items() if key.startswith(before)},
            base_name=config.base_model_name_or_path or "",
        )
        others = {key: value for key, value in state_dict.items() if not key.startswith(KEY_PREFIX)}
        return others | {f"{before}{name}": value for name, value in saved.items()}


def adapter_of(tuner: PTEModel, adapter_name: str) -> ThoughtAdapter:
    """The adapter of a name."""
    adapter = tuner.pte_adapters[adapter_name]
    assert isinstance(adapter, ThoughtAdapter)
    return adapter


def adapts(config: PeftConfig, *, layer: int, name: str) -> bool:
    """True when a configuration names a map of a layer."""
    assert isinstance(config, peft_config.PTEConfig) and config.target_modules is not None
    return name in config.target_modules and (not config.layers or layer in config.layers)


def place_of(key: str) -> tuple[int, str] | None:
    """Layer and name of a linear map from its path in a model, or None for any other module."""
    parts = key.split(".")
    if len(parts) < 4 or parts[-4] != "layers" or not parts[-3].isdecimal() or parts[-1] not in LINEAR_MAPS:
        return None
    return int(parts[-3]), parts[-1]


def check_base(model: nn.Module) -> None:
    """Refuses a model that thought adapters cannot be put on.

    Raises:
        ValueError: It is not supported (`pte.model.load.check_supported`), quantised, or has an adapter already.
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "lm_head"):
        raise ValueError(
            f"the base must be a causal language model of Transformers, got {type(model).__name__}; load it with "
            f"AutoModelForCausalLM"
        )
    check_supported(model.config)
    for layer in model.get_decoder().layers:
        for name in LINEAR_MAPS:
            linear = getattr(home_of(layer, name), name)
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"the base's linear maps must be plain torch.nn.Linear, got {type(linear).__name__} ({name}); load "
                    f"the model without quantisation and without another adapter"
                )


def check_fingerprint(config: peft_config.PTEConfig, model: PreTrainedModel) -> None:
    """Refuses a base other than the one that the configuration insists on.

    Raises:
        ValueError: It is another one.
    """
    if config.base_fingerprint is not None and config.base_fingerprint != base_fingerprint(model):
        raise ValueError(
            f"base_fingerprint must be that of the loaded base ({base_fingerprint(model)[:12]}), got "
            f"{config.base_fingerprint[:12]}, of {config.base_model_name_or_path!r}; load that base, or set "
            f"base_fingerprint to null in adapter_config.json to take any base of the same sizes"
        )


def check_adapter_name(adapter_name: str, adapter: ThoughtAdapter) -> None:
    """Refuses a name by which PEFT could not tell the parameters of two adapters apart.

    Raises:
        ValueError: A parameter has it as part of its own name.
    """
    parts: set[str] = {part for name, _ in adapter.named_parameters() for part in name.split(".")}
    if adapter_name in parts:
        raise ValueError(
            f"an adapter's name must not be a part of its parameters' names, got {adapter_name!r}: saving another "
            f"adapter would leave these parameters out; use {adapter_name + '_adapter'!r}"
        )


PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = PTEModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PARAMETER_PREFIX  # type: ignore[index]
