"""Tokens that arrive one by one as text that never has to be taken back.

Decides: when a token's text may be shown (never half a character, never what may turn out to begin a stop string), and
which token goes with which text. The pieces of a completion, joined, are the decoded completion up to its stop string.
Does not know: engines, HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pte.rollout.sequences import NewTokens

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
HELD_TOKENS = 16
"""A character has 4 bytes and so 4 tokens at most: what is still incomplete after more is no character."""
CONTEXT_TOKENS = 4
"""Tokens of the prompt before a completion: some tokenizers drop a space before the very first token of a text."""


@dataclass(frozen=True)
class ShownToken:
    """A token of a completion.

    Args:
        text: It alone, after the token before it; with a replacement character where it is part of a character.
        logprob: When it was drawn.
        top: The likeliest tokens in its place and their log-probs, the likeliest first.
        offset: Characters of the completion before it.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What may be shown next.

    Args:
        text: Follows the piece before it.
        tokens: Those whose text begins in it.
    """

    text: str
    tokens: tuple[ShownToken, ...]


class IncrementalText:
    """Decodes token by token; equals decoding all tokens at once.

    Args:
        tokenizer: Of the base.
        before: Tokens before the first one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)
        self.read = len(self.ids)
        self.shown = self.decode(self.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; empty while a character is incomplete."""
        self.ids.append(token_id)
        text = self.decode(self.ids)
        if text == self.shown:
            # An ordinary token may show only in what follows it, as a space does that begins a text.
            if self.is_silent(token_id):
                self.ids.pop()
            return ""
        if text.endswith(INCOMPLETE) and len(self.ids) - self.read < HELD_TOKENS:
            return ""
        return self.advance(text)

    def is_silent(self, token_id: int) -> bool:
        """True for a token that has no text wherever it stands: a special one, or an id that is no token."""
        added = self.tokenizer.added_tokens_decoder.get(token_id)
        special = token_id in self.tokenizer.all_special_ids or (added is not None and added.special)
        return special or self.tokenizer.convert_ids_to_tokens(token_id) is None

    def flush(self) -> str:
        """The text that was held back, now that nothing follows."""
        return self.advance(self.decode(self.ids)) if len(self.ids) > self.read else ""

    def advance(self, text: str) -> str:
        """What is new in the text of all tokens that are kept; afterwards only those that made it are."""
        new = text[len(self.shown) :]
        self.ids = self.ids[self.read :]
        self.read = len(self.ids)
        self.shown = self.decode(self.ids)
        return new


class StopStrings:
    """Lets text through up to the first stop string; holds back what may begin one.

    Args:
        stops: None of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.found = False

    def push(self, new: str) -> str:
        """The text that may be shown."""
        text = self.held + new
        places = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.found = True
            self.held = ""
            return text[: min(places)]
        longest = max((begun(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def flush(self) -> str:
        """The text that was held back, now that nothing follows."""
        text, self.held = self.held, ""
        return text


def begun(text: str, stop: str) -> int:
    """Characters at the end of the text that begin the stop string; it is not whole in there."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class CompletionText:
    """The text of one completion as its tokens arrive.

    Args:
        tokenizer: Of the base.
        stops: Strings that end it.
        stop_token_ids: Tokens that end it; they have no text.
        before: The prompt, where the completion goes on with its text.
        top_logprobs: Likeliest tokens to tell beside each token; None for no log-probs at all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stops: Sequence[str],
        stop_token_ids: Collection[int],
        before: Sequence[int] = (),
        top_logprobs: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text = IncrementalText(tokenizer, before[-CONTEXT_TOKENS:])
        self.stops = StopStrings(stops)
        self.stop_token_ids = stop_token_ids
        self.top_logprobs = top_logprobs
        self.previous = before[-1:]
        self.decoded_characters = 0
        self.shown_characters = 0
        self.waiting: list[ShownToken] = []
        self.drawn_tokens = 0

    @property
    def stopped(self) -> bool:
        """True when a stop string was found: nothing may follow."""
        return self.stops.found

    def push(self, new: NewTokens) -> Piece:
        """What may be shown after these tokens."""
        text = ""
        for index, token_id in enumerate(new.token_ids):
            self.drawn_tokens += 1
            if token_id in self.stop_token_ids:
                break
            if self.top_logprobs is not None:
                self.waiting.append(self.token(new, index))
            fresh = self.text.push(token_id)
            self.previous = (token_id,)
            self.decoded_characters += len(fresh)
            text += self.stops.push(fresh)
            if self.stopped:
                break
        return self.piece(text)

    def finish(self) -> Piece:
        """What was held back, now that the completion is whole."""
        text = self.stops.push(self.text.flush())
        if not self.stopped:
            text += self.stops.flush()
        piece = self.piece(text)
        if self.stopped:
            return piece
        rest, self.waiting = tuple(self.waiting), []
        return Piece(piece.text, piece.tokens + rest)

    def piece(self, text: str) -> Piece:
        """A piece with the tokens whose text begins in it."""
        self.shown_characters += len(text)
        shown = tuple(token for token in self.waiting if token.offset < self.shown_characters)
        self.waiting = self.waiting[len(shown) :]
        return Piece(text, shown)

    def token(self, new: NewTokens, index: int) -> ShownToken:
        """A drawn token with what else was likely."""
        assert self.top_logprobs is not None
        ids, logprobs = (new.top_ids[index], new.top_logprobs[index]) if new.top_ids else ((), ())
        likely = list(zip(ids, logprobs, strict=True))[: self.top_logprobs]
        return ShownToken(
            text=self.token_text(new.token_ids[index]),
            logprob=new.logprobs[index],
            top=tuple((self.token_text(token_id), logprob) for token_id, logprob in likely),
            offset=self.decoded_characters,
        )

    def token_text(self, token_id: int) -> str:
        """A token's own text, after the token before it."""
        before = self.tokenizer.decode(list(self.previous), clean_up_tokenization_spaces=False)
        both = self.tokenizer.decode([*self.previous, token_id], clean_up_tokenization_spaces=False)
        assert isinstance(before, str) and isinstance(both, str)
        return both[len(before) :]
