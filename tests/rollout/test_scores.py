"""Scores in chunks equal scores at once, in values and gradients."""

import pytest
import torch

from live_bytes import LiveBytes
from pte.rollout import scores
from pte.rollout.sampling import token_logprobs
from tiny import VOCAB, tiny_base, tiny_policy


def hidden_and_targets(policy, count: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, policy.base.config.hidden_size, generator=generator, dtype=torch.float64)
    vocab = policy.base.config.vocab_size
    return hidden.requires_grad_(), torch.randint(0, vocab, (count,), generator=generator)


@pytest.mark.parametrize("rows", [1, 3, 10, 1000])
def test_scores_in_chunks_are_the_scores_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(kind=None)
    hidden, targets = hidden_and_targets(policy)
    logits = policy.base.get_output_embeddings()(hidden)
    expected = token_logprobs(logits, 0.7).gather(1, targets[:, None])[:, 0]
    entropies = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    monkeypatch.setattr(scores, "LOGITS_PER_CHUNK", rows * VOCAB)
    chosen, found = scores.score(policy, hidden, targets=targets, temperature=0.7, with_entropy=True)
    torch.testing.assert_close(chosen, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, entropies, rtol=0, atol=1e-12)
    assert not found.requires_grad
    weights = torch.linspace(-1, 2, 10, dtype=torch.float64)
    (mine,) = torch.autograd.grad((chosen * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    _, without = scores.score(policy, hidden, targets=targets, temperature=0.7, with_entropy=False)
    assert not without.any()


@pytest.mark.parametrize("gradients", [False, True])
def test_no_chunk_of_logits_outlives_its_scores(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # 200 tokens x 997 words x 8 bytes = 1.6 MB of logits; in chunks of 10 tokens 80 kB, a few of them at a time.
    policy = tiny_policy(base=tiny_base(vocab_size=997), kind=None)
    hidden, targets = hidden_and_targets(policy, 200)
    monkeypatch.setattr(scores, "LOGITS_PER_CHUNK", 10 * 997)
    with torch.set_grad_enabled(gradients), LiveBytes() as probe:
        chosen, _ = scores.score(policy, hidden, targets=targets, temperature=1.0, with_entropy=True)
        if gradients:
            torch.autograd.grad(chosen.sum(), hidden)
    assert probe.peak < 200 * 997 * 8 / 2


def test_a_bfloat16_head_is_scored_in_float32() -> None:
    policy = tiny_policy(base=tiny_base(dtype=torch.bfloat16), kind=None)
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen, entropies = scores.score(
        policy, hidden, targets=torch.tensor([1, 2, 3, 4]), temperature=1.0, with_entropy=True
    )
    assert chosen.dtype == entropies.dtype == torch.float32
