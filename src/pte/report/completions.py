"""Completions as runs record them, and as the page's viewer reads them.

Decides: which completions are whole enough to be drawn, and that a number which is not known is null at its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pte.checkpoint_files import Json
    from pte.report.runs import Row

LOGPROB_DIGITS = 5
NEEDED_OF_A_ROLLOUT = ("id", "prompt_tokens", "completion_tokens", "logprobs", "token_bytes", "evictions")


def read_rollouts(path: Path, notes: list[str]) -> tuple[Row, ...]:
    """The objects of a rollouts.json; none where there is no such file."""
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        notes.append(f"{path} is not whole ({' '.join(str(error).split())}): its completions are left out.")
        return ()
    rows = [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []
    whole = tuple(one for one in rows if is_whole(one))
    if not whole or len(whole) < len(content):
        notes.append(f"{path}: completions without {', '.join(NEEDED_OF_A_ROLLOUT)}, or half of them, are left out.")
    return whole


def is_whole(rollout: Row) -> bool:
    """Whether a completion has what the viewer draws; log-probs may be null, one by one or all of them."""
    if not all(key in rollout for key in NEEDED_OF_A_ROLLOUT):
        return False
    prompt, completion, logprobs, evictions = (
        rollout[key] for key in ("prompt_tokens", "completion_tokens", "logprobs", "evictions")
    )
    return (
        isinstance(prompt, list)
        and isinstance(completion, list)
        and isinstance(evictions, list)
        and (logprobs is None or isinstance(logprobs, list))
        and all(isinstance(token, str) for token in (*prompt, *completion))
        and isinstance(rollout["token_bytes"], (int, float))
        and all(is_eviction(one, tokens=len(completion)) for one in evictions)
    )


def is_eviction(one: Json, *, tokens: int) -> bool:
    """Whether it names the token before which it is, and tokens of the completion that leave."""
    if not isinstance(one, dict) or not isinstance(one.get("before_token"), int):
        return False
    evicted = one.get("evicted_tokens")
    return isinstance(evicted, list) and all(isinstance(token, int) and 0 <= token < tokens for token in evicted)


def rounded(rollout: Row) -> Row:
    """The same with a log-prob for each token, of as many digits as anyone reads, null where it is not known."""
    logprobs = listed(rollout, "logprobs")
    tokens = len(listed(rollout, "completion_tokens"))
    known = [round(one, LOGPROB_DIGITS) if isinstance(one, (int, float)) else None for one in logprobs[:tokens]]
    found = finite({**rollout, "logprobs": [*known, *[None] * (tokens - len(known))]})
    assert isinstance(found, dict)
    return found


def finite(value: object) -> Json:
    """A value of JSON with null for numbers that are not finite: JSON has none, and a browser refuses them."""
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value  # type: ignore[return-value]


def listed(row: Row, key: str) -> list[object]:
    """A list of a row; empty where it is none."""
    value = row.get(key)
    return value if isinstance(value, list) else []  # type: ignore[return-value]
