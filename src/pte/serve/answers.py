"""Pieces of completions in the forms of the API: whole answers and chunks of a stream.

Decides: the fields of both, for completions and for chats. An answer and the chunks of a stream are made of the same
pieces. Does not know: HTTP, engines.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pte.serve.text import INCOMPLETE

if TYPE_CHECKING:
    from pte.serve.body import CompletionRequest
    from pte.serve.text import Piece, ShownToken
    from pte.serve.worker import End

PREFIXES = {"completion": "cmpl", "chat": "chatcmpl"}
WHOLE = {"completion": "text_completion", "chat": "chat.completion"}
CHUNK = {"completion": "text_completion", "chat": "chat.completion.chunk"}
DONE = "data: [DONE]\n\n"


@dataclass
class Choice:
    """One completion of an answer, as far as it has come.

    Args:
        texts: Of its pieces.
        tokens: Of its pieces.
        end: Why nothing follows.
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[ShownToken] = field(default_factory=list)
    end: End | None = None


class Answer:
    """The answer to one request.

    Args:
        request: What was asked.
        fingerprint: Of the base.
    """

    def __init__(self, request: CompletionRequest, *, fingerprint: str) -> None:
        self.request = request
        self.choices = [Choice() for _ in range(len(request.prompts) * request.samples)]
        self.head: dict[str, object] = {
            "id": f"{PREFIXES[request.kind]}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }

    def add(self, choice: int, piece: Piece, end: End | None) -> None:
        """Appends a piece to a completion."""
        self.choices[choice].texts.append(piece.text)
        self.choices[choice].tokens += piece.tokens
        self.choices[choice].end = end

    def whole(self, completion_tokens: int) -> dict[str, object]:
        """All completions at once."""
        choices = [
            self.choice(index, "".join(choice.texts), choice.tokens, end=choice.end, key="message")
            for index, choice in enumerate(self.choices)
        ]
        kind = {"object": WHOLE[self.request.kind]}
        return {**self.head, **kind, "choices": choices, "usage": self.usage(completion_tokens)}

    def opening(self) -> list[str]:
        """The first chunks of a stream: in a chat, who speaks."""
        if self.request.kind == "completion":
            return []
        role = {"role": "assistant", "content": "", "refusal": None}
        return [
            self.chunk([{"index": index, "delta": role, "logprobs": None, "finish_reason": None}])
            for index in range(len(self.choices))
        ]

    def event(self, index: int, piece: Piece, end: End | None) -> str:
        """A chunk with the next piece of a completion."""
        return self.chunk([self.choice(index, piece.text, piece.tokens, end=end, key="delta")])

    def closing(self, completion_tokens: int) -> list[str]:
        """The last chunks of a stream: token counts where they were asked for, and the end."""
        if not self.request.include_usage:
            return [DONE]
        return [self.chunk([], usage=self.usage(completion_tokens)), DONE]

    def chunk(self, choices: Sequence[object], usage: object = None) -> str:
        """A chunk as an event of a stream; where token counts were asked for, all but the last say null."""
        content: dict[str, object] = {**self.head, "object": CHUNK[self.request.kind], "choices": choices}
        if self.request.include_usage:
            content["usage"] = usage
        return event(content)

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Token counts; a prompt counts once, however many completions it has."""
        prompt_tokens = sum(map(len, self.request.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def choice(
        self, index: int, text: str, tokens: Sequence[ShownToken], *, end: End | None, key: str
    ) -> dict[str, object]:
        """A completion, or the next piece of one.

        Args:
            index: Its place in the answer.
            text: Of it.
            tokens: Of it.
            end: Why nothing follows.
            key: What a chat calls the text: message or delta.
        """
        told = self.request.top_logprobs is not None
        if self.request.kind == "completion":
            logprobs = completion_logprobs(tokens) if told else None
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end}
        logprobs = {"content": [chat_logprob(token) for token in tokens], "refusal": None} if told else None
        said: dict[str, object] = {"content": text}
        if key == "message":
            said = {"role": "assistant", "content": text, "refusal": None}
        elif not text and end is not None:
            said = {}
        return {"index": index, key: said, "logprobs": logprobs, "finish_reason": end}


def event(content: object) -> str:
    """A JSON value as a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def completion_logprobs(tokens: Sequence[ShownToken]) -> dict[str, object]:
    """Log-probs in the form of completions: parallel lists; the drawn token is always among the likeliest."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{**dict(reversed(token.top)), token.text: token.logprob} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprob(token: ShownToken) -> dict[str, object]:
    """Log-probs of a token in the form of chats."""
    top = [{"token": text, "logprob": logprob, "bytes": as_bytes(text)} for text, logprob in token.top]
    return {"token": token.text, "logprob": token.logprob, "bytes": as_bytes(token.text), "top_logprobs": top}


def as_bytes(text: str) -> list[int] | None:
    """The bytes of a token's text; None where it is part of a character."""
    return None if INCOMPLETE in text else list(text.encode())
