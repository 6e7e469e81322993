"""Text as it comes: never half a character, never a stop string, and in the end what decoding all tokens gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pte.rollout.sequences import NewTokens
from pte.serve.text import INCOMPLETE, CompletionText, IncrementalText, StopStrings
from served import END, byte_tokenizer


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A few letters with their word boundary, and bytes for all else, as SentencePiece models have it."""
    letters = ["▁", *"abcdefgh", "▁a", "▁b", "▁c"]
    vocabulary = {
        token: index for index, token in enumerate([END, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    }
    merges = [("▁", letter) for letter in "abc"]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


TOKENIZERS = {"bytes": byte_tokenizer(), "byte fallback": fallback_tokenizer()}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)
TEXT = st.text(st.sampled_from("abc é漢字🙂👩‍🚀\n"), max_size=12)


def decoded(kind: str, ids: list[int]) -> str:
    return TOKENIZERS[kind].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@KINDS
@given(text=TEXT)
def test_every_piece_is_of_whole_characters_and_all_of_them_are_the_text(kind: str, text: str) -> None:
    ids = TOKENIZERS[kind](text)["input_ids"]
    incremental = IncrementalText(TOKENIZERS[kind])
    pieces = [incremental.push(token) for token in ids]
    # Nothing is left to flush: the last character is whole with its last token.
    assert "".join(pieces) == decoded(kind, ids) and incremental.flush() == ""
    assert INCOMPLETE not in "".join(pieces)


@given(ids=st.lists(st.integers(0, 256), max_size=14))
def test_bytes_that_are_no_text_come_out_as_decoding_them_together_gives(ids: list[int]) -> None:
    incremental = IncrementalText(TOKENIZERS["bytes"])
    pieces = [incremental.push(token) for token in ids]
    assert "".join(pieces) + incremental.flush() == decoded("bytes", ids)


@KINDS
def test_an_emoji_is_held_until_its_last_byte(kind: str) -> None:
    ids = TOKENIZERS[kind]("a🙂")["input_ids"]
    incremental = IncrementalText(TOKENIZERS[kind])
    pieces = [incremental.push(token) for token in ids]
    assert len(ids) >= 5 and pieces[-4:] == ["", "", "", "🙂"]


def test_half_a_character_at_the_end_is_shown_as_decoding_shows_it() -> None:
    ids = TOKENIZERS["bytes"]("a🙂")["input_ids"][:-1]
    incremental = IncrementalText(TOKENIZERS["bytes"])
    assert [incremental.push(token) for token in ids] == ["a", "", "", ""]
    assert incremental.flush() == INCOMPLETE and incremental.flush() == ""


def test_a_completion_keeps_the_space_that_a_text_of_its_own_would_lose() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer("a b c")["input_ids"]
    after, fresh = IncrementalText(tokenizer, ids[:1]), IncrementalText(tokenizer)
    assert "".join(after.push(token) for token in ids[1:]) == " b c"
    assert "".join(fresh.push(token) for token in ids[1:]) == "b c"


def test_tokens_without_text_do_not_make_the_text_forget_where_it_is() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    a, b = tokenizer("a b")["input_ids"]
    incremental = IncrementalText(tokenizer)
    assert [incremental.push(token) for token in (a, tokenizer.eos_token_id, b)] == ["a", "", " b"]


def test_a_token_that_shows_only_in_what_follows_is_not_forgotten() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    for text in ("  a b", "   ", "  é"):
        ids = tokenizer(text)["input_ids"]
        # The decoder strips the first space: it has no text of its own, and what follows has one space less.
        assert tokenizer.convert_ids_to_tokens(ids)[0] == "▁" and decoded("byte fallback", ids[:1]) == ""
        incremental = IncrementalText(tokenizer)
        pieces = [incremental.push(token) for token in [tokenizer.eos_token_id, *ids]]
        assert "".join(pieces) == decoded("byte fallback", ids) == text.removeprefix(" ")


@given(ids=st.lists(st.integers(257, 268), max_size=12))
def test_any_tokens_come_out_as_decoding_them_together_gives(ids: list[int]) -> None:
    incremental = IncrementalText(TOKENIZERS["byte fallback"])
    assert "".join(incremental.push(token) for token in ids) == decoded("byte fallback", ids)


def test_ids_without_text_are_dropped_however_they_are_marked() -> None:
    tokenizer = fallback_tokenizer()
    tokenizer.add_tokens([AddedToken("<pad-1>", special=True)])
    special, beyond = len(tokenizer) - 1, len(tokenizer) + 7
    incremental = IncrementalText(tokenizer)
    (a,) = tokenizer("a")["input_ids"]
    assert [incremental.push(token) for token in (a, special, beyond, special)] == ["a", "", "", ""]
    assert incremental.ids == [a]


def up_to_first_stop(text: str, stops: list[str]) -> str:
    """Reads a character at a time until a stop string is whole."""
    for end in range(len(text) + 1):
        places = [place for place in (text[:end].find(stop) for stop in stops) if place >= 0]
        if places:
            return text[: min(places)]
    return text


@given(text=st.text("ab-", max_size=16), stops=st.lists(st.text("ab-", min_size=1, max_size=4), max_size=4))
def test_text_ends_before_the_first_stop_string_and_none_of_it_is_ever_taken_back(text: str, stops: list[str]) -> None:
    search, shown = StopStrings(stops), ""
    expected = up_to_first_stop(text, stops)
    for character in text:
        shown += search.push(character)
        assert expected.startswith(shown)
        if search.found:
            break
    else:
        shown += search.flush()
    assert shown == expected and search.found == (expected != text or any(text.endswith(stop) for stop in stops))


@given(text=st.text("ab-", max_size=12), stops=st.lists(st.text("ab-", min_size=1, max_size=4), max_size=4))
def test_no_more_is_held_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    search, shown = StopStrings(stops), ""
    for character in text:
        shown += search.push(character)
        if search.found:
            return
        assert not search.held or any(stop.startswith(search.held) for stop in stops)
        assert shown + search.held == text[: len(shown + search.held)]


def told(ids: list[int]) -> NewTokens:
    """Tokens with log-probs -0, -1, -2, ... and the next id as the second likeliest."""
    return NewTokens(
        order=0,
        token_ids=tuple(ids),
        logprobs=tuple(-float(index) for index in range(len(ids))),
        top_ids=tuple((one, (one + 1) % 257) for one in ids),
        top_logprobs=tuple((-0.5, -1.5) for _ in ids),
    )


def completion(*, stops: tuple[str, ...] = (), top_logprobs: int | None = 1) -> CompletionText:
    tokenizer = TOKENIZERS["bytes"]
    ends = {tokenizer.eos_token_id}
    return CompletionText(tokenizer, stops=stops, stop_token_ids=ends, top_logprobs=top_logprobs)


def test_a_token_s_logprob_comes_with_the_first_character_that_it_is_part_of() -> None:
    ids = TOKENIZERS["bytes"]("aé-")["input_ids"]
    text = completion()
    pieces = [text.push(NewTokens(0, (one,), (-1.0,), ((one,),), ((-1.0,),))) for one in ids]
    assert [piece.text for piece in pieces] == ["a", "", "é", "-"]
    assert [[token.offset for token in piece.tokens] for piece in pieces] == [[0], [], [1, 1], [2]]


def test_tokens_behind_a_stop_string_are_neither_shown_nor_counted() -> None:
    ids = TOKENIZERS["bytes"]("ab--cd")["input_ids"]
    text = completion(stops=("--",))
    piece = text.push(told(ids))
    assert text.stopped and piece.text == "ab" and [token.text for token in piece.tokens] == ["a", "b"]
    assert text.drawn_tokens == 4


def test_an_end_token_counts_and_has_no_text() -> None:
    ids = [*TOKENIZERS["bytes"]("ab")["input_ids"], TOKENIZERS["bytes"].eos_token_id]
    text = completion()
    piece, rest = text.push(told(ids)), text.finish()
    assert piece.text + rest.text == "ab" and len(piece.tokens + rest.tokens) == 2 and text.drawn_tokens == 3


def test_what_is_held_for_a_stop_string_that_never_comes_is_shown_at_the_end() -> None:
    text = completion(stops=("bcd",))
    piece = text.push(told(TOKENIZERS["bytes"]("abc")["input_ids"]))
    assert (piece.text, len(piece.tokens)) == ("a", 1)
    rest = text.finish()
    assert (rest.text, [token.logprob for token in rest.tokens], text.stopped) == ("bc", [-1.0, -2.0], False)


@pytest.mark.parametrize("asked", [None, 0, 1, 2])
def test_as_many_likely_tokens_are_told_as_were_asked_for(asked: int | None) -> None:
    ids = TOKENIZERS["bytes"]("ab")["input_ids"]
    tokens = completion(top_logprobs=asked).push(told(ids)).tokens
    assert [len(token.top) for token in tokens] == ([] if asked is None else [asked] * 2)
    if asked == 2:
        assert tokens[0].top == (("a", -0.5), ("b", -1.5))
