"""Law 2: with an unbounded budget rollout and replay are Transformers' own generate and forward."""

import pytest
import torch

from pte.method.adapter import ThoughtAdapter
from pte.model.policy import BoundedPolicy, attach_adapter, layer_sizes
from pte.rollout.record import collate
from pte.rollout.replay import Replay
from sampled import recorded, replay_of, requests_for, sample
from tiny import ARCHITECTURES, random_sequences, tiny_base, tiny_policy

STOP = 4
NEW_TOKENS = 24
PROMPTS = [(5,), *random_sequences(3, prompt=(3, 11))[0]]


def library_completions(base, prompts):
    """Greedy completions by `generate`, one prompt at a time."""
    completions = []
    for prompt in prompts:
        out = base.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=STOP,
            pad_token_id=0,
        )
        completions.append(tuple(out[0, len(prompt) :].tolist()))
    return completions


def library_logprobs(base, prompt, completion, temperature):
    """Teacher-forced log-probs by one forward without any cache."""
    tokens = torch.tensor([[*prompt, *completion]])
    logits = base(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].to(torch.float64)
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("adapted", [False, True], ids=["base alone", "fresh adapter"])
@pytest.mark.parametrize("window", [None, 64], ids=["full cache", "a window longer than any completion"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_rollouts_are_generate_s_token_for_token(architecture: str, window: int | None, adapted: bool) -> None:
    base = tiny_base(architecture, tied=architecture in ("qwen3", "llama"))
    expected = library_completions(base, PROMPTS)
    policy = tiny_policy(base=base, window=window, block=16, kind="thought" if adapted else None, up_std=0.0)
    rollouts = sample(policy, requests_for(PROMPTS), slots=2, max_new_tokens=NEW_TOKENS, temperature=0.0, stop=(STOP,))
    assert [rollout.completion_ids for rollout in rollouts] == expected
    assert {rollout.evictions for rollout in rollouts} == {0}


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replay_is_the_library_s_own_forward(architecture: str, window: int | None) -> None:
    prompts, completions = random_sequences(4, completion=(1, 30))
    base = tiny_base(architecture)
    with torch.no_grad():
        expected = [library_logprobs(base, p, c, 0.8) for p, c in zip(prompts, completions, strict=True)]
    policy = tiny_policy(base=base, window=window, block=8, up_std=0.0)
    batch = collate(prompts, completions, stream_seeds=range(4), temperature=0.8)
    ours = Replay(policy)(batch).policy_logprobs
    for row, theirs in enumerate(expected):
        torch.testing.assert_close(ours[row, : len(theirs)], theirs, rtol=0, atol=1e-9)


def test_sampled_rollouts_record_the_library_s_logprobs() -> None:
    policy = tiny_policy("qwen2", window=None, kind=None)
    rollouts = sample(policy, requests_for(PROMPTS), temperature=1.5, stop=(STOP,))
    with torch.no_grad():
        for rollout in rollouts:
            theirs = library_logprobs(policy.base, rollout.prompt_ids, rollout.completion_ids, 1.5)
            torch.testing.assert_close(rollout.rollout_logprobs, theirs, rtol=0, atol=1e-9)


def test_a_bounded_window_is_not_the_plain_model() -> None:
    # Otherwise the window of these tests would bound nothing.
    policy = tiny_policy("qwen2", window=8, kind=None)
    rollouts = sample(policy, requests_for(PROMPTS), temperature=1.0)
    _, full = replay_of(policy.with_cache(tiny_policy(window=None, kind=None).schedule), rollouts)
    difference = (full.policy_logprobs - recorded(rollouts)).abs()
    assert difference[:, :9].max() < 1e-9 and difference[:, 9:].max() > 0.1


@pytest.mark.parametrize("kind", ["thought", "lora", "global_only"])
def test_a_fresh_adapter_is_the_identity_bit_for_bit_under_a_window(kind: str) -> None:
    prompts, completions = random_sequences(4)
    base = tiny_base(dtype=torch.float32)
    batch = collate(prompts, completions, stream_seeds=range(4), temperature=1.0)
    bare = tiny_policy(base=base, kind=None, dtype=torch.float32)
    before = Replay(bare)(batch)
    adapter = ThoughtAdapter(layer_sizes(base), kind=kind, rank=4, global_tokens=3)
    attach_adapter(base, adapter)
    after = Replay(BoundedPolicy(base, adapter, bare.schedule))(batch)
    assert torch.equal(before.policy_logprobs, after.policy_logprobs)
    assert torch.equal(before.entropies, after.entropies)
