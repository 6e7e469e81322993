"""rollouts.json: what commands write of a few completions, and how tokens become text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pte.cli import main
from pte.tasks.evaluate import evaluate_session
from pte.tasks.rollouts_file import ROLLOUTS, token_texts, write_rollouts
from short_runs import open_short, short_flags

pytestmark = pytest.mark.system


class Spelling:
    """A tokenizer whose text of two tokens is not that of the two alone where the second is 9."""

    eos_token_id = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "joined" if token_ids[-1] == 9 and len(token_ids) > 1 else " ".join(map(str, token_ids))


def test_a_token_is_what_it_adds_to_the_text_before_it() -> None:
    assert token_texts(Spelling(), [4, 5, 5, 9]) == ["4", " 5", " 5", "9"]


def test_the_tokens_of_a_completion_are_its_text(tmp_path: Path) -> None:
    config, session = open_short(eval__problems=3)
    _, completions = evaluate_session(session, config, name="chained")
    write_rollouts(tmp_path / "rollouts.json", session.policy, session.task, completions)
    rows = json.loads((tmp_path / "rollouts.json").read_text())
    for row, one in zip(rows, completions, strict=True):
        whole = session.task.tokenizer.decode(one.rollout.completion_ids, skip_special_tokens=False)
        assert "".join(row["completion_tokens"]) == whole
        assert row["logprobs"] == pytest.approx(one.rollout.rollout_logprobs.tolist())
        assert (row["id"], row["answer"], row["right"]) == (one.problem.id, one.problem.answer, one.right)
        assert len(row["evictions"]) == one.rollout.evictions > 0
        assert (row["window_tokens"], row["evict_tokens"]) == (16, 4)
        left = [token for eviction in row["evictions"] for token in eviction["evicted_tokens"]]
        assert left == list(range(len(left))), "the window takes the oldest, each once"


def test_a_handful_is_written_one_per_problem(tmp_path: Path) -> None:
    config, session = open_short(eval__problems=10, eval__samples_per_problem=2, eval__temperature=1.0)
    _, completions = evaluate_session(session, config, name="chained")
    write_rollouts(tmp_path / "rollouts.json", session.policy, session.task, completions)
    rows = json.loads((tmp_path / "rollouts.json").read_text())
    ids = [one.problem.id for one in completions[::2]]
    assert [row["id"] for row in rows] == ids[:ROLLOUTS] and len(ids) > ROLLOUTS
    write_rollouts(tmp_path / "none.json", session.policy, session.task, [])
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(("kind", "policy"), [("none", "window"), ("lora", "window"), ("lora", "none")])
def test_an_arm_without_a_state_has_none_to_show(kind: str, policy: str, tmp_path: Path) -> None:
    config, session = open_short(adapter__kind=kind, cache__policy=policy, eval__problems=2)
    _, completions = evaluate_session(session, config, name="chained")
    write_rollouts(tmp_path / "rollouts.json", session.policy, session.task, completions)
    for row in json.loads((tmp_path / "rollouts.json").read_text()):
        assert row["state_bytes"] is None and row["first_state_norm"] is None
        assert all(one["state_norm"] is None and one["state_change"] is None for one in row["evictions"])
        assert (row["window_tokens"] is None and not row["evictions"]) == (policy == "none")


def test_eval_writes_rollouts_where_asked(tmp_path: Path) -> None:
    output = tmp_path / "rollouts.json"
    assert main(["eval", *short_flags(), "--rollouts", str(output)]) == 0
    assert len(json.loads(output.read_text())) == 4


def test_eval_refuses_rollouts_of_a_controlled_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rollouts.json"
    assert main(["eval", *short_flags(eval__state_control="zeroed"), "--rollouts", str(output)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--rollouts needs eval.state_control 'own', got 'zeroed'" in error and "leave out one of the two" in error
    assert not output.exists()
