"""What a request may ask for: the body of a call, field by field, as one checked value.

Decides: types, ranges and defaults of the fields (the API's), which fields are refused by name since nothing here would
obey them, and how prompts and messages become tokens. A field that is null counts as left out, a field that nobody
knows is refused. Does not know: engines, HTTP.

Law 9: the distribution that samples is the one that scores, so whatever would reshape it has no place here.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pte.rollout.sampling import LEAST_TEMPERATURE
from pte.serve.errors import ApiError
from pte.serve.fields import Fields
from pte.serve.prompts import PromptEncoder

RESHAPES = "the distribution that samples must be the one that scores; leave it out and use temperature"
NOT_THERE = "this server completes text; leave it out"
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "top_p": ((1,), RESHAPES),
    "top_k": ((-1,), RESHAPES),
    "min_p": ((0,), RESHAPES),
    "presence_penalty": ((0,), RESHAPES),
    "frequency_penalty": ((0,), RESHAPES),
    "repetition_penalty": ((1,), RESHAPES),
    "logit_bias": (({},), RESHAPES),
    "best_of": ((1,), "nothing ranks completions here; ask for n and choose yourself"),
    "echo": ((False,), "log-probs are those of drawn tokens; put the prompt before the text yourself"),
    "suffix": (("",), NOT_THERE),
    "tools": (([],), NOT_THERE),
    "tool_choice": (("none",), NOT_THERE),
    "parallel_tool_calls": ((False,), NOT_THERE),
    "functions": (([],), NOT_THERE),
    "function_call": (("none",), NOT_THERE),
    "response_format": (({"type": "text"},), "a grammar would reshape the distribution that scores; leave it out"),
    "modalities": ((["text"],), NOT_THERE),
    "audio": ((), NOT_THERE),
    "prediction": ((), NOT_THERE),
    "reasoning_effort": ((), NOT_THERE),
    "verbosity": ((), NOT_THERE),
    "web_search_options": ((), NOT_THERE),
    "moderation": ((), NOT_THERE),
    "service_tier": (("auto", "default"), NOT_THERE),
    "store": ((False,), "nothing is stored here; leave it out"),
}
"""By field: the values that ask for nothing, which pass, and why all others are refused."""
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that name the caller and ask for nothing."""
DEFAULT_COMPLETION_TOKENS = 16
"""The API's default of max_tokens for completions; a chat message may be as long as the server allows."""
MOST_STOPS = 4
HOTTEST = 2.0
MOST_COMPLETION_LOGPROBS = 5
MOST_CHAT_LOGPROBS = 20
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """What the server was started with room for.

    Args:
        slots: Sequences of a model at once.
        max_queue: Sequences of a model that may wait.
        max_prompt_tokens: Longest prompt.
        max_new_tokens: Longest completion.
        top_logprobs: Likeliest tokens that are recorded in the place of every token.
    """

    slots: int
    max_queue: int
    max_prompt_tokens: int
    max_new_tokens: int
    top_logprobs: int


@dataclass(frozen=True)
class CompletionRequest:
    """What a valid call asks for, whichever way it came.

    Args:
        kind: Which of the two calls.
        model: Name of the model.
        prompts: Token ids of each prompt; a chat has one.
        samples: Completions of each prompt.
        max_new_tokens: Completion tokens at most.
        temperature: At least 1e-4, or 0 for greedy decoding.
        seed: From which the completions' streams come.
        stops: Strings that end a completion and are not part of it.
        top_logprobs: Likeliest tokens to tell beside each token; None for no log-probs at all.
        stream: Whether to answer as the tokens come.
        include_usage: Whether a stream ends with token counts.
    """

    kind: Literal["completion", "chat"]
    model: str
    prompts: tuple[tuple[int, ...], ...]
    samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    stops: tuple[str, ...]
    top_logprobs: int | None
    stream: bool
    include_usage: bool


def parse_json(content: bytes) -> dict[str, object]:
    """The JSON object that a body is.

    Raises:
        ApiError: It is something else.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body must be JSON in UTF-8 ({str(error)[:80]}); send one JSON object") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, got {type(body).__name__}; send one JSON object")
    return body


def read_completion(body: Mapping[str, object], *, limits: Limits, encoder: PromptEncoder) -> CompletionRequest:
    """What a call of /v1/completions asks for.

    Args:
        body: The JSON object.
        limits: Of the server.
        encoder: Makes tokens of prompts.

    Raises:
        ApiError: A field is missing, unknown, refused, of another type or out of range.
    """
    fields = Fields(body)
    prompts = encoder.prompts(fields.take("prompt"), most=limits.slots + limits.max_queue)
    most = min(MOST_COMPLETION_LOGPROBS, limits.top_logprobs)
    top_logprobs = fields.integer("logprobs", least=0, most=most) if fields.has("logprobs") else None
    max_new_tokens = fields.integer(
        "max_tokens", least=1, most=limits.max_new_tokens, default=min(DEFAULT_COMPLETION_TOKENS, limits.max_new_tokens)
    )
    return read_shared(
        fields,
        "completion",
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        top_logprobs=top_logprobs,
        limits=limits,
    )


def read_chat(body: Mapping[str, object], *, limits: Limits, encoder: PromptEncoder) -> CompletionRequest:
    """What a call of /v1/chat/completions asks for.

    Args:
        body: The JSON object.
        limits: Of the server.
        encoder: Makes tokens of messages.

    Raises:
        ApiError: A field is missing, unknown, refused, of another type or out of range.
    """
    fields = Fields(body)
    prompts = (encoder.chat(fields.take("messages")),)
    told = fields.flag("logprobs")
    top_logprobs = fields.integer("top_logprobs", least=0, most=min(MOST_CHAT_LOGPROBS, limits.top_logprobs), default=0)
    if fields.has("top_logprobs") and not told:
        raise ApiError(
            "top_logprobs must come with logprobs: true, got it alone; set logprobs to true", param="top_logprobs"
        )
    both = fields.has("max_tokens") and fields.has("max_completion_tokens")
    if both and fields.take("max_tokens") != fields.take("max_completion_tokens"):
        raise ApiError(
            "max_tokens and max_completion_tokens must be equal, got two values; leave one out", param="max_tokens"
        )
    name = "max_tokens" if fields.has("max_tokens") else "max_completion_tokens"
    return read_shared(
        fields,
        "chat",
        prompts=prompts,
        max_new_tokens=fields.integer(name, least=1, most=limits.max_new_tokens, default=limits.max_new_tokens),
        top_logprobs=top_logprobs if told else None,
        limits=limits,
    )


def read_shared(
    fields: Fields,
    kind: Literal["completion", "chat"],
    *,
    prompts: tuple[tuple[int, ...], ...],
    max_new_tokens: int,
    top_logprobs: int | None,
    limits: Limits,
) -> CompletionRequest:
    """The whole request, with the fields that both calls have, and nothing left over."""
    for name, (neutral, reason) in REFUSED.items():
        fields.refuse(name, neutral=neutral, reason=reason)
    stream = fields.flag("stream")
    temperature = fields.number("temperature", least=0.0, most=HOTTEST, default=1.0)
    if 0 < temperature < LEAST_TEMPERATURE:
        raise fields.wrong(
            "temperature", f"be 0 (greedy) or at least {LEAST_TEMPERATURE}", "write 0 or for example 1.0"
        )
    request = CompletionRequest(
        kind=kind,
        model=fields.text("model"),
        prompts=prompts,
        samples=fields.integer("n", least=1, most=limits.slots + limits.max_queue, default=1),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=fields.integer(
            "seed", least=-LARGEST_SEED - 1, most=LARGEST_SEED, default=secrets.randbelow(LARGEST_SEED)
        ),
        stops=fields.texts("stop", most=MOST_STOPS),
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=wants_usage(fields, stream=stream),
    )
    fields.refuse_others(LABELS)
    sequences, room = len(prompts) * request.samples, limits.slots + limits.max_queue
    if sequences > room:
        raise ApiError(
            f"prompts times n must be at most {room} (slots and queue of this server), got {sequences}; send several "
            f"requests",
            param="n",
        )
    return request


def wants_usage(fields: Fields, *, stream: bool) -> bool:
    """Whether a stream is to end with token counts."""
    if not fields.has("stream_options"):
        return False
    options = fields.take("stream_options")
    if not stream:
        raise ApiError(
            "stream_options must come with stream: true, got it without; leave it out", param="stream_options"
        )
    if not isinstance(options, dict):
        raise ApiError(
            "stream_options must be an object, got another value; send {'include_usage': true}", param="stream_options"
        )
    inner = Fields(options, within="stream_options")
    wanted = inner.flag("include_usage")
    inner.refuse("include_obfuscation", neutral=(False,), reason="chunks are not padded here; leave it out")
    inner.refuse_others(())
    return wanted
