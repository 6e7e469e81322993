"""Law 8: cache bytes are the formula's, and no peak grows with the completion beyond what its mode keeps."""

import pytest
import torch

from live_bytes import LiveBytes
from pte.method.cache import analytic_bytes
from pte.model.policy import BoundedPolicy
from pte.rollout.generate import RolloutEngine
from pte.rollout.gradients import group_stretches
from pte.rollout.record import RolloutRequest, collate
from pte.rollout.replay import Replay
from tiny import VOCAB, tiny_base, tiny_policy

pytestmark = pytest.mark.system

# Wide keys, so that a token kept by mistake shows: 2 x 2 layers x 32 numbers x 4 bytes = 512 bytes.
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32, "max_position_embeddings": 4096}
KV_BYTES = 512
# Log-probs, entropies, token ids, masks and what a loss makes of them: numbers per token, not vectors.
BOOKKEEPING_BYTES = 100


def wide_policy(**options: object) -> BoundedPolicy:
    options = {"targets": ("q_proj", "v_proj", "down_proj"), **options}
    policy = tiny_policy(base=tiny_base(dtype=torch.float32, **WIDE), dtype=torch.float32, **options)
    assert policy.cache_shape.token_bytes(torch.float32) == KV_BYTES
    return policy


def replay_peak(policy: BoundedPolicy, tokens: int, *, rows: int = 2, **mode: object) -> int:
    """Most bytes alive at once during a forward and a backward of the replay."""
    generator = torch.Generator().manual_seed(1)
    completions = [tuple(torch.randint(3, VOCAB, (tokens,), generator=generator).tolist()) for _ in range(rows)]
    batch = collate([(3, 4, 5)] * rows, completions, stream_seeds=range(rows), temperature=1.0)
    parameters = list(policy.adapter.parameters())
    with LiveBytes() as probe:
        loss = Replay(policy, **mode)(batch).policy_logprobs.sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    return probe.peak


def growth_per_token(policy: BoundedPolicy, *, rows: int = 2, short: int = 26, long: int = 90, **mode: object) -> float:
    grown = replay_peak(policy, long, rows=rows, **mode) - replay_peak(policy, short, rows=rows, **mode)
    return grown / (rows * (long - short))


def test_the_probe_counts_what_is_alive() -> None:
    with LiveBytes() as probe:
        kept = torch.ones(1000)
        for _ in range(5):
            torch.ones(3000)
        view = kept[:10]
        del kept
    assert probe.live == 4000 and probe.peak == 16000
    del view
    assert probe.live == 0


def test_exact_mode_keeps_everything_so_the_probe_sees_growth() -> None:
    assert growth_per_token(wide_policy(), gradient_mode="exact") > 2 * KV_BYTES


@pytest.mark.parametrize("options", [{}, {"kind": "lora"}, {"kind": "global_only"}], ids=["thought", "lora", "global"])
def test_horizon_mode_does_not_grow_with_the_completion(options: dict[str, object]) -> None:
    assert growth_per_token(wide_policy(**options), gradient_mode="horizon", horizon=2) < BOOKKEEPING_BYTES


def test_completions_of_one_length_are_not_copied_to_be_sorted() -> None:
    # Log-probs, entropies and the gradient take 15 bytes a token; a second copy of the token ids would add 8.
    assert growth_per_token(wide_policy(), gradient_mode="horizon", horizon=2) <= 16


def test_chain_mode_grows_by_the_evicted_keys_and_values_and_a_few_states() -> None:
    growth = growth_per_token(wide_policy())
    assert KV_BYTES <= growth < 1.1 * KV_BYTES + BOOKKEEPING_BYTES


@pytest.mark.parametrize("kind", ["lora", "global_only"])
def test_chain_mode_without_folds_does_not_grow(kind: str) -> None:
    assert growth_per_token(wide_policy(kind=kind)) < BOOKKEEPING_BYTES


def test_chain_mode_keeps_few_states_even_where_states_are_large() -> None:
    # Rank 16: a state is 2 layers x 256 x 4 = 2048 bytes, keys and values of a stretch 8 x 512 = 4096: half as much.
    # What a group takes while it is walked exists once, so both lengths hold whole groups and a bit.
    policy = wide_policy(rank=16)
    group = 8 * group_stretches(policy)
    assert group == 8 * 100
    growth = growth_per_token(policy, rows=1, short=8 + group + 2, long=8 + 3 * group + 2)
    assert growth < 1.1 * KV_BYTES + BOOKKEEPING_BYTES


def test_a_replay_without_gradients_keeps_nothing() -> None:
    policy = wide_policy()
    batch = {tokens: collate([(3, 4)], [tuple([5] * tokens)], stream_seeds=[0], temperature=1.0) for tokens in (26, 90)}
    peaks = {}
    for tokens in batch:
        with torch.no_grad(), LiveBytes() as probe:
            Replay(policy)(batch[tokens])
        peaks[tokens] = probe.peak
    assert (peaks[90] - peaks[26]) / 64 < BOOKKEEPING_BYTES


def rollout_peak(policy: BoundedPolicy, tokens: int) -> int:
    engine = RolloutEngine(policy, slots=2, max_new_tokens=tokens, temperature=1.0, stop_token_ids=())
    with LiveBytes() as probe:
        engine.run([RolloutRequest((3, 4, 5), seed) for seed in range(2)])
    return probe.peak


def test_a_rollout_under_a_window_does_not_grow_with_the_completion() -> None:
    policy = wide_policy()
    assert (rollout_peak(policy, 64) - rollout_peak(policy, 24)) / (2 * 40) < BOOKKEEPING_BYTES
    # The full cache grows, by keys and values at least: the probe would see it.
    full = wide_policy(window=None, kind=None)
    assert (rollout_peak(full, 64) - rollout_peak(full, 24)) / (2 * 40) > KV_BYTES


@pytest.mark.parametrize("max_new_tokens", [5, 9, 64, 1024])
@pytest.mark.parametrize("window", [8, None])
def test_cache_bytes_are_the_formula_s(max_new_tokens: int, window: int | None) -> None:
    policy = wide_policy(window=window, kind=None)
    # Every token stops: the cache is allocated for the longest completion all the same.
    engine = RolloutEngine(policy, slots=3, max_new_tokens=max_new_tokens, temperature=1.0, stop_token_ids=range(VOCAB))
    prompts = [(3,) * length for length in (2, 7, 4, 1, 5)]
    rollouts = engine.run([RolloutRequest(prompt, seed) for seed, prompt in enumerate(prompts)])
    assert {len(rollout.completion_ids) for rollout in rollouts} == {1}
    # Slots x (longest prompt + window); the last token never enters, and 8 are kept at most under the window.
    kept = max_new_tokens - 1 if window is None else min(window, max_new_tokens - 1)
    assert engine.peak_cache_bytes == 3 * (7 + kept) * KV_BYTES
    assert engine.peak_cache_bytes == analytic_bytes(
        policy.cache_shape, batch=3, prompt_slots=7, window_slots=kept, dtype=torch.float32
    )
