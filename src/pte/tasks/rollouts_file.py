"""rollouts.json: a handful of evaluated completions with everything that the report's viewer shows of them.

Decides: how many, what is written of each (tokens as text, log-probs, evictions, norms of the state), and how a token
is shown. Evictions and states come from `rollout.inspect`, which walks the recorded completions once more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pte.rollout.inspect import InspectedRollout, inspect_rollouts
from pte.run_record import replace_synced

if TYPE_CHECKING:
    from pte.checkpoint_files import Json
    from pte.model.policy import BoundedPolicy
    from pte.tasks.evaluate import EvaluatedCompletion
    from pte.tasks.task import Task, Tokenizer

ROLLOUTS_FILE = "rollouts.json"
ROLLOUTS = 8


def write_rollouts(
    path: str | Path, policy: BoundedPolicy, task: Task, completions: Sequence[EvaluatedCompletion]
) -> None:
    """Writes the first completions of an evaluation, one per problem, at most `ROLLOUTS`; nothing without any.

    Args:
        path: Of the file.
        policy: The one that completed, reading its own states.
        task: Whose tokenizer turns tokens into text.
        completions: Of one temperature.

    Raises:
        OSError: The file cannot be written.
    """
    chosen = list({one.problem.id: one for one in reversed(completions)}.values())[::-1][:ROLLOUTS]
    if not chosen:
        return
    inspected = inspect_rollouts(policy, [one.rollout for one in chosen])
    rows = [rollout_row(one, found, policy=policy, task=task) for one, found in zip(chosen, inspected, strict=True)]
    replace_synced(Path(path), json.dumps(rows).encode())


def rollout_row(
    one: EvaluatedCompletion, inspected: InspectedRollout, *, policy: BoundedPolicy, task: Task
) -> dict[str, Json]:
    """What the viewer shows of one completion; `state_*` and `first_state_norm` are null without a state."""
    rollout, schedule = one.rollout, policy.schedule
    return {
        "id": one.problem.id,
        "problem": one.problem.problem,
        "answer": one.problem.answer,
        "right": one.right,
        "prompt_tokens": list(token_texts(task.tokenizer, rollout.prompt_ids)),
        "completion_tokens": list(token_texts(task.tokenizer, rollout.completion_ids)),
        "logprobs": rollout.rollout_logprobs.tolist(),
        "window_tokens": schedule.window_tokens,
        "evict_tokens": schedule.evict_tokens,
        "token_bytes": policy.cache_shape.token_bytes(policy.cache_dtype),
        "state_bytes": inspected.state_bytes,
        "first_state_norm": plain(inspected.first_state_norm),
        "evictions": [
            {
                "before_token": eviction.before_token,
                "evicted_tokens": list(eviction.evicted_tokens),
                "state_norm": plain(eviction.state_norm),
                "state_change": plain(eviction.state_change),
            }
            for eviction in inspected.evictions
        ],
    }


def plain(norms: tuple[float, ...] | None) -> list[Json] | None:
    """A JSON list, or null."""
    return None if norms is None else list(norms)


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """Each token as text, with the space that the tokenizer writes between it and the token before.

    A token is what it adds to the text of the token before it; where that text changes (half a character, say), it is
    the token's own text.
    """
    texts: list[str] = []
    for index, token in enumerate(token_ids):
        alone = tokenizer.decode([token], skip_special_tokens=False)
        if index:
            before = tokenizer.decode([token_ids[index - 1]], skip_special_tokens=False)
            both = tokenizer.decode([token_ids[index - 1], token], skip_special_tokens=False)
            alone = both[len(before) :] if both.startswith(before) else alone
        texts.append(alone)
    return texts
