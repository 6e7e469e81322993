"""Evaluation problems that the training set gives away.

Decides: when two problems count as the same text, and what a user is told about it.
Does not know: where the problems are used.

An evaluation problem overlaps when at least 60 % of its distinct word 8-grams occur in one training problem. A word
is a run of letters or a run of digits, lower case; drawings (`[asy]...[/asy]`) are left out, because sets that share
a problem often differ in whether they keep its drawing. A problem of fewer than eight words has no 8-gram and
overlaps with nothing. Paraphrases and translations are not found.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pte.tasks.problems import Problem, load_problems

GRAM_WORDS = 8
OVERLAP_FRACTION = 0.6
_WORD = re.compile(r"[^\W\d_]+|\d+")
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)


@dataclass(frozen=True)
class Overlap:
    """Which evaluation problems have their text in a training set."""

    evaluation_ids: tuple[str, ...]
    """Ids of the evaluation problems that overlap, in their order."""
    same_answer_ids: tuple[str, ...]
    """Those for which an overlapping training problem also has the same answer."""


def find_overlap(training: Sequence[Problem], evaluation: Sequence[Problem]) -> Overlap:
    """The evaluation problems that overlap with one of the training problems.

    Equal to comparing every pair; the index from 8-gram to evaluation problems spares the pairs without a common
    8-gram.

    Args:
        training: Problems that the policy is trained on.
        evaluation: Problems that it is scored on.
    """
    evaluation_grams = [word_grams(problem.problem) for problem in evaluation]
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for index, grams in enumerate(evaluation_grams):
        for gram in grams:
            holders[gram].append(index)

    overlapping: set[int] = set()
    same_answer: set[int] = set()
    for problem in training:
        common = Counter(index for gram in word_grams(problem.problem) & holders.keys() for index in holders[gram])
        for index, count in common.items():
            # In integers, so that exactly 60 % counts.
            if 100 * count >= round(100 * OVERLAP_FRACTION) * len(evaluation_grams[index]):
                overlapping.add(index)
                if problem.answer == evaluation[index].answer:
                    same_answer.add(index)
    return Overlap(
        evaluation_ids=tuple(evaluation[index].id for index in sorted(overlapping)),
        same_answer_ids=tuple(evaluation[index].id for index in sorted(same_answer)),
    )


def overlap_warnings(train_path: str | Path, eval_path: str | Path) -> list[str]:
    """What to tell the user about training on one file and evaluating on the other; empty where nothing overlaps.

    Args:
        train_path: JSONL file of the training problems.
        eval_path: JSONL file of the evaluation problems.

    Raises:
        FileNotFoundError: As `load_problems`.
        ValueError: As `load_problems`.
    """
    evaluation = load_problems(eval_path)
    overlap = find_overlap(load_problems(train_path), evaluation)
    if not overlap.evaluation_ids:
        return []
    shown = ", ".join(overlap.evaluation_ids[:3]) + (", ..." if len(overlap.evaluation_ids) > 3 else "")
    return [
        f"{len(overlap.evaluation_ids)} of the {len(evaluation)} problems of {Path(eval_path).name} also stand in "
        f"{Path(train_path).name} ({len(overlap.same_answer_ids)} with the same answer): {shown}. Scores on them are "
        "not held-out scores; train on another set, or report the score without these problems."
    ]


def word_grams(text: str) -> set[str]:
    """The distinct runs of eight words of a text."""
    words = _WORD.findall(_DRAWING.sub(" ", text.lower()))
    return {" ".join(words[start : start + GRAM_WORDS]) for start in range(len(words) - GRAM_WORDS + 1)}
