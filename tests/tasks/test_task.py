"""What a run needs of its problems: their order, prompts, traces, rewards, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pte.learn.rewards import math_reward
from pte.model.load import load_tokenizer
from pte.tasks.base_training import build_tokenizer
from pte.tasks.chained import embedded_model_dir
from pte.tasks.families import FAMILIES
from pte.tasks.generated import Family, split_of
from pte.tasks.task import generated_task, jsonl_task, last_line, load_traces
from short_runs import odd_ids, text_model, write_problems, write_traces


def chained(**changes: object):
    settings = {"seed": 0, "eval_problems": 5, "shapes": {"chained": {"num_statements": 4}}}
    families = {"chained": FAMILIES["chained"]}
    return generated_task(load_tokenizer(embedded_model_dir()), families, **{**settings, **changes})


def generated(tokenizer, family: Family, shape: dict[str, int]):
    return generated_task(tokenizer, {family.name: family}, shapes={family.name: shape}, seed=0, eval_problems=2)


def from_files(tmp_path: Path, **changes: object):
    settings = {
        "seed": 0,
        "train_path": tmp_path / "p.jsonl",
        "eval_paths": (),
        "eval_problems": None,
        "template": "auto",
        "boxed_instruction": False,
        "reward": "exact",
        "traces_path": None,
    }
    if not (tmp_path / "model").exists():
        text_model(tmp_path)
        write_problems(tmp_path / "p.jsonl", 8)
    return jsonl_task(load_tokenizer(tmp_path / "model"), **{**settings, **changes})


def test_the_order_of_problems_is_a_function_of_seed_and_position() -> None:
    forwards, backwards = chained(), chained()
    positions = [0, 3, 255, 256, 600]
    there = [forwards.training(position).problem.id for position in positions]
    back = [backwards.training(position).problem.id for position in reversed(positions)]
    assert there == back[::-1]
    assert len(set(there)) == len(there)
    assert there != [chained(seed=1).training(position).problem.id for position in positions]


def test_training_and_evaluation_problems_of_the_embedded_task_are_of_different_splits() -> None:
    task = chained()
    (heldout,) = task.evaluation.values()
    assert len(heldout) == 5
    assert {split_of(problem.problem) for problem in heldout} == {"heldout"}
    assert {split_of(task.training(position).problem.problem) for position in range(300)} == {"train"}


def test_a_trace_ends_with_the_end_token_once_and_its_text_is_the_trace() -> None:
    task = chained()
    trace = task.training(0).trace
    assert trace is not None
    ids = task.completion_ids(trace)
    assert len(ids) == 44
    assert [index for index, one in enumerate(ids) if one in task.stop_token_ids] == [43]
    assert task.text(ids) == trace.removesuffix(" <eos>")


def test_a_stream_s_completion_gets_no_end_token_and_a_trace_from_a_file_gets_one(tmp_path: Path) -> None:
    recall = FAMILIES["recall"]
    tokenizer = build_tokenizer(recall.vocabulary(), max_positions=512)
    stream = generated(tokenizer, recall, {"num_facts": 6, "num_queries": 3, "max_age": 4})
    trace = stream.training(0).trace
    assert trace is not None and "<eos>" not in trace
    ids = stream.completion_ids(trace)
    assert tokenizer.decode(ids) == trace and len(ids) == 12
    write_traces(tmp_path / "traces.jsonl", 8)
    file = from_files(tmp_path, traces_path=tmp_path / "traces.jsonl")
    written = file.training(0).trace
    assert written is not None
    ended = file.completion_ids(written)
    assert [index for index, one in enumerate(ended) if one in file.stop_token_ids] == [len(ended) - 1]
    bare = file.tokenizer.decode(ended[:-1], skip_special_tokens=False)
    assert file.completion_ids(bare) == ended


def test_the_right_trace_earns_the_reward_and_another_answer_does_not() -> None:
    task = chained()
    problem, trace = task.training(0).problem, task.training(0).trace
    right = task.text(task.completion_ids(trace))
    wrong = right[:-1] + str((int(right[-1]) + 1) % 10)
    scores = task.reward(completions=[right, wrong, ""], answer=[problem.answer] * 3)
    assert scores == [1.0, 0.0, 0.0]
    assert task.accuracy is task.reward


def test_the_longest_prompt_is_found_among_the_training_problems(tmp_path: Path) -> None:
    last = from_files(tmp_path).training(7).problem
    path = tmp_path / "p.jsonl"
    path.write_text(path.read_text().replace(last.problem, f"A1 B2 {last.problem}"))
    task = from_files(tmp_path)
    assert task.longest_prompt() == task.prompt_ids(task.training(7).problem)
    assert len(task.longest_prompt()) == len(task.prompt_ids(task.training(0).problem)) + 2


def test_every_epoch_of_a_file_has_every_problem_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    task = from_files(tmp_path)
    epochs = [[task.training(8 * epoch + row).problem.id for row in range(8)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 8
    assert epochs[0] != epochs[1]
    again = from_files(tmp_path)
    assert again.training(17).problem.id == epochs[2][1], "whatever was asked for before"
    assert [from_files(tmp_path, seed=5).training(row).problem.id for row in range(8)] != epochs[0]


def test_prompts_of_a_file_are_in_the_tokenizers_chat_template(tmp_path: Path) -> None:
    task = from_files(tmp_path)
    problem = task.training(0).problem
    assert task.tokenizer.decode(task.prompt_ids(problem), skip_special_tokens=False) == f"<bos> {problem.problem}"


def test_evaluation_sets_are_named_after_their_files_and_cut_to_their_first_problems(tmp_path: Path) -> None:
    one, two = write_problems(tmp_path / "one.jsonl", 5, seed=1), write_problems(tmp_path / "two.jsonl", 2, seed=2)
    task = from_files(tmp_path, eval_paths=(one, two), eval_problems=3)
    assert {name: len(problems) for name, problems in task.evaluation.items()} == {"one": 3, "two": 2}
    assert task.evaluation["one"][0].id == json.loads(one.read_text().splitlines()[0])["id"]


def test_two_evaluation_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = (write_problems(tmp_path / "one.jsonl"), write_problems(tmp_path / "other" / "one.jsonl"))
    with pytest.raises(ValueError, match=r"eval_paths must have different file names .* got 'one' twice; rename one"):
        from_files(tmp_path, eval_paths=paths)


def test_the_reward_is_the_one_that_is_named_and_accuracy_stays_an_answer(tmp_path: Path) -> None:
    own = from_files(tmp_path, reward="short_runs:odd_ids")
    assert own.reward is odd_ids
    assert own.accuracy is math_reward
    exact = from_files(tmp_path)
    assert exact.accuracy is exact.reward
    assert exact.reward(completions=["so\n 7 \n", "7\nno", ""], answer=["7", "7", "7"]) == [1.0, 0.0, 0.0]
    assert from_files(tmp_path, reward="math").reward is math_reward


@pytest.mark.parametrize(("text", "line"), [("", None), ("\n \n", None), ("a", "a"), ("a\n\n b \n", "b")])
def test_the_last_line_is_the_last_with_text(text: str, line: str | None) -> None:
    assert last_line(text) == line


def test_an_empty_problem_and_one_of_unknown_words_are_refused_by_name(tmp_path: Path) -> None:
    from pte.tasks.problems import Problem

    task = chained()
    with pytest.raises(ValueError, match=r"problem 'p1' must not be empty, got ' '; write its text"):
        task.prompt_ids(Problem("p1", " ", "1", "test"))
    with pytest.raises(
        ValueError, match=r"problem 'p2' must be text that the model's tokenizer can encode, got 'hello"
    ):
        task.prompt_ids(Problem("p2", "hello world", "1", "test"))


def test_traces_are_read_by_id_whatever_their_text_holds(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    texts = {"a": "one\u2028two", "b": "three\x85four\nfive", "c": "ü"}
    rows = [json.dumps({"id": name, "trace": text}, ensure_ascii=False) for name, text in texts.items()]
    path.write_text("\n".join([rows[0], "", *rows[1:]]) + "\r\n", encoding="utf-8")
    assert load_traces(path) == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "b", "trace": "x"', r'line 2: a trace must be a JSON object with "id" and "trace", got .*"b"'),
        (b'["b", "x"]', r"line 2: a trace must be a JSON object"),
        (b'{"id": "b"}', r"line 2: a trace must be a JSON object"),
        (b'{"id": "b", "trace": "\xff"}', r"line 2: a trace must be a JSON object"),
        (b'{"id": "b", "trace": 3}', r"line 2: id and trace must be text, each id once, got id 'b'"),
        (b'{"id": "b", "trace": ""}', r"line 2: id and trace must be text"),
        (b'{"id": 3, "trace": "x"}', r"line 2: id and trace must be text, each id once, got id 3"),
        (b'{"id": "a", "trace": "x"}', r"line 2: id and trace must be text, each id once, got id 'a'"),
    ],
)
def test_a_line_that_is_no_trace_is_named_with_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"id": "a", "trace": "x"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"{path}, {message}"):
        load_traces(path)


def test_a_missing_file_of_traces_and_a_trace_of_no_problem_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"traces_path must exist, got .*nowhere.jsonl"):
        from_files(tmp_path, traces_path=tmp_path / "nowhere.jsonl")
    traces = write_traces(tmp_path / "t.jsonl", 3, seed=9)
    with pytest.raises(ValueError, match=r"t.jsonl: every trace must belong to a training problem, got id '.*'; drop"):
        from_files(tmp_path, traces_path=traces)
