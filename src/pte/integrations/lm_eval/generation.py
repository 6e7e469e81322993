"""Completions of prompts that end at strings, in the engine's slots.

Decides: that requests of one length and temperature share an engine, as `pte eval` runs a set; that a sequence leaves
its slot as soon as a stop string or a special token named as one is there; and that a completion without such strings
is the text that `pte eval` scores. Does not know the harness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pte.integrations.lm_eval.arguments import Sampling
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest
from pte.serve.text import CompletionText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pte.config import ExperimentConfig
    from pte.rollout.sequences import NewTokens
    from pte.session import Session


@dataclass(frozen=True)
class Wanted:
    """A completion to make.

    Args:
        prompt_ids: Token ids.
        stream_seed: Of the sequence's own random stream.
        sampling: How it is drawn and where it ends.
    """

    prompt_ids: tuple[int, ...]
    stream_seed: int
    sampling: Sampling


@dataclass
class Stopping:
    """A sequence that ends at strings.

    Args:
        text: Finds them as tokens come.
        ends: Tokens that are such strings.
        shown: What is certain so far.
    """

    text: CompletionText
    ends: frozenset[int]
    shown: str = field(default="")


def complete(
    session: Session, config: ExperimentConfig, wanted: Sequence[Wanted], *, on_text: Callable[[int, str], None]
) -> list[str]:
    """The text of every completion, without the string that ended it, in the order of `wanted`.

    Args:
        session: Policy and tokenizer.
        config: Its sections rollout and model are read.
        wanted: What to complete.
        on_text: Called with the place in `wanted` and the text of each completion as it ends.

    Raises:
        ValueError: A prompt with its completion exceeds the trained positions; nothing is cut to fit.
    """
    groups: dict[tuple[int, float], list[int]] = {}
    for place, one in enumerate(wanted):
        groups.setdefault((one.sampling.max_new_tokens, one.sampling.temperature), []).append(place)
    texts: dict[int, str] = {}
    for (max_new_tokens, temperature), places in groups.items():
        engine = RolloutEngine(
            session.policy,
            slots=config.rollout.slots,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_token_ids=session.task.stop_token_ids,
            allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
        )

        def keep(order: int, text: str, places: list[int] = places) -> None:
            texts[places[order]] = text
            on_text(places[order], text)

        run(engine, session, [wanted[place] for place in places], on_text=keep)
    return [texts[place] for place in range(len(wanted))]


def run(
    engine: RolloutEngine, session: Session, wanted: Sequence[Wanted], *, on_text: Callable[[int, str], None]
) -> None:
    """Completes requests of one length and temperature."""
    tokenizer: PreTrainedTokenizerBase = session.task.tokenizer  # type: ignore[assignment]
    stopping: dict[int, Stopping] = {}
    for order, one in enumerate(wanted):
        if one.sampling.until:
            text = CompletionText(
                tokenizer,
                stops=one.sampling.until,
                stop_token_ids=engine.stop_token_ids | (ends := special_ids(tokenizer, one.sampling.until)),
            )
            stopping[order] = Stopping(text, ends)

    def take(new: NewTokens) -> None:
        one = stopping.get(new.order)
        if one is None:
            return
        one.shown += one.text.push(new).text
        if one.text.stopped or one.ends & set(new.token_ids):
            engine.cancel(new.order)
            on_text(new.order, one.shown if one.text.stopped else one.shown + one.text.finish().text)

    def finish(order: int, rollout: Rollout) -> None:
        one = stopping.get(order)
        on_text(order, session.task.text(rollout.completion_ids) if one is None else one.shown + one.text.finish().text)

    engine.open(
        rows=min(engine.slots, len(wanted)),
        prompt_slots=max(len(one.prompt_ids) for one in wanted),
        on_finish=finish,
        on_tokens=take if stopping else None,
    )
    try:
        for one in wanted:
            engine.submit(RolloutRequest(one.prompt_ids, one.stream_seed))
        engine.drain()
    finally:
        engine.close()


def special_ids(tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> frozenset[int]:
    """Ids of those strings that are special tokens: they have no text that could be searched."""
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [tokenizer.convert_tokens_to_ids(stop) for stop in until if stop in specials]
    return frozenset(one for one in found if isinstance(one, int))
