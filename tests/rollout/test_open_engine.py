"""The open engine: requests that come and go while others run get what each gets alone."""

from __future__ import annotations

import pytest
import torch

from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest
from pte.rollout.sequences import NewTokens
from sampled import SETTINGS, requests_for, sample
from tiny import random_sequences, tiny_policy

PROMPTS = random_sequences(9, prompt=(1, 9), seed=5)[0]
TEMPERATURES = (1.0, 0.0, 0.7)


def mixed_requests(most: int = 24) -> list[RolloutRequest]:
    """Every request has a temperature and a limit of its own; limits are 1, 4, 7, ... tokens."""
    return [
        RolloutRequest(prompt, 40 + index, max_new_tokens=min(most, 1 + 3 * index), temperature=TEMPERATURES[index % 3])
        for index, prompt in enumerate(PROMPTS)
    ]


class Opened:
    """An open engine and what it has handed over."""

    def __init__(self, policy: object, *, rows: int = 3, top_logprobs: int = 0, stop: tuple[int, ...] = (3, 4)) -> None:
        self.engine = RolloutEngine(policy, slots=rows, max_new_tokens=30, temperature=1.0, stop_token_ids=stop)
        self.rollouts: dict[int, Rollout] = {}
        self.tokens: dict[int, list[NewTokens]] = {}
        self.engine.open(
            rows=rows,
            prompt_slots=12,
            on_finish=self.rollouts.__setitem__,
            on_tokens=lambda new: self.tokens.setdefault(new.order, []).append(new),
            top_logprobs=top_logprobs,
            own_temperatures=True,
        )

    def work(self, steps: int = 1000) -> None:
        """Some steps, or all there are."""
        for _ in range(steps):
            self.engine.refill()
            if not self.engine.busy:
                return
            self.engine.step()


def alone(policy: object, request: RolloutRequest, *, stop: tuple[int, ...] = (3, 4)) -> Rollout:
    """The same request as the only one of a closed run."""
    plain = RolloutRequest(request.prompt_ids, request.stream_seed)
    options = {"max_new_tokens": request.max_new_tokens, "temperature": request.temperature}
    (rollout,) = sample(policy, [plain], slots=1, stop=stop, **options)
    return rollout


@pytest.mark.parametrize("look_every_tokens", [1, 5])
@pytest.mark.parametrize("setting", ["thought", "no adapter", "random eviction", "h2o", "rkv", "full cache"])
def test_requests_that_come_and_go_get_what_each_gets_alone(setting: str, look_every_tokens: int) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    requests = mixed_requests()
    opened = Opened(policy)
    opened.engine.look_every_tokens = look_every_tokens
    orders = [opened.engine.submit(request) for request in requests[:5]]
    opened.work(2)
    lost = opened.engine.submit(RolloutRequest((5, 6), 1, max_new_tokens=30, temperature=1.0))
    orders += [opened.engine.submit(request) for request in requests[5:]]
    opened.work(3)
    opened.engine.cancel(lost)
    opened.work()
    assert orders == [0, 1, 2, 3, 4, 6, 7, 8, 9] and opened.rollouts.keys() >= set(orders)
    for order, request in zip(orders, requests, strict=True):
        mine, expected = opened.rollouts[order], alone(policy, request)
        assert mine.completion_ids == expected.completion_ids and mine.finish_reason == expected.finish_reason
        assert mine.temperature == request.temperature and mine.evictions == expected.evictions
        torch.testing.assert_close(mine.rollout_logprobs, expected.rollout_logprobs, rtol=0, atol=1e-12)
        assert mine.state_norm == pytest.approx(expected.state_norm, rel=1e-6)


@pytest.mark.parametrize("look_every_tokens", [1, 4])
def test_tokens_come_as_they_are_drawn_and_each_comes_once(look_every_tokens: int) -> None:
    opened = Opened(tiny_policy(), rows=2)
    opened.engine.look_every_tokens = look_every_tokens
    for request in mixed_requests():
        opened.engine.submit(request)
    opened.work()
    for order, rollout in opened.rollouts.items():
        parts = opened.tokens[order]
        assert all(0 < len(part.token_ids) <= look_every_tokens for part in parts)
        assert tuple(token for part in parts for token in part.token_ids) == rollout.completion_ids
        assert [one for part in parts for one in part.logprobs] == rollout.rollout_logprobs.tolist()


def test_the_likeliest_tokens_are_those_of_the_model() -> None:
    # Without adapter and window the policy is the base: its own forward over the whole text says what was likely.
    policy = tiny_policy(kind=None, window=None)
    opened = Opened(policy, rows=2, top_logprobs=4, stop=())
    for index, temperature in enumerate(TEMPERATURES):
        opened.engine.submit(RolloutRequest(PROMPTS[index], index, max_new_tokens=11, temperature=temperature))
    opened.work()
    for order, temperature in enumerate(TEMPERATURES):
        rollout = opened.rollouts[order]
        whole = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            logits = policy.base(whole).logits[0, len(rollout.prompt_ids) - 1 : -1]
        likely = (logits / (temperature or 1)).log_softmax(-1).topk(4)
        told = opened.tokens[order]
        assert [top for part in told for top in part.top_ids] == [tuple(row) for row in likely.indices.tolist()]
        logprobs = torch.tensor([top for part in told for top in part.top_logprobs], dtype=torch.float64)
        torch.testing.assert_close(logprobs, likely.values, rtol=0, atol=1e-9)


def test_one_temperature_asked_for_by_every_request_is_that_of_an_engine_bit_for_bit() -> None:
    policy = tiny_policy(dtype=torch.float32)
    for temperature in TEMPERATURES:
        own = [RolloutRequest(prompt, index, temperature=temperature) for index, prompt in enumerate(PROMPTS)]
        plain = [RolloutRequest(prompt, index) for index, prompt in enumerate(PROMPTS)]
        for mine, theirs in zip(
            sample(policy, own, temperature=1.3), sample(policy, plain, temperature=temperature), strict=True
        ):
            assert mine.completion_ids == theirs.completion_ids and mine.temperature == theirs.temperature
            assert torch.equal(mine.rollout_logprobs, theirs.rollout_logprobs)


def test_a_cancelled_request_frees_its_row_and_is_never_heard_of_again() -> None:
    opened = Opened(tiny_policy(), rows=2, stop=())
    first, second, third = (opened.engine.submit(RolloutRequest((5, 6), seed)) for seed in range(3))
    assert opened.engine.free_rows == 0
    opened.work(2)
    seen = len(opened.tokens[first])
    opened.engine.cancel(first)
    opened.engine.cancel(third)
    assert opened.engine.free_rows == 1 and not opened.engine.reader.waiting
    opened.work()
    opened.engine.cancel(second)
    assert opened.rollouts.keys() == {second} and len(opened.tokens[first]) == seen and third not in opened.tokens


def test_a_request_cancelled_by_its_own_last_tokens_does_not_finish() -> None:
    opened = Opened(tiny_policy(), rows=1, stop=())
    opened.engine.on_tokens = lambda new: opened.engine.cancel(new.order)
    opened.engine.submit(RolloutRequest((5, 6), 0, max_new_tokens=1))
    opened.work()
    assert not opened.rollouts and opened.engine.free_rows == 1


def test_what_one_request_s_tokens_cancel_is_not_heard_of_at_the_same_look() -> None:
    opened = Opened(tiny_policy(), rows=2, stop=())
    opened.engine.look_every_tokens = 8
    first, second = (opened.engine.submit(RolloutRequest((5, 6), seed)) for seed in range(2))
    heard: list[int] = []

    def on_tokens(new: NewTokens) -> None:
        heard.append(new.order)
        opened.engine.cancel(second)

    opened.engine.on_tokens = on_tokens
    opened.work()
    assert set(heard) == {first} == opened.rollouts.keys()


def test_an_open_engine_takes_no_more_memory_however_many_requests_pass() -> None:
    opened = Opened(tiny_policy(), rows=2, top_logprobs=3)

    def held() -> list[tuple[int, int]]:
        buffers = opened.engine.buffers
        tensors = [*vars(buffers).values(), *vars(buffers.cache).values()]
        return [(one.data_ptr(), one.nbytes) for one in tensors if isinstance(one, torch.Tensor)]

    before = held()
    for _ in range(3):
        for request in mixed_requests():
            opened.engine.submit(request)
        opened.work()
    assert held() == before and len(opened.rollouts) == 27
    assert not opened.engine.reader.prefilled and not opened.engine.reader.waiting
    opened.engine.close()
    assert not [name for name, value in vars(opened.engine).items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (RolloutRequest((5,) * 13, 0), "a prompt must have at most 12 tokens, got 13; shorten it"),
        (RolloutRequest((5,), 0, max_new_tokens=31), "max_new_tokens must be at most the engine's (30), got 31; lower"),
    ],
)
def test_a_request_without_room_is_refused(request_: RolloutRequest, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Opened(tiny_policy(kind=None)).engine.submit(request_)
    assert str(caught.value).startswith(text)


def test_a_request_s_own_temperature_needs_an_engine_that_was_opened_for_it() -> None:
    engine = RolloutEngine(tiny_policy(kind=None), slots=1, max_new_tokens=4, temperature=1.0, stop_token_ids=())
    engine.open(rows=1, prompt_slots=4, on_finish=lambda order, rollout: None)
    with pytest.raises(ValueError, match="temperature must be left to the engine, got 0.5; open it with own_temp"):
        engine.submit(RolloutRequest((5,), 0, temperature=0.5))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0; use for example 64"),
        ({"temperature": 5e-5}, "temperature must be 0 (greedy) or at least 0.0001, got 5e-05; use for example 1.0"),
        ({"temperature": -1.0}, "temperature must be 0 (greedy) or at least 0.0001, got -1.0; use for example 1.0"),
    ],
)
def test_a_request_that_cannot_be_is_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        RolloutRequest((5,), 0, **options)
    assert str(caught.value) == text


def test_an_open_engine_is_opened_once_and_a_failed_opening_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RolloutEngine(tiny_policy(), slots=2, max_new_tokens=6, temperature=1.0, stop_token_ids=())
    request = requests_for([(5, 6, 7)])[0]
    with pytest.raises(RuntimeError, match="this one is closed; call open first"):
        engine.submit(request)
    found: list[object] = []
    engine.open(rows=1, prompt_slots=3, on_finish=lambda order, rollout: found.append(rollout))
    engine.submit(request)
    with pytest.raises(RuntimeError, match="this one is open; call close first"):
        engine.run([request])
    engine.refill()
    while engine.busy:
        engine.step()
    assert len(found) == 1, "the open session went on"
    engine.close()

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("pte.rollout.generate.decode_forward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.run([request])
    assert not engine.opened and not any(isinstance(value, torch.Tensor) for value in vars(engine).values())


def test_a_prompt_that_waits_holds_its_own_keys_and_values_alone() -> None:
    engine = RolloutEngine(tiny_policy(), slots=1, max_new_tokens=4, temperature=1.0, stop_token_ids=())
    engine.open(rows=1, prompt_slots=4, on_finish=lambda order, rollout: None)
    prompts = [(5, 6, 7, 8), (9,), (10,)]
    for prompt in prompts:
        engine.reader.expect(prompt)
    engine.reader.read(prompts)
    for prompt in prompts:
        held = engine.reader.prefilled[prompt]
        assert held.keys.untyped_storage().nbytes() == held.keys.nbytes
        assert held.keys.shape[2] == len(prompt)
    engine.close()
