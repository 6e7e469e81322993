"""Thought adapters through PEFT's own functions: what a model computes, trains, switches and refuses."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_models import SMALL, add_adapter, logits_of, peft_model, thought_adapter, token_ids
from pte.integrations.peft import PTEConfig, policy_of
from pte.method.adapter import LINEAR_MAPS, ThoughtAdapter
from pte.method.eviction.sinks import AttentionSinks
from pte.method.eviction.window import OldestFirst
from pte.method.schedule import EvictionSchedule
from pte.model.load import round_to_float8
from pte.model.policy import BoundedPolicy, attach_adapter, detach_adapter, layer_sizes
from pte.rollout.record import collate
from pte.rollout.replay import Replay
from sampled import recorded, replay_of, requests_for, sample
from tiny import ARCHITECTURES, random_sequences, tiny_base, tiny_policy

KINDS = {
    "thought": {},
    "paper rule": {"update_rule": "paper"},
    "global_only": {"kind": "global_only"},
    "lora": {"kind": "lora"},
    "no global tokens": {"global_tokens": 0},
    "some maps of one layer": {"target_modules": ["v_proj", "o_proj", "up_proj"], "layers": [1], "scale": 1.6},
}
PROMPTS, COMPLETIONS = random_sequences(4, completion=(12, 30))


def plain_logprobs(model: nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Teacher-forced, by one forward of the PEFT model."""
    logits = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def gradients(adapter: ThoughtAdapter) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad()
    return found


def close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, error: float = 1e-9) -> None:
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=error * (1 + theirs[name].abs().sum().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_identity_bit_for_bit(kind: str) -> None:
    tokens, base = token_ids(), tiny_base()
    before = logits_of(base, tokens)
    model = get_peft_model(base, PTEConfig(**{**SMALL, **KINDS[kind]}))
    assert torch.equal(logits_of(model, tokens), before)
    assert {str(p.dtype) for p in thought_adapter(model).parameters()} == {"torch.float32"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plain_forward_is_the_bounded_policy_before_any_eviction(architecture: str, kind: str) -> None:
    model = peft_model(architecture, **KINDS[kind], eviction="none")
    policy = policy_of(model)
    assert policy.schedule.is_full
    batch = collate(PROMPTS, COMPLETIONS, stream_seeds=range(4), temperature=1.0)
    bounded = Replay(policy, gradient_mode="exact")(batch).policy_logprobs
    bounded.sum().backward()
    theirs = gradients(thought_adapter(model))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        plain = plain_logprobs(model, prompt, completion)
        torch.testing.assert_close(plain, bounded[row, : len(completion)], rtol=0, atol=1e-10)
        plain.sum().backward()
    mine = gradients(thought_adapter(model))
    assert mine.keys() == dict(thought_adapter(model).named_parameters()).keys()
    # Qwen3 normalises the keys of global tokens in float32.
    close(mine, theirs, error=1e-7 if architecture == "qwen3" else 1e-9)


@pytest.mark.parametrize("setting", [{}, {"eviction": "sinks", "sink_tokens": 2}], ids=["window", "sinks"])
def test_the_policy_of_a_peft_model_is_ours_under_its_budget(setting: dict[str, object]) -> None:
    model = peft_model("llama", **setting)
    policy = policy_of(model)
    base, adapter = tiny_base("llama"), ThoughtAdapter(layer_sizes(tiny_base("llama")), rank=4, global_tokens=3)
    adapter.double().load_state_dict(thought_adapter(model).state_dict())
    attach_adapter(base, adapter)
    ours = BoundedPolicy(base, adapter, policy.schedule, AttentionSinks(2) if setting else OldestFirst())
    assert type(policy.eviction) is type(ours.eviction) and policy.schedule == EvictionSchedule(8, 4)
    rollouts, expected = (
        sample(one, requests_for(PROMPTS), max_new_tokens=30, temperature=0.7, stop=(5,)) for one in (policy, ours)
    )
    assert max(rollout.evictions for rollout in rollouts) >= 4
    assert [one.completion_ids for one in rollouts] == [one.completion_ids for one in expected]
    torch.testing.assert_close(recorded(rollouts), recorded(expected), rtol=0, atol=1e-12)
    found = []
    for one in (policy, ours):
        _, output = replay_of(one, rollouts)
        torch.testing.assert_close(output.policy_logprobs.detach(), recorded(rollouts), rtol=0, atol=1e-10)
        output.policy_logprobs.sum().backward()
        found.append(gradients(one.adapter))
    close(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_with_the_first_state(reentrant: bool) -> None:
    model, tokens = peft_model(), token_ids()
    torch.log_softmax(model(tokens, use_cache=False).logits, -1)[..., 4].sum().backward()
    expected = gradients(thought_adapter(model))
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = torch.log_softmax(model(tokens, use_cache=False).logits, -1)[..., 4].sum()
    with model.disable_adapter():  # a reference's forward between the two
        logits_of(model, tokens)
    loss.backward()
    close(gradients(thought_adapter(model)), expected)


@pytest.mark.parametrize("mode", ["chain", "exact"])
def test_a_replay_is_the_same_under_the_library_s_gradient_checkpointing(mode: str) -> None:
    model = peft_model()
    batch = collate(PROMPTS, COMPLETIONS, stream_seeds=range(4), temperature=1.0)

    def replay() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = Replay(policy_of(model), gradient_mode=mode)(batch).policy_logprobs
        output.sum().backward()
        return output.detach(), gradients(thought_adapter(model))

    logprobs, expected = replay()
    model.train()
    model.gradient_checkpointing_enable()
    again, mine = replay()
    assert torch.equal(logprobs, again)
    close(mine, expected)
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().get_decoder().layers)


@pytest.mark.parametrize("rule", ["delta", "read", "paper"])
def test_autocast_changes_no_state(rule: str) -> None:
    model, tokens = peft_model(dtype=torch.float32, update_rule=rule), token_ids()
    binding, read = thought_adapter(model).binding, []
    adapted = model.get_base_model().get_decoder().layers[1].mlp.down_proj
    adapted.register_forward_hook(lambda *_: read.append(binding.current.transposed[1]))
    expected = logits_of(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits_of(model, tokens)
    assert torch.equal(*read) and read[0].dtype == torch.float32
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max(), "what bfloat16 rounds, no more"


def test_an_adapter_that_was_cast_to_half_precision_is_refused_with_the_remedy() -> None:
    model, tokens = peft_model(dtype=torch.float32), token_ids()
    expected = logits_of(model, tokens)
    model.bfloat16()
    message = r"must be in torch.float32, .*, got torch.bfloat16; .* call model.base_model.pte_adapters.float\(\)"
    for call in (lambda: model(tokens), lambda: policy_of(model), lambda: model.generate(tokens, max_new_tokens=3)):
        with pytest.raises(ValueError, match=message):
            call()
    model.base_model.pte_adapters.float()
    difference = (logits_of(model, tokens) - expected).abs().max()
    assert 0 < difference < 0.05 * expected.abs().max(), "what bfloat16 rounds, no more"
    assert torch.equal(model.generate(tokens, max_new_tokens=3, eos_token_id=None)[:, : tokens.shape[1]], tokens)


def test_only_the_adapter_trains_and_all_of_it() -> None:
    model, tokens = peft_model(), token_ids()
    base = {name: p.clone() for name, p in model.get_base_model().named_parameters()}
    before = {name: p.clone() for name, p in thought_adapter(model).named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"base_model.pte_adapters.default.{name}" for name in before}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, base[name]) for name, p in model.get_base_model().named_parameters())
    assert not any(torch.equal(p, before[name]) for name, p in thought_adapter(model).named_parameters())


def test_the_base_s_own_loop_computes_every_token_with_the_first_state() -> None:
    model = peft_model()
    prompt, length = token_ids(1, 5), 12
    out = model.get_base_model().generate(
        prompt, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = prompt
    for _ in range(length):
        expected = torch.cat((expected, logits_of(model, expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out, expected)


def test_disabling_and_unloading_restore_the_base_bit_for_bit() -> None:
    tokens, base = token_ids(), tiny_base("qwen3")
    before, modules = logits_of(base, tokens), [type(module) for module in base.modules()]
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft_model(base=base)
    adapted = logits_of(model, tokens)
    assert (adapted - before).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens), before)
        assert policy_of(model).adapter is None
    assert torch.equal(logits_of(model, tokens), adapted)
    assert policy_of(model).adapter is thought_adapter(model)
    bare = model.unload()
    assert bare is base and [type(module) for module in base.modules()] == modules
    assert torch.equal(logits_of(base, tokens), before)
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    attach_adapter(base, tiny_policy(base=tiny_base("qwen3")).adapter)  # and takes another adapter


def test_detaching_takes_a_peft_adapter_off_as_well() -> None:
    tokens, base = token_ids(), tiny_base()
    before = logits_of(base, tokens)
    peft_model(base=base)
    with pytest.raises(ValueError, match="a base can carry one adapter, got a second"):
        attach_adapter(base, tiny_policy(base=tiny_base()).adapter)
    detach_adapter(base)
    assert torch.equal(logits_of(base, tokens), before)


def test_a_disabled_model_s_earlier_policy_is_still_one_policy() -> None:
    model = peft_model()
    policy = policy_of(model)
    with model.disable_adapter():
        rollouts = sample(policy, requests_for(PROMPTS), max_new_tokens=20, temperature=1.0)
        _, output = replay_of(policy, rollouts)
        alone = replay_of(policy_of(model), rollouts)[1].policy_logprobs
    torch.testing.assert_close(output.policy_logprobs, recorded(rollouts), rtol=0, atol=1e-10)
    bare = BoundedPolicy(tiny_base(), None, policy.schedule)
    torch.testing.assert_close(alone, replay_of(bare, rollouts)[1].policy_logprobs, rtol=0, atol=1e-10)
    assert (alone - output.policy_logprobs).abs().max() > 0.1


def test_adapters_of_one_base_compute_as_if_each_were_alone() -> None:
    tokens = token_ids()
    other_options = {"target_modules": ["k_proj", "gate_proj", "down_proj"], "layers": [1], "r": 3, "scale": 0.7}
    model = peft_model(seed=1)
    other = add_adapter(model, "other", seed=2, **other_options)
    alone = peft_model(seed=1)
    second = peft_model(seed=2, **other_options)
    thought_adapter(second).load_state_dict(other.state_dict())
    expected = [logits_of(alone, tokens), logits_of(second, tokens)]
    batch = collate(PROMPTS, COMPLETIONS, stream_seeds=range(4), temperature=1.0)
    first_policy = policy_of(model)
    assert torch.equal(logits_of(model, tokens), expected[0])
    model.set_adapter("other")
    assert torch.equal(logits_of(model, tokens), expected[1])
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    # A policy stays that of its adapter, whichever is active.
    for policy, by_itself in ((policy_of(model), policy_of(second)), (first_policy, policy_of(alone))):
        mine, theirs = (Replay(one)(batch).policy_logprobs for one in (policy, by_itself))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match="other was active which is now deleted"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"] and list(model.base_model.pte_adapters) == ["default"]
    assert torch.equal(logits_of(model, tokens), expected[0])
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_deleting_an_adapter_frees_it_but_for_the_policies_that_hold_it() -> None:
    model = peft_model()
    batch = collate(PROMPTS, COMPLETIONS, stream_seeds=range(4), temperature=1.0)
    add_adapter(model, "other", seed=2)
    model.set_adapter("other")
    policy = policy_of(model)
    before = Replay(policy)(batch).policy_logprobs
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(Replay(policy)(batch).policy_logprobs, before)
    deleted = weakref.ref(policy.adapter)
    del policy, before
    gc.collect()
    assert deleted() is None


def test_adding_an_adapter_leaves_what_trains_as_it_is() -> None:
    model = peft_model()
    add_adapter(model, "other", seed=2)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    model.add_adapter("frozen", PTEConfig(**SMALL, inference_mode=True))
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    model.set_requires_grad("other")
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default", "other"}


def test_fresh_adapters_start_from_torch_s_own_seed() -> None:
    def down() -> torch.Tensor:
        model = get_peft_model(tiny_base(), PTEConfig(**SMALL, down_start="random"))
        return thought_adapter(model).pair(0, "q_proj").down.detach()

    torch.manual_seed(3)
    first = down()
    assert torch.equal(down(), first)  # tiny_base seeds torch
    base = tiny_base()
    torch.manual_seed(4)
    model = get_peft_model(base, PTEConfig(**SMALL, down_start="random"))
    assert not torch.equal(thought_adapter(model).pair(0, "q_proj").down, first)


def test_a_copy_of_a_model_is_a_model_of_its_own() -> None:
    tokens, model = token_ids(), peft_model()
    before = logits_of(model, tokens)
    twin = copy.deepcopy(model)
    for parameter in thought_adapter(twin).parameters():
        parameter.data.zero_()
    assert torch.equal(logits_of(model, tokens), before)
    assert torch.equal(logits_of(twin, tokens), logits_of(tiny_base(), tokens))


def test_a_failed_forward_leaves_nothing_bound() -> None:
    model, tokens = peft_model(), token_ids()
    act = model.get_base_model().get_decoder().layers[0].mlp

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = act.down_proj.base_layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tokens)
    handle.remove()
    assert thought_adapter(model).binding.current is None


@pytest.mark.parametrize("kind", ["thought", "lora"])
def test_merging_is_refused_with_the_reason(kind: str) -> None:
    model = peft_model(kind=kind)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"cannot be merged .*kind {kind}: the update A S B depends on"):
            merge()
    assert not model.base_model.supports_lora_conversion()


def test_what_peft_would_drop_is_refused() -> None:
    model, tokens = peft_model(), token_ids()
    add_adapter(model, "other", seed=1)
    with pytest.raises(ValueError, match=r"adapter_names must be left out .* call set_adapter"):
        model(tokens, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="one thought adapter can be active at a time, .* default, other; name one"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="uses shared state"):
        inject_adapter_in_model(PTEConfig(**SMALL), tiny_base())
    with pytest.raises(ValueError, match="an adapter's name must not be a part of .* got 'layers'.*'layers_adapter'"):
        model.add_adapter("layers", PTEConfig(**SMALL))
    assert list(model.base_model.pte_adapters) == ["default", "other"] == list(model.peft_config)


def test_layers_that_the_base_has_not_are_refused_and_nothing_stays_behind() -> None:
    model, tokens = peft_model(), token_ids()
    before = logits_of(model, tokens)
    with pytest.raises(ValueError, match=r"layers must be different indices from 0 to 1, at least one, got \(7,\)"):
        model.add_adapter("other", PTEConfig(**SMALL, layers=[7]))
    assert list(model.base_model.pte_adapters) == ["default"] == list(model.peft_config)
    assert torch.equal(logits_of(model, tokens), before)
    base = tiny_base()
    with pytest.raises(ValueError, match="layers must be different indices"):
        get_peft_model(base, PTEConfig(**SMALL, layers=[7]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


def test_a_base_that_cannot_carry_thought_adapters_is_refused() -> None:
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=29))
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported"):
        get_peft_model(other, PTEConfig())
    with pytest.raises(ValueError, match="the base must be a causal language model of Transformers, got Linear"):
        get_peft_model(nn.Linear(2, 2), PTEConfig())
    adapted = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(ValueError, match=r"plain torch.nn.Linear, got Linear \(q_proj\).*without another adapter"),
    ):
        get_peft_model(adapted.get_base_model(), PTEConfig(**SMALL))
    with pytest.raises(ValueError, match="policy_of needs a model with an adapter of peft_type PTE, got LoraModel"):
        policy_of(adapted)
    rounded = tiny_base()
    round_to_float8(rounded, "cpu")
    with pytest.raises(ValueError, match=r"plain torch.nn.Linear, got Float8Linear \(q_proj\); load the model without"):
        get_peft_model(rounded, PTEConfig(**SMALL))


def test_a_model_without_active_adapter_has_no_policy() -> None:
    model, tokens = peft_model(), token_ids()
    model.delete_adapter("default")
    # The model itself, as PEFT's own, wants an active adapter.
    assert torch.equal(logits_of(model.base_model, tokens), logits_of(tiny_base(), tokens))
    with pytest.raises(ValueError, match="a policy needs an active adapter"):
        policy_of(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0; the paper uses 32"),
        (
            {"target_modules": ["lm_head"]},
            "target_modules must be linear maps of a layer, got 'lm_head'; use some",
        ),
        ({"target_modules": r".*_proj"}, "target_modules must be a list of names, got the pattern"),
        ({"target_modules": []}, "target_modules must be linear maps of a layer, got 'none'"),
        ({"kind": "none"}, "kind must be one of thought, lora, global_only, got 'none'"),
        ({"window_tokens": 10, "evict_tokens": 4}, r"window_tokens must be a multiple of evict_tokens \(4\), got 10"),
        ({"eviction": "sinks", "sink_tokens": 1024}, "sink_tokens must leave room for a block"),
        ({"task_type": "SEQ_CLS"}, "task_type must be 'CAUSAL_LM'.*got 'SEQ_CLS'; leave it out"),
        ({"peft_type": "LORA"}, "peft_type must be 'PTE', got 'LORA'"),
        ({"kind": "global_only", "global_tokens": 0}, "global_tokens must be at least 1 with kind 'global_only'"),
    ],
)
def test_a_configuration_that_no_adapter_can_have_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PTEConfig(**options)


@pytest.mark.parametrize("options", [{"update_rule": "sum"}, {"eviction": "lru"}, {"r": "4"}, {"scale": None}])
def test_a_value_of_the_wrong_type_is_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"(update_rule|policy|rank|scale) must be"):
        PTEConfig(**options)


@pytest.mark.parametrize("given", [None, "all-linear", set(LINEAR_MAPS)])
def test_all_maps_have_three_names(given: object) -> None:
    assert PTEConfig(target_modules=given).target_modules == list(LINEAR_MAPS)


def test_a_peft_model_is_a_peft_model() -> None:
    model = peft_model()
    assert isinstance(model, PeftModel) and type(model).__name__ == "PeftModelForCausalLM"
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.requires_grad) == (True, ["default"], {"default": True})
    assert status.num_adapter_layers == 14 and status.merged_adapters == []
