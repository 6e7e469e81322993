"""Given completions under the budget: log-probs against the slow reference and Transformers, and greedy tokens."""

from __future__ import annotations

import pytest
import torch

from pte.rollout.likelihood import likelihood
from pte.rollout.record import collate
from reference import Reference
from sampled import requests_for, sample
from tiny import VOCAB, random_sequences, tiny_base, tiny_policy

PROMPTS, COMPLETIONS = random_sequences(4, completion=(1, 22))
# The walk wants the longest first; here it is last.
COMPLETIONS.sort(key=len)
SEEDS = tuple(range(4))


def plain_logprobs(base, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """All tokens' log-probs in every place of a completion, by one forward of Transformers."""
    with torch.no_grad():
        logits = base(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)


def test_under_a_window_the_log_probs_are_the_reference_s() -> None:
    policy = tiny_policy(window=8, block=4)
    found = likelihood(policy, collate(PROMPTS, COMPLETIONS, stream_seeds=SEEDS, temperature=1.0))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = Reference(policy).logprobs(prompt, completion).detach()
        torch.testing.assert_close(found.logprobs[row, : len(completion)], expected, rtol=0, atol=1e-5)
        assert not found.logprobs[row, len(completion) :].any() and not found.likeliest[row, len(completion) :].any()


@pytest.mark.parametrize("chunk", [2**24, 3 * VOCAB], ids=["one chunk", "three tokens a chunk"])
def test_under_the_full_cache_they_and_their_argmax_are_the_library_s(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pte.rollout.likelihood.LOGITS_PER_CHUNK", chunk)
    base = tiny_base("llama")
    policy = tiny_policy(base=base, window=None, kind=None)
    found = likelihood(policy, collate(PROMPTS, COMPLETIONS, stream_seeds=SEEDS, temperature=1.0))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        plain = plain_logprobs(base, prompt, completion)
        targets = torch.tensor(completion)
        expected = plain.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[row, : len(completion)], expected, rtol=0, atol=1e-5)
        assert torch.equal(found.likeliest[row, : len(completion)], plain.argmax(-1) == targets)


def test_a_greedy_rollout_is_likeliest_everywhere_and_a_changed_token_alone_is_not() -> None:
    policy = tiny_policy(window=8, block=4)
    rollouts = sample(policy, requests_for(PROMPTS), max_new_tokens=20, temperature=0.0)
    assert {rollout.evictions for rollout in rollouts} == {3}
    completions = [rollout.completion_ids for rollout in rollouts]
    assert likelihood(policy, collate(PROMPTS, completions, stream_seeds=SEEDS, temperature=1.0)).likeliest.all()
    changed = [(*tokens[:-1], 3 if tokens[-1] != 3 else 4) for tokens in completions]
    found = likelihood(policy, collate(PROMPTS, changed, stream_seeds=SEEDS, temperature=1.0))
    assert found.likeliest[:, :-1].all() and not found.likeliest[:, -1].any()
