"""One distribution samples and scores; one stream per sequence draws from it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.rollout.sampling import LEAST_TEMPERATURE, draw_tokens, stream_seed, stream_uniforms, token_logprobs

JUST_BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()


def random_logits(vocab: int, *, seed: int = 0, rows: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution_that_scores(temperature: float) -> None:
    logits = random_logits(11)
    probabilities = (logits / temperature).softmax(-1)[0]
    logprobs = token_logprobs(logits, temperature)
    torch.testing.assert_close(logprobs.exp()[0], probabilities, rtol=0, atol=1e-12)
    count = 40000
    drawn = draw_tokens(logprobs.expand(count, -1), stream_uniforms(3, count), greedy=False)
    counts = torch.bincount(drawn, minlength=11)
    chi_square = ((counts - count * probabilities).square() / (count * probabilities)).sum()
    # Ten degrees of freedom: beyond 29.6 in one of a thousand.
    assert chi_square < 29.6


def test_uniform_numbers_are_cut_into_intervals_of_exactly_the_probabilities() -> None:
    # Probabilities 1/8, 1/2, 0, 1/4, 1/8: a grid of 16 numbers falls as 2, 8, 0, 4, 2.
    logprobs = torch.tensor([[0.125, 0.5, 0.0, 0.25, 0.125]], dtype=torch.float64).log()
    grid = (torch.arange(16) + 0.5) / 16
    drawn = draw_tokens(logprobs.expand(16, -1), grid, greedy=False)
    assert drawn.tolist() == [0] * 2 + [1] * 8 + [3] * 4 + [4] * 2


@given(st.integers(2, 40), st.integers(0, 10**6), st.floats(0, JUST_BELOW_ONE, width=32))
def test_a_draw_is_the_token_whose_interval_holds_the_number(vocab: int, seed: int, uniform: float) -> None:
    logprobs = token_logprobs(random_logits(vocab, seed=seed), 1.0)
    token = draw_tokens(logprobs, torch.tensor([uniform]), greedy=False).item()
    cumulative = [0.0, *logprobs.exp()[0].cumsum(0).tolist()]
    assert cumulative[token] <= uniform + 1e-12 and uniform <= cumulative[token + 1] + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 1e-8, 0.3, JUST_BELOW_ONE])
def test_tokens_of_no_probability_are_never_drawn(uniform: float, dtype: torch.dtype) -> None:
    # At both ends and in between: a uniform number of 0 must pass the first ones, one just below 1 must stop early.
    for possible in ([2], [1, 4], [3, 5]):
        logits = torch.full((1, 8), -math.inf, dtype=dtype)
        logits[0, possible] = torch.linspace(0, 1, len(possible), dtype=dtype)
        token = draw_tokens(token_logprobs(logits, 1.0), torch.tensor([uniform]), greedy=False).item()
        assert token in possible


def test_every_draw_of_a_wide_float32_vocabulary_is_a_token_of_it() -> None:
    # Cumulated float32 probabilities do not end at 1: the last number must not fall off.
    logprobs = token_logprobs(random_logits(50000, rows=4, dtype=torch.float32), 1.0)
    drawn = draw_tokens(logprobs, torch.tensor([0.0, JUST_BELOW_ONE, JUST_BELOW_ONE, 0.5]), greedy=False)
    assert drawn.min() >= 0 and drawn.max() < 50000
    assert (logprobs.gather(1, drawn[:, None]) > -30).all()


def test_greedy_takes_the_likeliest_whatever_the_numbers_are() -> None:
    logits = random_logits(9, rows=5)
    for uniform in (0.0, JUST_BELOW_ONE):
        drawn = draw_tokens(token_logprobs(logits, 0), torch.full((5,), uniform), greedy=True)
        assert drawn.tolist() == logits.argmax(-1).tolist()


def test_temperature_zero_scores_as_temperature_one() -> None:
    logits = random_logits(9)
    assert torch.equal(token_logprobs(logits, 0), token_logprobs(logits, 1.0))


def test_the_coldest_temperature_draws_the_likeliest_token_of_any_logits() -> None:
    # Logits of any real model are far below 1e4; float32 holds them divided by the least temperature.
    logits = torch.tensor([[1e4, -1e4, 9999.9, 0.0]], dtype=torch.float32)
    for temperature in (LEAST_TEMPERATURE, torch.tensor([LEAST_TEMPERATURE])):
        logprobs = token_logprobs(logits, temperature)
        assert logprobs.isfinite().all()
        for uniform in (0.0, 0.5, JUST_BELOW_ONE):
            assert draw_tokens(logprobs, torch.tensor([uniform]), greedy=False).tolist() == [0]


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = random_logits(9, dtype=torch.bfloat16)
    assert token_logprobs(logits, 0.7).dtype == torch.float32
    torch.testing.assert_close(token_logprobs(logits, 0.7), torch.log_softmax(logits.float() / 0.7, -1), rtol=0, atol=0)
    assert token_logprobs(random_logits(9), 0.7).dtype == torch.float64


def test_streams_are_their_own_and_a_longer_one_goes_on() -> None:
    long = stream_uniforms(7, 100)
    assert torch.equal(stream_uniforms(7, 40), long[:40])
    assert not torch.equal(stream_uniforms(8, 100), long)
    assert long.min() >= 0 and long.max() < 1
    before = torch.random.get_rng_state()
    stream_uniforms(9, 10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_are_fixed_for_ever_and_parts_are_not_glued_together() -> None:
    # The first bytes of BLAKE2b; a change here would change every recorded run.
    assert stream_seed(1, 2, "gsm8k-17", 3) == 3791109881048165196
    assert len({stream_seed("a", "bc"), stream_seed("ab", "c"), stream_seed("abc"), stream_seed("bc", "a")}) == 4
    seeds = [stream_seed(0, step, sample) for step in range(40) for sample in range(25)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
