"""Float8: one rounding in rollout and replay, held to a slow reference; memory is the formula's."""

from __future__ import annotations

import pytest
import torch

from float8_reference import Float8Reference
from pte.method.cache import analytic_bytes
from pte.method.float8 import FLOAT8
from pte.model.load import round_to_float8
from pte.model.policy import BoundedPolicy
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import collate
from pte.rollout.replay import Replay
from sampled import SCORED, SETTINGS, gap, recorded, replay_of, requests_for, sample
from tiny import ARCHITECTURES, VOCAB, random_sequences, tiny_base, tiny_policy

PROMPTS = [(5,), *random_sequences(10, prompt=(2, 9))[0]]


def float8_policy(
    architecture: str = "qwen2", *, dtype: torch.dtype = torch.float64, **options: object
) -> BoundedPolicy:
    base = tiny_base(architecture, dtype=dtype)
    round_to_float8(base, "cpu")
    return tiny_policy(base=base, dtype=dtype, **options)


@pytest.mark.system
@pytest.mark.parametrize("setting", SETTINGS)
def test_rollout_and_replay_round_alike_to_the_last_digits_of_float64(setting: str) -> None:
    policy = float8_policy(**SETTINGS[setting])
    rollouts = sample(policy, requests_for(PROMPTS[:5]), slots=3, temperature=0.7, stop=(5,))
    assert gap(policy, rollouts) < 1e-10


@pytest.mark.system
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_prompts_stops_and_refilled_slots_are_one_policy_in_every_architecture(architecture: str) -> None:
    policy = float8_policy(architecture)
    rollouts = sample(policy, requests_for(PROMPTS), slots=3, stop=(7,), max_new_tokens=26)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert max(rollout.evictions for rollout in rollouts) >= 5
    assert gap(policy, rollouts) < 1e-10


def test_in_float32_all_but_the_few_tokens_where_a_number_meets_the_edge_of_a_code_are_within_law_one() -> None:
    # Two sums that differ in their last bit round to neighbouring codes once in a million times: then a token is off
    # by a thousandth of a nat. Everything else is as near as without float8.
    policy = float8_policy("qwen2", dtype=torch.float32, up_std=0.1)
    rollouts = sample(policy, requests_for(PROMPTS), stop=(7,), max_new_tokens=26)
    batch, output = replay_of(policy, rollouts)
    gaps = (output.policy_logprobs - recorded(rollouts)).abs()[batch.completion_mask]
    assert gaps.quantile(0.95) < 1e-5 and gaps.max() < 0.05


def test_the_gap_shows_when_the_replay_keeps_its_own_keys_and_values_unrounded() -> None:
    # The law has teeth: the same weights without the rounding of keys and values are another policy.
    policy = float8_policy()
    rollouts = sample(policy, requests_for(PROMPTS[:3]))
    plain = tiny_policy(base=tiny_base())
    assert gap(plain, rollouts) > 1e-3


LENGTHS = (1, 9, 10, 19)


@pytest.mark.system
@pytest.mark.parametrize("mode", ["chain", "exact"])
@pytest.mark.parametrize(("architecture", "options"), [("qwen2", {}), ("qwen3", {"update_rule": "paper"})])
def test_logprobs_and_every_gradient_are_those_of_the_slow_reference(
    architecture: str, options: dict[str, object], mode: str
) -> None:
    policy = float8_policy(architecture, **options)
    generator = torch.Generator().manual_seed(6)
    prompts = [(3, 4, 5), (8,), (9, 10), (14, 15, 16, 17)]
    completions = [tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist()) for n in LENGTHS]
    counts = [torch.randn(n, generator=generator, dtype=torch.float64) for n in LENGTHS]
    batch = collate(prompts, completions, stream_seeds=range(4), temperature=0.7)
    ours = Replay(policy, gradient_mode=mode)(batch).policy_logprobs
    theirs = [
        Float8Reference(policy, tiny_base(architecture), gradient_mode=mode, temperature=0.7).logprobs(*both)
        for both in zip(prompts, completions, strict=True)
    ]
    for row, expected in enumerate(theirs):
        torch.testing.assert_close(ours[row, : len(expected)], expected, rtol=0, atol=1e-5)
    names, parameters = zip(*policy.adapter.named_parameters(), strict=True)
    loss = sum((ours[row, : len(count)] * count).sum() for row, count in enumerate(counts))
    expected_loss = sum((logprobs * count).sum() for logprobs, count in zip(theirs, counts, strict=True))
    found = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(expected_loss, parameters)
    for name, mine, wanted in zip(names, found, expected, strict=True):
        assert (mine - wanted).abs().max() < 2e-5 * wanted.abs().max(), name


def test_the_cache_takes_one_byte_a_number_and_two_for_each_scale() -> None:
    policy = float8_policy(dtype=torch.bfloat16)
    engine = RolloutEngine(policy, slots=3, max_new_tokens=30, temperature=1.0, stop_token_ids=())
    engine.run(requests_for(PROMPTS[:4]))
    shape, prompt = policy.cache_shape, max(map(len, PROMPTS[:4]))
    # Keys and values of 2 layers x 2 heads x 4 numbers, and a scale for each head.
    assert shape.token_bytes(FLOAT8) == 2 * 2 * 2 * (4 + 2)
    size = {"batch": 3, "prompt_slots": prompt, "window_slots": 8}
    assert engine.peak_cache_bytes == analytic_bytes(shape, dtype=policy.cache_dtype, **size)
    wide = analytic_bytes(type(shape)(28, 4, 128), dtype=torch.bfloat16, **size)
    assert wide / analytic_bytes(type(shape)(28, 4, 128), dtype=FLOAT8, **size) == pytest.approx(256 / 130)


def test_no_wide_weight_of_a_layer_stays() -> None:
    base = tiny_base(dtype=torch.bfloat16)
    before = {name: parameter.numel() for name, parameter in base.named_parameters() if "_proj.weight" in name}
    round_to_float8(base, "cpu")
    assert before and not [name for name, _ in base.named_parameters() if "_proj." in name]
    codes = {name: buffer for name, buffer in base.named_buffers() if name.endswith(".codes")}
    assert sum(buffer.nbytes for buffer in codes.values()) == sum(before.values())
    assert base.dtype == torch.bfloat16


@pytest.mark.system
@pytest.mark.parametrize("setting", SCORED)
def test_a_policy_that_looks_at_keys_or_attention_looks_at_what_is_kept(setting: str) -> None:
    policy = float8_policy(**SETTINGS[setting])
    (rollout,) = sample(policy, requests_for(PROMPTS[:1]), max_new_tokens=24)
    reference = Float8Reference(policy, tiny_base(), stream_seed=rollout.stream_seed)
    reference.logprobs(rollout.prompt_ids, rollout.completion_ids)
    assert [sorted(left) for left in rollout.evicted_tokens.tolist()] == reference.left
