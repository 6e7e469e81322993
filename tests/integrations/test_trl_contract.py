"""What we rely on in TRL, one sentence each, and what is refused by name before anything is loaded."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import trl
from accelerate import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict, use_adapter

from peft_models import peft_model
from pte.integrations.peft import PTEConfig
from pte.integrations.trl import PTEGRPOTrainer, loading_arguments
from pte.integrations.trl_batch import PREFIX, ReplayRecord, replay_batch
from pte.integrations.trl_checks import REFUSED, TRL_VERSIONS, check_base, check_room, check_trl_version
from pte.rollout.record import collate_rollouts
from sampled import requests_for, sample
from tiny import random_sequences, tiny_base, tiny_policy

# What PTEGRPOTrainer overrides, with the arguments that it takes by name or in this order.
OVERRIDDEN = {
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
    "_generate_and_score_completions": ("inputs",),
    "_compute_loss": ("model", "inputs"),
    "_get_per_token_logps_and_entropies": (
        *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
        *("compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask"),
        *("spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
    ),
}
# What their callers do with them, and what they are given, as TRL writes it.
CALLS = {
    "_generate": (
        "completion_ids, logprobs = self._generate_single_turn(",
        "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)",
    ),
    "_prepare_inputs": (
        "generation_batch = self._generate_and_score_completions(generation_batch)",
        "generation_batch = shuffle_sequence_dict(generation_batch)",
        "split_tensor_dict(generation_batch, self.args.steps_per_generation)",
    ),
    "_generate_and_score_completions": (
        "old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(",
        "ref_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(",
        'use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)',
        'output["old_per_token_logps"] = old_per_token_logps',
        'output["sampling_per_token_logps"] = sampling_per_token_logps',
        "prompt_completion_ids = torch.cat([prompt_ids, completion_ids], dim=1)",
        "attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)",
    ),
    "_compute_loss": (
        "per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(",
        "attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)",
        'old_per_token_logps = inputs.get("old_per_token_logps")',
    ),
    "compute_loss": ("return self._compute_loss(model, inputs)",),
    "log": ("self._metrics[mode].items()",),
    "__init__": (
        "self.eos_token_ids = eos_token_ids",
        "self.temperature = args.temperature",
        "self.max_completion_length = args.max_completion_length",
        'model.add_adapter("ref", default_config)',
        'default_config = model.peft_config["default"]',
    ),
}
# GRPOConfig's own arguments that are TRL's alone: they choose data, rewards, losses, logging, or belong to vLLM.
LEFT_TO_TRL = {
    name
    for line in (
        "learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout remove_unused_columns",
        "num_generations num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset",
        "pad_to_multiple_of generation_batch_size steps_per_generation temperature chat_template_kwargs beta",
        "num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos",
        "vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights loss_type",
        "multi_objective_aggregation scale_rewards mask_truncated_completions ref_model_mixup_alpha",
        "ref_model_sync_steps top_entropy_quantile entropy_coef_min entropy_coef_max entropy_coef_delta",
        "entropy_target max_tool_calling_iterations off_policy_mask_threshold use_bias_correction_kl",
        "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo",
        "transformers_continuous_batching_config vllm_mode vllm_model_impl vllm_enable_sleep_mode",
        "vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout",
        "vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size",
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min vllm_importance_sampling_cap",
    )
    for name in line.split()
}


def test_the_version_is_one_that_was_tried() -> None:
    assert trl.__version__.startswith(TRL_VERSIONS), (
        f"TRL is {trl.__version__} now: read what changed, run these tests, then raise TRL_VERSIONS, the extra in "
        f"pyproject.toml and constraints.txt together"
    )
    with pytest.raises(ImportError, match=r"needs trl 1.16.*, got 1.17.0; .* pip install -e '.\[trl\]'"):
        check_trl_version("1.17.0")


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_methods_that_we_override_take_what_they_took(method: str) -> None:
    assert hasattr(GRPOTrainer, method), f"GRPOTrainer.{method} is gone: TRL no longer asks us, find what replaced it"
    names = tuple(name for name in inspect.signature(getattr(GRPOTrainer, method)).parameters if name != "self")
    assert names == OVERRIDDEN[method], (
        f"GRPOTrainer.{method} takes {names} now instead of {OVERRIDDEN[method]}: override it as it is called now"
    )


@pytest.mark.parametrize("method", CALLS)
def test_trl_calls_us_where_it_did_and_uses_what_we_return(method: str) -> None:
    source = re.sub(r"\s+", " ", inspect.getsource(getattr(GRPOTrainer, method)))
    for line in CALLS[method]:
        assert line in source, (
            f"GRPOTrainer.{method} no longer has `{line}`: read what it does instead, and whether completions, "
            f"log-probs and the reference are still ours"
        )


def test_the_constructor_takes_what_trl_s_takes() -> None:
    ours = [name for name, one in inspect.signature(PTEGRPOTrainer).parameters.items() if one.kind != one.KEYWORD_ONLY]
    theirs = list(inspect.signature(GRPOTrainer).parameters)
    assert ours == theirs, f"GRPOTrainer takes {theirs} now: pass them on, or refuse them by name"


@pytest.mark.parametrize(
    "name",
    [*("policy", "engine", "record", "sampling_logprobs", "max_logprob_gap"), *("scored_policy", "check_gap", "note")],
)
def test_what_is_ours_on_the_trainer_is_not_theirs(name: str) -> None:
    assert hasattr(PTEGRPOTrainer, name) or f"self.{name}" in inspect.getsource(PTEGRPOTrainer)
    for owner in GRPOTrainer.__mro__[:-1]:
        source = inspect.getsource(owner)
        assert not hasattr(owner, name) and not re.search(rf"self\.{name}\b", source), (
            f"{owner.__name__} has a {name} of its own now: rename ours"
        )


def test_every_argument_of_trl_is_left_to_it_or_refused() -> None:
    own = set(GRPOConfig.__annotations__)
    new, gone = own - LEFT_TO_TRL - set(REFUSED), LEFT_TO_TRL - own
    assert not new, f"GRPOConfig has {sorted(new)} now: refuse what the bounded policy cannot do, list the others here"
    assert not gone and not LEFT_TO_TRL & set(REFUSED), f"GRPOConfig lost {sorted(gone)}"


def test_what_is_refused_is_not_what_trl_does_by_itself() -> None:
    args = GRPOConfig("out", use_cpu=True)
    set_by_default = [name for name, (allowed, *_) in REFUSED.items() if getattr(args, name) not in allowed]
    assert not set_by_default, f"TRL sets {set_by_default} by default now: a script that leaves them alone is refused"


def test_every_tensor_of_a_batch_is_shuffled_and_split_with_the_others() -> None:
    rows = torch.arange(6)
    batch = {"prompt_ids": rows[:, None], PREFIX + "stream_seeds": rows, PREFIX + "evicted_tokens": rows[:, None, None]}
    for part in split_tensor_dict(shuffle_sequence_dict(batch), 3):
        kept = [column.flatten().tolist() for column in part.values()]
        assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 2, (
            "TRL shuffles and splits tensors it does not know otherwise than its own now: records would be mixed up"
        )


def test_the_reference_is_asked_for_by_disabling_or_switching_adapters() -> None:
    source = inspect.getsource(use_adapter)
    assert "model.disable_adapter()" in source and "model.set_adapter(adapter_name)" in source, (
        "TRL reaches its reference otherwise now: see PTEGRPOTrainer.scored_policy"
    )


def test_padded_prompts_and_completions_become_what_the_rollouts_were() -> None:
    policy = tiny_policy(window=8, block=2)
    prompts, _ = random_sequences(4)
    rollouts = sample(policy, requests_for(prompts), stop=(5, 9))
    width, longest = max(map(len, prompts)) + 3, max(len(one.completion_ids) for one in rollouts)
    ids = torch.full((4, width + longest + 2), 27)
    mask = torch.zeros(4, width, dtype=torch.long)
    for row, one in enumerate(rollouts):
        ids[row, width - len(one.prompt_ids) : width] = torch.tensor(one.prompt_ids)
        ids[row, width : width + len(one.completion_ids)] = torch.tensor(one.completion_ids)
        mask[row, width - len(one.prompt_ids) :] = 1
    record = ReplayRecord.of_rollouts(rollouts, device=torch.device("cpu"))
    found = replay_batch(ids, mask, ReplayRecord.of_columns(record.columns()), temperature=0.7)
    expected = collate_rollouts(rollouts)
    assert len(set(expected.completion_lengths.tolist())) > 2 and found.temperature == expected.temperature
    for name in ("prompt_ids", "prompt_lengths", "completion_ids", "completion_lengths", "stream_seeds"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.evicted_tokens is None and PREFIX + "evicted_tokens" not in record.columns()


def refused(match: str, *, model: object = "no/such/base", **given: object) -> None:
    args = given.pop("args", None) or GRPOConfig("out", use_cpu=True, bf16=False)
    given.setdefault("peft_config", PTEConfig())
    with pytest.raises(ValueError, match=match):
        PTEGRPOTrainer(model=model, reward_funcs=len, args=args, **given)


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_makes_another_policy_is_refused_by_name(name: str) -> None:
    given = {"top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "entropy_coef": 0.01}
    other = {"cache_implementation": "static", "generation_kwargs": {"num_beams": 2}, "neftune_noise_alpha": 5.0}
    args = GRPOConfig("out", use_cpu=True, bf16=False)
    value = {**given, **other, "fsdp": "full_shard", "deepspeed": {"zero_optimization": {"stage": 3}}}.get(name, True)
    setattr(args, name, value)
    refused(rf"^{name} must be .*, got {re.escape(repr(value))}; (leave|set)", args=args)


@pytest.mark.parametrize(("temperature", "match"), [(0.0, "temperature must be above 0"), (1e-9, "at least 0.0001")])
def test_a_temperature_that_gives_no_group_is_refused(temperature: float, match: str) -> None:
    refused(match, args=GRPOConfig("out", use_cpu=True, bf16=False, temperature=temperature))


def test_completions_without_an_end_are_refused() -> None:
    refused("max_completion_length must be a number", args=GRPOConfig("out", use_cpu=True, max_completion_length=None))


def test_a_dtype_that_trl_would_pass_over_is_refused() -> None:
    args = GRPOConfig("out", use_cpu=True, bf16=False, model_init_kwargs={"torch_dtype": "bfloat16"})
    refused("must name the dtype as 'dtype', .*, got 'bfloat16'; write model_init_kwargs={'dtype'", args=args)


def test_a_prompt_without_room_for_its_completion_is_refused_in_trl_s_words() -> None:
    check_room([[3], [3] * 10], max_completion_length=54, trained=64)
    message = "within the base's 64 trained positions, got 10 \\+ 55 tokens; set max_completion_length=54 or less"
    with pytest.raises(ValueError, match=message):
        check_room([[3], [3] * 10], max_completion_length=55, trained=64)


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = GRPOConfig("out", use_cpu=True, bf16=False)
    monkeypatch.setattr(args.distributed_state, "distributed_type", DistributedType.MULTI_GPU)
    refused("runs in one process without a launcher, got MULTI_GPU with 1", args=args)


def test_images_are_refused() -> None:
    refused("must be text, got column 'image'", train_dataset=Dataset.from_list([{"prompt": "a", "image": 1}]))
    refused("must be text, got ProcessorMixin", processing_class=ProcessorMixin())


@pytest.mark.parametrize("name", ["quantization_config", "tools", "rollout_func", "environment_factory"])
def test_what_is_more_than_a_completion_to_a_prompt_is_refused(name: str) -> None:
    refused(f"^{name} must be left out", **{name: [len]})


def test_a_model_without_a_thought_adapter_is_refused_with_the_remedy() -> None:
    refused(r"needs an adapter of peft_type PTE .*, got none; pass peft_config=PTEConfig\(window", peft_config=None)
    refused("got LoraConfig; pass peft_config=PTEConfig", peft_config=LoraConfig())
    lora = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"]))
    refused("must be of peft_type PTE, got LoraModel; pass the base", model=lora, peft_config=None)
    refused("peft_config must be left out with a model that has an adapter", model=peft_model())
    frozen = peft_model().requires_grad_(False)
    refused("must be trainable, got a frozen one; load it with .*is_trainable=True", model=frozen, peft_config=None)
    named = get_peft_model(tiny_base(), PTEConfig(r=2, global_tokens=1), adapter_name="mine")
    args = GRPOConfig("out", use_cpu=True, bf16=False, beta=0.1)
    refused("must be named 'default', .*, got 'mine'", model=named, peft_config=None, args=args)


def test_a_name_gets_the_dtype_that_bf16_asks_for_and_the_script_s_arguments_stay_as_they_are() -> None:
    args = GRPOConfig("out", use_cpu=True)
    assert loading_arguments("some/base", args).model_init_kwargs == {"dtype": "bfloat16"}
    assert args.model_init_kwargs is None and loading_arguments(tiny_base(), args) is args
    args.model_init_kwargs = {"dtype": "float32", "revision": "main"}
    assert loading_arguments("some/base", args).model_init_kwargs == args.model_init_kwargs
    args.bf16 = False
    assert loading_arguments("some/base", args) is args


def test_a_gap_that_nothing_can_keep_is_refused() -> None:
    refused("max_logprob_gap must be above 0 nats, got 0.0", max_logprob_gap=0.0)


def test_bf16_is_refused_where_the_base_would_not_compute_in_it() -> None:
    policy = tiny_policy(dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"got a base in torch.float32; load it with dtype=torch.bfloat16, or set bf16"
    ):
        check_base(policy.base, policy.adapter, bf16=True)
    check_base(policy.base, policy.adapter, bf16=False)
    check_base(policy.base.to(torch.bfloat16), policy.adapter, bf16=True)


def test_a_base_on_several_devices_or_a_disabled_adapter_is_refused() -> None:
    policy = tiny_policy()
    with pytest.raises(ValueError, match="must be enabled"):
        check_base(policy.base, None, bf16=False)
    policy.base.lm_head.to("meta")
    with pytest.raises(ValueError, match="must lie on one device, got cpu, meta"):
        check_base(policy.base, policy.adapter, bf16=False)
