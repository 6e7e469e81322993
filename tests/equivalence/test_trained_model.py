"""The laws on a trained model: its attention has sinks and its memory matters, which random weights do not have."""

from functools import cache

import pytest
import torch

from pte.method.adapter import ThoughtAdapter
from pte.method.eviction.h2o import HeavyHitters
from pte.method.eviction.keydiff import DistinctKeys
from pte.method.eviction.random import UniformRandom
from pte.method.eviction.rkv import RedundantKeys
from pte.method.eviction.scissorhands import PersistentImportance
from pte.method.eviction.sinks import AttentionSinks
from pte.method.eviction.snapkv import ObservationWindow
from pte.method.eviction.tova import LastQueryAttention
from pte.method.schedule import EvictionSchedule
from pte.model.load import load_base, load_tokenizer
from pte.model.policy import BoundedPolicy, attach_adapter, detach_adapter, layer_sizes
from pte.rollout.record import Rollout, collate
from pte.rollout.replay import Replay
from pte.tasks.chained import embedded_model_dir, generate_problems
from reference import Reference
from sampled import gap, requests_for, sample


@cache
def trained():
    return load_base(embedded_model_dir(), dtype=torch.float64, device="cpu"), load_tokenizer(embedded_model_dir())


def problems_as_tokens(count: int, *, statements: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Prompts and right traces."""
    _, tokenizer = trained()
    problems = generate_problems(count, seed=5, split="heldout", num_statements=statements)
    prompts = [(tokenizer.bos_token_id, *tokenizer(p.problem, add_special_tokens=False)["input_ids"]) for p in problems]
    return prompts, [tuple(tokenizer(p.trace, add_special_tokens=False)["input_ids"]) for p in problems]


@pytest.mark.parametrize(
    "eviction",
    [
        None,
        UniformRandom(),
        AttentionSinks(4),
        HeavyHitters(8),
        PersistentImportance(4),
        LastQueryAttention(),
        ObservationWindow(2),
        RedundantKeys(4),
        DistinctKeys(0),
    ],
    ids=lambda eviction: "window" if eviction is None else eviction.name,
)
def test_a_trained_model_is_one_policy_in_rollout_and_replay(eviction: object) -> None:
    base, tokenizer = trained()
    adapter = ThoughtAdapter(layer_sizes(base), rank=8, global_tokens=4).double()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.02)
    attach_adapter(base, adapter)
    try:
        options = {} if eviction is None else {"eviction": eviction}
        policy = BoundedPolicy(base, adapter, EvictionSchedule(16, 4), **options)
        prompts, _ = problems_as_tokens(3, statements=4)
        rollouts = sample(
            policy, requests_for(prompts), slots=2, temperature=1.2, max_new_tokens=40, stop=[tokenizer.eos_token_id]
        )
        assert max(rollout.evictions for rollout in rollouts) >= 5
        # In float32 the sharp logits of a trained model alone round to 2e-5.
        assert gap(policy, rollouts) < 1e-10
        if eviction is not None and eviction.needs.anything:
            check_record(policy, rollouts[:2])
    finally:
        detach_adapter(base)


def check_record(policy: BoundedPolicy, rollouts: list[Rollout]) -> None:
    """The tokens that left are those of the slow reference, and not merely the oldest."""
    for rollout in rollouts:
        reference = Reference(policy, temperature=1.2)
        with torch.no_grad():
            theirs = reference.logprobs(rollout.prompt_ids, rollout.completion_ids)
        assert rollout.evicted_tokens.tolist() == reference.left
        # The reference's norms and angles are float64, and this model's logits are sharp.
        torch.testing.assert_close(rollout.rollout_logprobs, theirs, rtol=0, atol=1e-3)
    left = [sorted(rollout.evicted_tokens.flatten().tolist()) for rollout in rollouts]
    assert any(tokens != list(range(len(tokens))) for tokens in left)


def test_a_trained_model_knows_its_trace_with_the_full_cache_and_loses_it_under_the_window() -> None:
    base, _ = trained()
    prompts, traces = problems_as_tokens(4, statements=12)
    batch = collate(prompts, traces, stream_seeds=range(4), temperature=1.0)
    with torch.no_grad():
        full = Replay(BoundedPolicy(base, None, EvictionSchedule(None)))(batch)
        window = Replay(BoundedPolicy(base, None, EvictionSchedule(24, 6)))(batch)
    # Up to the first eviction both are one policy: 24 tokens enter, so 25 are predicted.
    torch.testing.assert_close(window.policy_logprobs[:, :25], full.policy_logprobs[:, :25], rtol=0, atol=1e-5)
    assert full.policy_logprobs.sum(1).exp().min() > 0.5
    assert window.policy_logprobs.sum(1).max() < -10
