"""A full cache is replayed in one stretch whose memory is linear in its tokens, and which is the plain model."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from live_bytes import LiveBytes
from pte.method.eviction.h2o import HeavyHitters
from pte.method.schedule import EvictionSchedule
from pte.model.policy import BoundedPolicy
from pte.rollout.record import ReplayBatch, collate
from pte.rollout.replay import Replay
from tiny import VOCAB, tiny_base, tiny_policy

MODES = [("chain", None), ("horizon", 2), ("exact", None)]


class LargestTensor(TorchDispatchMode):
    """The most numbers that any tensor has which an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def long_batch(tokens: int, *, rows: int = 1) -> ReplayBatch:
    generator = torch.Generator().manual_seed(1)
    completions = [tuple(torch.randint(3, VOCAB, (tokens,), generator=generator).tolist()) for _ in range(rows)]
    return collate([(3, 4, 5)] * rows, completions, stream_seeds=range(rows), temperature=1.0)


def full_policy(*, dtype: torch.dtype = torch.float32, **options: object) -> BoundedPolicy:
    base = tiny_base(dtype=dtype, max_position_embeddings=4096)
    return tiny_policy(base=base, dtype=dtype, window=None, **options)


def largest(policy: BoundedPolicy, tokens: int, mode: tuple[str, int | None]) -> int:
    replay = Replay(policy, gradient_mode=mode[0], horizon=mode[1])
    with LargestTensor() as probe:
        loss = replay(long_batch(tokens)).policy_logprobs.sum()
        torch.autograd.grad(loss, list(policy.adapter.parameters()), allow_unused=True)
    return probe.numel


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_no_tensor_has_tokens_times_tokens_numbers(mode: tuple[str, int | None]) -> None:
    # The widest is a token's logits, 29, or its keys repeated over the heads, 16, or its 24 of the MLP.
    assert largest(full_policy(), 400, mode) <= 403 * VOCAB < 400 * 400 / 8


def test_nor_has_a_first_stretch_before_any_eviction() -> None:
    policy = full_policy().with_cache(EvictionSchedule(400, 100))
    assert largest(policy, 400, ("chain", None)) <= 403 * VOCAB


def test_a_stretch_that_is_watched_makes_probabilities_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from pte.method import observe

    monkeypatch.setattr(observe, "PROBABILITIES_PER_CHUNK", 4 * 408 * 5)
    policy = full_policy(eviction=HeavyHitters(0)).with_cache(EvictionSchedule(400, 4))
    assert largest(policy, 405, ("chain", None)) <= 408 * VOCAB


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_memory_grows_by_a_layer_s_input_and_one_layer_s_activations(mode: tuple[str, int | None]) -> None:
    def peak(layers: int, tokens: int) -> int:
        base = tiny_base(dtype=torch.float32, max_position_embeddings=4096, layers=layers)
        policy = tiny_policy(base=base, dtype=torch.float32, window=None, kind="lora")
        batch = long_batch(tokens)
        with LiveBytes() as probe:
            loss = Replay(policy, gradient_mode=mode[0], horizon=mode[1])(batch).policy_logprobs.sum()
            torch.autograd.grad(loss, list(policy.adapter.parameters()))
        return probe.peak

    grown = {layers: (peak(layers, 600) - peak(layers, 300)) / 300 for layers in (2, 6)}
    # Of every further layer its input (16 numbers), its keys and values (2 x 8, stacked beside the ones in the graph).
    assert (grown[6] - grown[2]) / 4 < 4 * (16 + 2 * 16) + 32
    assert peak(2, 1200) - peak(2, 600) < 2.1 * (peak(2, 600) - peak(2, 300))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
@pytest.mark.parametrize("kind", ["thought", "lora"])
def test_layers_that_are_computed_again_have_the_gradient_of_one_graph(kind: str, mode: tuple[str, int | None]) -> None:
    policy = full_policy(dtype=torch.float64, kind=kind)
    prompts, completions = [(3, 4, 5, 6), (7,), (8, 9)], [(4,) * 3, tuple(range(3, 24)), (5,)]
    batch = collate(prompts, completions, stream_seeds=range(3), temperature=0.7)
    ours = Replay(policy, gradient_mode=mode[0], horizon=mode[1])(batch).policy_logprobs
    # A window that is never full: the same policy, whose stretch is differentiated as one graph.
    window = Replay(policy.with_cache(EvictionSchedule(64, 16)))(batch).policy_logprobs
    torch.testing.assert_close(ours, window, rtol=0, atol=1e-12)
    parameters = list(policy.adapter.parameters())
    found, expected = (
        torch.autograd.grad(logprobs.exp().square().sum(), parameters, allow_unused=True) for logprobs in (ours, window)
    )
    for (name, _), mine, theirs in zip(policy.adapter.named_parameters(), found, expected, strict=True):
        if theirs is None or not theirs.any():
            assert mine is None or not mine.any(), name
        else:
            assert (mine - theirs).abs().max() <= 1e-10 * theirs.abs().max(), name
