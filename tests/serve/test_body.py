"""What may be asked: defaults, ranges, and every field that nobody would obey refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from pte.model.load import load_tokenizer
from pte.serve.body import REFUSED, CompletionRequest, parse_json, read_chat, read_completion
from pte.serve.errors import ApiError
from pte.serve.prompts import PromptEncoder
from pte.tasks.chained import embedded_model_dir
from served import PROMPT, limits

LIMITS = limits(slots=2, max_queue=3, prompt=16, new=50, top=5)
TOKENIZER = load_tokenizer(embedded_model_dir())
IDS = tuple(TOKENIZER(PROMPT)["input_ids"])
TEMPLATE = (
    "{% for one in messages %}{% if one['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ one['content'] }} {% endfor %}{% if add_generation_prompt %}=>{% endif %}"
)
USER = {"role": "user", "content": "A3 B5"}


@pytest.fixture
def encoder() -> PromptEncoder:
    tokenizer = load_tokenizer(embedded_model_dir())
    tokenizer.chat_template = TEMPLATE
    return PromptEncoder(tokenizer, vocabulary=739, max_prompt_tokens=LIMITS.max_prompt_tokens)


def completion(encoder: PromptEncoder, **fields: object) -> CompletionRequest:
    body = {"model": "m", "prompt": PROMPT, **fields}
    return read_completion(parse_json(json.dumps(body).encode()), limits=LIMITS, encoder=encoder)


def chat(encoder: PromptEncoder, **fields: object) -> CompletionRequest:
    body = {"model": "m", "messages": [USER], **fields}
    return read_chat(parse_json(json.dumps(body).encode()), limits=LIMITS, encoder=encoder)


def test_what_is_left_out_is_what_the_api_says(encoder: PromptEncoder) -> None:
    asked = completion(encoder)
    expected = CompletionRequest("completion", "m", (IDS,), 1, 16, 1.0, asked.seed, (), None, False, False)
    assert asked == expected and completion(encoder).seed != asked.seed
    told = chat(encoder, seed=4)
    prompt = tuple(TOKENIZER("A3 B5 =>", add_special_tokens=False)["input_ids"])
    assert told == replace(expected, kind="chat", prompts=(prompt,), max_new_tokens=50, seed=4)


def test_null_is_left_out(encoder: PromptEncoder) -> None:
    nothing = dict.fromkeys((*REFUSED, "max_tokens", "temperature", "stop", "stream", "stream_options", "logprobs"))
    assert completion(encoder, seed=1, **nothing) == completion(encoder, seed=1)


def test_everything_that_may_be_asked_is_heard(encoder: PromptEncoder) -> None:
    shared = {"n": 5, "temperature": 0, "seed": -3, "stop": ["a", "b"], "stream": True, "user": "me"}
    shared["stream_options"] = {"include_usage": True}
    asked = completion(encoder, max_tokens=50, logprobs=5, **shared)
    assert asked == CompletionRequest("completion", "m", (IDS,), 5, 50, 0.0, -3, ("a", "b"), 5, True, True)
    told = chat(encoder, max_completion_tokens=7, logprobs=True, top_logprobs=2, **shared)
    assert told == replace(asked, kind="chat", prompts=told.prompts, max_new_tokens=7, top_logprobs=2)
    assert chat(encoder, max_tokens=7, max_completion_tokens=7).max_new_tokens == 7
    assert chat(encoder, logprobs=True).top_logprobs == 0 and chat(encoder, logprobs=False).top_logprobs is None
    assert completion(encoder, stop="x").stops == ("x",) and completion(encoder, logprobs=0).top_logprobs == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(PROMPT, (IDS,)), ([PROMPT, PROMPT], (IDS, IDS)), (list(IDS), (IDS,)), ([list(IDS), [1, 2]], (IDS, (1, 2)))],
    ids=["a string", "strings", "tokens", "lists of tokens"],
)
def test_a_prompt_has_the_four_forms_of_the_api(encoder: PromptEncoder, prompt: object, expected: object) -> None:
    assert completion(encoder, prompt=prompt).prompts == expected


def test_a_message_may_come_in_parts_of_text(encoder: PromptEncoder) -> None:
    parts = [{"type": "text", "text": "A3 "}, {"type": "text", "text": "B5"}]
    assert chat(encoder, messages=[{"role": "user", "content": parts}], seed=0) == chat(encoder, seed=0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_nobody_would_obey_is_refused_by_name_and_passes_where_it_asks_for_nothing(
    encoder: PromptEncoder, name: str
) -> None:
    neutral, reason = REFUSED[name]
    for read in (completion, chat):
        for value in neutral:
            assert read(encoder, seed=1, **{name: value}) == read(encoder, seed=1)
        with pytest.raises(ApiError) as caught:
            read(encoder, **{name: "something"})
        assert str(caught.value) == f'{name} is not supported, got "something": {reason}'
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_top_p_is_refused_with_the_law_that_forbids_it(encoder: PromptEncoder) -> None:
    for value in (0.9, True):
        with pytest.raises(ApiError, match="top_p is not supported.*must be the one that scores; leave it out and use"):
            completion(encoder, top_p=value)


REFUSALS = [
    ({"prompt": None}, "prompt", "you must provide prompt, got none; add it"),
    ({"model": None}, "model", "you must provide model, got none; add it"),
    ({"model": 3}, "model", "model must be a string, got 3; write it in quotes"),
    ({"prompt": ""}, "prompt", None),
    ({"prompt": []}, "prompt", "prompt must have at least 1 token, got none; write something"),
    ({"prompt": 7}, "prompt", "prompt must be a string, a list of strings, a list of token ids or a list of such"),
    ({"prompt": [True]}, "prompt", "prompt must be a string, a list of strings, a list of token ids or a list of such"),
    ({"prompt": [739]}, "prompt", "token ids of prompt must be from 0 to 738, got 739; use the tokenizer of this"),
    ({"prompt": [-1]}, "prompt", "token ids of prompt must be from 0 to 738"),
    ({"prompt": [5] * 17}, "prompt", "prompt must have at most 16 tokens on this server, got 17; shorten it"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be from 1 to 50, got 0; use at least 1"),
    ({"max_tokens": 51}, "max_tokens", "max_tokens must be from 1 to 50, got 51; use at most 50"),
    ({"max_tokens": 2.0}, "max_tokens", "max_tokens must be an integer, got 2.0; write for example 16"),
    ({"max_tokens": True}, "max_tokens", "max_tokens must be an integer, got true; write for example 16"),
    ({"temperature": 2.5}, "temperature", "temperature must be from 0.0 to 2.0, got 2.5; write for example 1.0"),
    ({"temperature": -0.1}, "temperature", "temperature must be from 0.0 to 2.0"),
    ({"temperature": 1e-38}, "temperature", "temperature must be 0 (greedy) or at least 0.0001, got 1e-38; write 0"),
    ({"temperature": 9.9e-5}, "temperature", "temperature must be 0 (greedy) or at least 0.0001, got 9.9e-05; write 0"),
    ({"temperature": 10**400}, "temperature", "temperature must be from 0.0 to 2.0, got 1000"),
    ({"temperature": float("inf")}, "temperature", "temperature must be a number, got Infinity"),
    ({"temperature": "hot"}, "temperature", 'temperature must be a number, got "hot"; write for example 1.0'),
    ({"temperature": float("nan")}, "temperature", "temperature must be a number, got NaN"),
    ({"n": 0}, "n", "n must be from 1 to 5, got 0; use at least 1"),
    ({"n": 6}, "n", "n must be from 1 to 5, got 6; use at most 5"),
    ({"prompt": ["A3"] * 6}, "prompt", "prompt must hold at most 5 prompts (slots and queue of this server), got 6;"),
    ({"prompt": [PROMPT] * 3, "n": 2}, "n", "prompts times n must be at most 5 (slots and queue of this server), got"),
    ({"seed": 2**63}, "seed", "seed must be from"),
    ({"stop": list("abcde")}, "stop", "stop must hold at most 4 strings"),
    ({"stop": ""}, "stop", "stop must be a string or a list of strings, none of them empty"),
    ({"stop": [1]}, "stop", "stop must be a string or a list of strings, none of them empty"),
    ({"stream": "yes"}, "stream", 'stream must be true or false, got "yes"; write it without quotes'),
    ({"stream_options": {}}, "stream_options", "stream_options must come with stream: true, got it without; leave it"),
    ({"stream": True, "stream_options": 1}, "stream_options", "stream_options must be an object, got another value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unrecognized request argument: stream_options"),
    ({"logprobs": 6}, "logprobs", "logprobs must be from 0 to 5, got 6; use at most 5"),
    ({"logprobs": True}, "logprobs", "logprobs must be an integer, got true; write for example 0"),
    ({"messages": [USER]}, "messages", "unrecognized request argument: messages; leave it out"),
    ({"temprature": 1}, "temprature", "unrecognized request argument: temprature; did you mean temperature?"),
]
CHAT_REFUSALS = [
    ({"messages": None}, "messages", "you must provide messages, got none; add it"),
    ({"messages": []}, "messages", "messages must be a list of at least 1 message, got none"),
    ({"messages": ["hi"]}, "messages[0]", "messages[0] must be an object, got str; send role and content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "you must provide messages[0].content, got none; add it"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "messages[0].role must be one of system"),
    ({"messages": [{**USER, "content": 3}]}, "messages[0].content", "messages[0].content must be a string or a list"),
    ({"messages": [{**USER, "mood": 3}]}, "messages[0].mood", "unrecognized request argument: messages[0].mood; leave"),
    (
        {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "messages[0].content[0] must be a text part, got another; this server reads text only",
    ),
    ({"messages": [{**USER, "role": "system"}]}, "messages", "messages must be what the model's chat template takes"),
    ({"messages": [USER] * 9}, "messages", "messages must have at most 16 tokens on this server, got 19; shorten it"),
    ({"logprobs": 3}, "logprobs", "logprobs must be true or false, got 3; write it without quotes"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs must come with logprobs: true, got it alone; set logprobs"),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "top_logprobs must be from 0 to 5, got 6; use at most 5"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "max_tokens and max_completion_tokens must be equal"),
    ({"max_completion_tokens": 51}, "max_completion_tokens", "max_completion_tokens must be from 1 to 50, got 51"),
    ({"prompt": "x"}, "prompt", "unrecognized request argument: prompt; leave it out"),
]


@pytest.mark.parametrize(
    ("read", "fields", "param", "text"),
    [(completion, *row) for row in REFUSALS] + [(chat, *row) for row in CHAT_REFUSALS],
)
def test_what_cannot_be_is_refused_with_field_rule_value_and_remedy(
    encoder: PromptEncoder, read: object, fields: dict[str, object], param: str, text: str | None
) -> None:
    if text is None:
        # The begin token alone is a prompt.
        assert read(encoder, **fields).prompts == ((1,),)
        return
    with pytest.raises(ApiError) as caught:
        read(encoder, **fields)
    assert str(caught.value).startswith(text)
    assert (caught.value.status, caught.value.param) == (400, param)
    error = caught.value.body()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_a_token_that_the_model_has_not_is_refused_in_a_text_and_in_a_chat() -> None:
    # A base whose embedding is smaller than the tokenizer: the last token that it knows is the largest of the text.
    tokenizer = load_tokenizer(embedded_model_dir())
    tokenizer.chat_template = TEMPLATE
    largest = max(IDS)
    known, unknown = (
        PromptEncoder(tokenizer, vocabulary=size, max_prompt_tokens=16) for size in (largest + 1, largest)
    )
    assert completion(known).prompts == (IDS,)
    for read in (completion, chat):
        fields = {} if read is completion else {"messages": [{"role": "user", "content": PROMPT}]}
        assert read(known, **fields)
        with pytest.raises(
            ApiError, match=f"must be from 0 to {largest - 1}, got {largest}; use the tokenizer"
        ) as caught:
            read(unknown, **fields)
        assert (caught.value.status, caught.value.param) == (400, "prompt" if read is completion else "messages")


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts what it encodes."""

    encoded = 0

    def __call__(self, *args: object, **options: object) -> object:
        self.encoded += 1
        return super().__call__(*args, **options)


def test_what_cannot_fit_is_refused_before_it_is_encoded() -> None:
    tokenizer = CountingTokenizer.from_pretrained(embedded_model_dir())
    tokenizer.chat_template = TEMPLATE
    encoder = PromptEncoder(tokenizer, vocabulary=739, max_prompt_tokens=16)
    longest = max(map(len, tokenizer.get_vocab()))
    assert encoder.max_characters == 16 * (longest + 1)
    before = tokenizer.encoded
    text = "A" * (encoder.max_characters + 1)
    for read, fields in (
        (completion, {"prompt": text}),
        (completion, {"prompt": ["A3"] * 6}),
        (chat, {"messages": [{"role": "user", "content": text}]}),
    ):
        with pytest.raises(ApiError, match="must (have at most [0-9]+ characters .16 tokens.|hold at most 5 prompts)"):
            read(encoder, **fields)
    assert tokenizer.encoded == before
    # The longest prompt that there is room for is encoded: its tokens with a space before each.
    name = max(tokenizer.get_vocab(), key=len)
    assert len(encoder.encode(f" {name}" * 16, param="prompt", add_special_tokens=False)) == 16


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100000], ids=range(6))
def test_a_body_that_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(ApiError, match="the body must be"):
        parse_json(content)


def test_text_that_no_encoding_has_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(ApiError, match="prompt must be text that the model's tokenizer can encode"):
        completion(encoder, prompt="\ud800")


def test_a_chat_without_a_template_is_refused() -> None:
    bare = PromptEncoder(TOKENIZER, vocabulary=739, max_prompt_tokens=16)
    with pytest.raises(ApiError, match="must go through a chat template, and this model's tokenizer has none; use /v1"):
        chat(bare)
