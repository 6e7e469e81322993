"""The whole server, asked by the official client over a real connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest
import torch

from pte.model.policy import attach_adapter, detach_adapter
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest
from pte.rollout.sampling import stream_seed
from pte.serve.models import ServedModels
from served import PROMPT, Served, limits, reasoner, serving

pytestmark = pytest.mark.system

PROBLEMS = [PROMPT, "A1 B2 #1 C A B ? C", "D7 #1 E D D #2 F E D ? F", "Q9 R1 #1 S Q R #2 T S R #3 U T Q ? U"]
TOKENS = 28
"""Enough for the answer to a short problem and for ten evictions; long ones are cut off."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The base and two adapters, eight slots each."""
    with serving(reasoner(tmp_path_factory.mktemp("served"), adapters=("one", "two"))) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ServedModels:
    """The same models once more, which no server runs."""
    return reasoner(tmp_path_factory.mktemp("reference"), adapters=("one", "two"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One slot, one place to wait, and completions that only end after 1500 tokens."""
    models = reasoner(tmp_path_factory.mktemp("small"), room=limits(slots=1, max_queue=1, new=1500, top=0))
    with serving(replace(models, stop_token_ids=())) as running:
        yield running


def rollouts(models: ServedModels, name: str, wanted: list[tuple[str, int, float]]) -> list[Rollout]:
    """Completions of (prompt, seed, temperature) by a closed run of an engine."""
    policy = list(models.policies.values())[("base", "one", "two").index(name)]
    if policy.adapter is not None:
        attach_adapter(policy.base, policy.adapter)
    engine = RolloutEngine(policy, slots=8, max_new_tokens=64, temperature=1.0, stop_token_ids=models.stop_token_ids)
    requests = [
        RolloutRequest(
            tuple(models.tokenizer(text)["input_ids"]), stream_seed(seed, 0), TOKENS, temperature=temperature
        )
        for text, seed, temperature in wanted
    ]
    try:
        return engine.run(requests)
    finally:
        detach_adapter(policy.base)


def shown(models: ServedModels, rollout: Rollout) -> str:
    """A completion as text that goes on with its prompt's."""
    return " " + models.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)


def name_of(served: Served, name: str) -> str:
    return served.base if name == "base" else name


@pytest.mark.parametrize("name", ["base", "one", "two"])
def test_a_completion_is_the_rollout_of_its_seed(served: Served, reference: ServedModels, name: str) -> None:
    wanted = [(PROBLEMS[0], 5, 1.0), (PROBLEMS[1], 6, 0.0), (PROBLEMS[2], 7, 0.6)]
    client = served.client()
    for (text, seed, temperature), rollout in zip(wanted, rollouts(reference, name, wanted), strict=True):
        answer = client.completions.create(
            model=name_of(served, name), prompt=text, seed=seed, temperature=temperature, max_tokens=TOKENS, logprobs=2
        )
        choice = answer.choices[0]
        assert choice.text == shown(reference, rollout) and choice.finish_reason == rollout.finish_reason
        drawn = len(rollout.completion_ids)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(rollout.prompt_ids), drawn)
        # The end token has no text and no entry.
        told = torch.tensor(choice.logprobs.token_logprobs)
        expected = rollout.rollout_logprobs[: drawn - (rollout.finish_reason == "stop")]
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-4)
        assert "".join(choice.logprobs.tokens) == choice.text
        for token, logprob, top, offset in zip(
            choice.logprobs.tokens,
            choice.logprobs.token_logprobs,
            choice.logprobs.top_logprobs,
            choice.logprobs.text_offset,
            strict=True,
        ):
            assert choice.text[offset:].startswith(token)
            assert top[token] == logprob and 2 <= len(top) <= 3
            assert temperature != 0 or max(top, key=top.__getitem__) == token


@pytest.mark.parametrize("options", [{}, {"temperature": 0, "stop": ["=>", "#2"]}, {"logprobs": 3, "n": 3}])
def test_a_stream_says_what_the_whole_answer_says(served: Served, options: dict[str, object]) -> None:
    client = served.client()
    asked = {"model": "one", "prompt": PROBLEMS[:2], "seed": 11, "max_tokens": 30, **options}
    whole = client.completions.create(**asked)
    texts, tokens, ends = {}, {}, {}
    *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        (choice,) = chunk.choices
        assert chunk.usage is None and choice.index not in ends
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        if choice.logprobs is not None:
            tokens.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs)
        if choice.finish_reason is not None:
            ends[choice.index] = choice.finish_reason
    assert last.choices == [] and last.usage == whole.usage
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [ends[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    if "logprobs" in options:
        assert [tokens[one.index] for one in whole.choices] == [one.logprobs.token_logprobs for one in whole.choices]
        assert len({choice.text for choice in whole.choices}) > 2


def test_a_stop_string_of_several_tokens_ends_a_completion_before_it(served: Served) -> None:
    client = served.client()
    asked = {"model": served.base, "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    free = client.completions.create(**asked).choices[0].text
    words = free.split(" ")
    stop = " ".join(words[6:9])
    assert len(words) > 12
    for stream in (False, True):
        answer = client.completions.create(**asked, stop=[stop, "nowhere"], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == free[: free.index(stop)]
        assert choices[-1].finish_reason == "stop"
    served.settle()


def test_a_chat_is_its_template_s_prompt_completed(served: Served) -> None:
    client = served.client()
    messages = [{"role": "user", "content": PROMPT}]
    asked = {"model": "two", "messages": messages, "seed": 3, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    # The template writes "<bos> PROBLEM", which is what the tokenizer makes of the problem as a prompt.
    plain = client.completions.create(model="two", prompt=PROMPT, seed=3, max_tokens=24, logprobs=2).choices[0]
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == plain.text.removeprefix(" ")
    assert choice.finish_reason == plain.finish_reason
    told = choice.logprobs.content
    assert [one.logprob for one in told] == plain.logprobs.token_logprobs
    assert all(bytes(one.bytes).decode() == one.token and len(one.top_logprobs) == 2 for one in told)
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason == choice.finish_reason
    assert "".join(one.delta.content or "" for one in deltas) == choice.message.content


def test_models_can_be_listed_and_looked_up(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == [served.base, "one", "two"]
    assert client.models.retrieve("one").id == "one" and client.models.retrieve(served.base).id == served.base
    with pytest.raises(openai.NotFoundError, match="the model 'three' does not exist here; use one of"):
        client.models.retrieve("three")


async def streamed(client: openai.AsyncOpenAI, model: str, text: str, seed: int) -> str:
    stream = await client.completions.create(model=model, prompt=text, seed=seed, max_tokens=TOKENS, stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream])


def test_64_streams_at_once_are_all_right_and_take_no_more_memory(served: Served, reference: ServedModels) -> None:
    worker = served.house.worker
    buffers = worker.lanes["one"].engine.buffers

    def held() -> list[tuple[int, int]]:
        tensors = [*vars(buffers).values(), *vars(buffers.cache).values()]
        return [(one.data_ptr(), one.nbytes) for one in tensors if isinstance(one, torch.Tensor)]

    async def all_at_once() -> list[str]:
        async with served.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(streamed(client, "one", text, seed) for text, seed, _ in wanted))

    wanted = [(PROBLEMS[index % 4], index, 1.0) for index in range(64)]
    before, cache_bytes = held(), worker.cache_bytes
    texts = asyncio.run(all_at_once())
    assert texts == [shown(reference, rollout) for rollout in rollouts(reference, "one", wanted)]
    assert held() == before and worker.cache_bytes == cache_bytes
    served.settle()
    engine = worker.lanes["one"].engine
    assert engine.free_rows == 8 and not engine.reader.prefilled and not engine.reader.waiting
    assert not served.house.calls


def test_a_server_takes_the_bytes_that_the_formula_says(served: Served) -> None:
    # 3 models x 8 slots x (48 prompt + 8 window) tokens x (K and V x 3 layers x 2 heads x 32 numbers x 4 bytes).
    assert served.house.worker.cache_bytes == 3 * 8 * (48 + 8) * (2 * 3 * 2 * 32 * 4)
    # A state and what is read of it: 8 slots x 3 layers x rank^2 float32. The record: 65 columns of tokens, log-probs,
    # random numbers, and 5 likely tokens with their log-probs.
    for name, rank in (("one", 3), ("two", 4)):
        buffers = served.house.worker.lanes[name].engine.buffers
        assert buffers.states.nbytes + buffers.reads.nbytes == 2 * 8 * 3 * rank**2 * 4
        record = (buffers.tokens, buffers.logprobs, buffers.uniforms, buffers.top_ids, buffers.top_logprobs)
        assert sum(one.nbytes for one in record) == 8 * 65 * (16 + 12 * 5)
    status, health, _ = served.ask("GET", "/health")
    assert (status, health["status"], health["cache_bytes"]) == (200, "ok", served.house.worker.cache_bytes)
    assert health["models"]["two"] == {"running": 0, "waiting": 0}


def test_two_adapters_at_once_give_what_each_gives_alone(served: Served, reference: ServedModels) -> None:
    wanted = [(PROBLEMS[index % 4], 100 + index, 1.0) for index in range(6)]
    names = ("one", "base", "two")

    async def together() -> list[str]:
        async with served.client(openai.AsyncOpenAI) as client:
            asked = [(name, text, seed) for text, seed, _ in wanted for name in names]
            return await asyncio.gather(*(streamed(client, name_of(served, name), *rest) for name, *rest in asked))

    texts = asyncio.run(together())
    for place, name in enumerate(names):
        expected = [shown(reference, rollout) for rollout in rollouts(reference, name, wanted)]
        assert texts[place::3] == expected
    assert texts[0::3] != texts[2::3] != texts[1::3]


ASKED = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(small: Served, stream: bool) -> None:
    engine = small.house.worker.lanes[small.base].engine
    before = engine.decode_steps
    connection = small.send("POST", "/v1/completions", {"model": small.base, "stream": stream, **ASKED})
    small.wait_until(lambda: engine.decode_steps > before + 2)
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    connection.close()
    small.settle()
    assert engine.free_rows == 1 and engine.decode_steps < before + 1499


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(small: Served) -> None:
    running = small.send("POST", "/v1/completions", {"model": small.base, "stream": True, **ASKED})
    lane = small.house.worker.lanes[small.base]
    small.wait_until(lambda: len(lane.running) == 1)
    waiting = small.send("POST", "/v1/completions", {"model": small.base, "stream": True, **ASKED})
    small.wait_until(lambda: len(lane.waiting) == 1)
    waiting.close()
    small.wait_until(lambda: not lane.waiting)
    assert len(lane.running) == 1
    running.close()
    small.settle()


def test_past_the_queue_the_answer_is_503_and_when_to_come_again(small: Served) -> None:
    held = [small.send("POST", "/v1/completions", {"model": small.base, "stream": True, **ASKED}) for _ in range(2)]
    small.wait_until(lambda: small.house.worker.sequences == 2)
    with pytest.raises(openai.InternalServerError) as caught:
        small.client().completions.create(model=small.base, prompt=PROMPT)
    error = caught.value
    assert (error.status_code, error.code, error.type) == (503, "server_busy", "server_error")
    assert error.response.headers["retry-after"] == "1"
    assert "the model is busy: 1 sequences run and 1 may wait, and 1 more do not fit" in str(error)
    for connection in held:
        connection.close()
    small.settle()
    assert small.client().completions.create(model=small.base, prompt=PROMPT).choices[0].finish_reason == "length"


def test_an_engine_that_fails_says_so_to_everybody(small: Served, tmp_path_factory: pytest.TempPathFactory) -> None:
    failures: list[bool] = []
    with serving(small.house.models) as other:
        other.house.on_failure = lambda: failures.append(True)
        lane = other.house.worker.lanes[other.base]
        connection = other.send("POST", "/v1/completions", {"model": other.base, "stream": True, **ASKED})
        response = connection.getresponse()
        response.readline()
        # A buffer of another size is what a step cannot work with.
        lane.engine.buffers.current = torch.zeros(5, dtype=torch.int64)
        events = [json.loads(line[6:]) for line in response.read().splitlines() if line.startswith(b"data: {")]
        assert events[-1]["error"]["type"] == "server_error" and "engine has failed" in events[-1]["error"]["message"]
        other.wait_until(lambda: bool(failures))
        assert other.ask("GET", "/health")[:1] == (503,)
        status, answer, _ = other.ask("POST", "/v1/completions", {"model": other.base, "prompt": PROMPT})
        assert status == 503 and "engine has failed" in answer["error"]["message"]


MALFORMED = [
    ("POST", "/v1/completions", b"{", 400, None),
    ("POST", "/v1/completions", b"[]", 400, None),
    ("POST", "/v1/completions", {"prompt": "A3"}, 400, None),
    ("POST", "/v1/completions", {"model": "three", "prompt": "A3"}, 404, "model_not_found"),
    ("POST", "/v1/completions", {"model": "\ud800", "prompt": "A3"}, 404, "model_not_found"),
    ("POST", "/v1/completions", {"model": "one", "prompt": "A3", "\ud800": 1}, 400, "unknown_parameter"),
    ("POST", "/v1/completions", {"model": "one", "prompt": "A3", "top_p": 0.5}, 400, "unsupported_parameter"),
    ("POST", "/v1/completions", {"model": "one", "prompt": [5] * 49}, 400, "context_length_exceeded"),
    ("POST", "/v1/completions", b" " * (2**24 + 1), 413, None),
    ("POST", "/v1/chat/completions", {"model": "one", "messages": "hi"}, 400, None),
    ("GET", "/v1/completions", None, 405, "unknown_url"),
    ("POST", "/v1/embeddings", {"model": "one", "input": "x"}, 404, "unknown_url"),
    ("GET", "/", None, 404, "unknown_url"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), MALFORMED)
def test_a_malformed_request_gets_an_error_of_the_api_s_form(
    served: Served, method: str, path: str, body: object, status: int, code: str | None
) -> None:
    got, answer, _ = served.ask(method, path, body)
    assert got == status and answer.keys() == {"error"}
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code) and error["message"]
    assert not served.house.worker.sequences


def test_the_client_sees_its_own_mistakes_as_its_own_errors(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="one", messages=[{"role": "user", "content": "A3"}], logit_bias={"5": 1})
    assert caught.value.param == "logit_bias" and "must be the one that scores" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="three", prompt="A3")


def test_without_the_key_only_the_health_is_told(small: Served) -> None:
    with serving(small.house.models, key="secret") as other:
        assert [model.id for model in other.client().models.list()] == [other.base]
        other.key = "secreT"
        with pytest.raises(openai.AuthenticationError) as caught:
            other.client().completions.create(model=other.base, prompt=PROMPT)
        assert caught.value.code == "invalid_api_key"
        for given in ("", "Bearer", "Bearer ", "Basic secret", "secret", "Bearer sécret"):
            status, answer, headers = other.ask("GET", "/v1/models", Authorization=given.encode().decode("latin-1"))
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert headers["www-authenticate"] == "Bearer"
        assert other.ask("GET", "/v1/models", Authorization="bearer secret")[0] == 200
        assert other.ask("GET", "/health", Authorization="")[0] == 200
