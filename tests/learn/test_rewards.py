"""Rewards: what counts as right, what a hostile completion can do, and how a user's function is checked."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.learn import rewards as rewards_module
from pte.learn.rewards import compute_rewards, exact_reward, final_answer, load_reward, math_reward
from pte.tasks.chained import generate_problems, parse_answer

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
EVALUATION_SETS = ("math500", "olympiadbench", "amc23", "aime24", "aime25", "minerva_math")


def score(answer, boxed):
    (reward,) = math_reward([f"thus \\boxed{{{boxed}}}."], [answer])
    return reward


def answers_of(name):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the data set {name}.jsonl is not in ../shared/data")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["answer"] for line in lines]


def boxes(answers):
    return [f"so the answer is $\\boxed{{{answer}}}$." for answer in answers]


RIGHT = [
    ("113", "113"),
    ("113", "113."),
    ("7", "07"),
    ("-3", "- 3"),
    ("18", "\\$18.00"),
    ("7", "x = 7"),
    ("7", "7 \\text{ cm}"),
    ("10", "10^\\circ"),
    ("1234", "1,234"),
    ("1234", "1{,}234"),
    ("1234", "1\\,234"),
    ("1,234", "1234"),
    ("10,\\!000", "10000"),
    ("3, 4", "4,3"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "\\dfrac12"),
    ("\\frac{1}{3}", "0.333333"),
    ("\\frac{11+9a}{20}", "\\frac{9a+11}{20}"),
    ("6-5i", "-5i+6"),
    ("4.5 \\times 10^{33}", "4.5e33"),
    ("4.5 \\times 10^{33}", "4.5\\cdot 10^{33}"),
    ("1.77 \\times 10^{-6}", "0.00000177"),
    ("0.05", "5\\%"),
    ("50", "50\\%"),  # to "what percent", both are right
    ("\\text{Evelyn}", "Evelyn"),
    ("x \\in [-2,7]", "[-2,7]"),
]

WRONG = [
    ("113", "114"),
    ("-3", "3"),
    ("7", "7, 8"),
    ("3, 4", "3"),
    ("3, 4", "3, 5"),
    ("25", "25 \\text{ and also } 26"),
    ("1234", "12,34"),
    ("\\frac{1}{2}", "0.51"),
    ("[-2,7]", "(-2,7)"),
    ("4.5 \\times 10^{33}", "4.6 \\times 10^{33}"),
    ("4.5 \\times 10^{-33}", "9.9 \\times 10^{-33}"),  # math-verify alone takes these two for equal:
    ("4.5 \\times 10^{-33}", "1 \\times 10^{-20}"),  # it chops below 1e-15
    ("4.5 \\times 10^{-33}", "0"),
    ("0.00001", "0.0000104"),
    ("\\text{even}", "\\text{odd}"),
    ("7", ""),
]


@pytest.mark.parametrize(("answer", "boxed"), RIGHT)
def test_another_spelling_of_the_right_answer_scores_1(answer, boxed):
    assert score(answer, boxed) == 1.0


@pytest.mark.parametrize(("answer", "boxed"), WRONG)
def test_a_wrong_answer_scores_0(answer, boxed):
    assert score(answer, boxed) == 0.0


@pytest.mark.parametrize("name", [*EVALUATION_SETS, "gsm8k_test", "gsm8k_train", "dapo_math_sample"])
def test_every_gold_answer_scores_1_against_itself(name):
    answers = answers_of(name)
    assert math_reward(boxes(answers), answers) == [1.0] * len(answers)


@pytest.mark.parametrize("name", ["amc23", "aime24", "gsm8k_test", "dapo_math_sample"])
def test_the_answer_of_another_problem_scores_0(name):
    answers = answers_of(name)[:500]
    shifted = [*answers[1:], answers[0]]
    expected = [float(int(one) == int(other)) for one, other in zip(answers, shifted, strict=True)]
    assert math_reward(boxes(shifted), answers) == expected


def test_the_parser_alone_reads_the_latex_answers_of_the_sets():
    # The comparison of equal strings is left out here, so that every answer goes through math-verify.
    answers = [a for name in ("math500", "olympiadbench", "minerva_math") for a in answers_of(name)[::15] if "\\" in a]
    process = rewards_module._math_process()
    read = sum(process.same_value(answer, answer.replace("\\frac", "\\dfrac") + " ") for answer in answers)
    assert len(answers) > 25
    assert read >= len(answers) - 1


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} is it", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{a \\\\ {b}}", "a \\\\ {b}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{5} and \\boxed{6", "5"),
        ("\\boxed{6", None),
        ("\\boxed{6\\", None),
        ("the answer is 6", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_complete_box(completion, answer):
    assert final_answer(completion) == answer


@given(st.text(alphabet="\\boxed{}1 ", max_size=40), st.integers(0, 10**6))
def test_text_before_the_last_box_changes_nothing(text, number):
    assert final_answer(f"{text} \\boxed{{{number}}}") == str(number)


@pytest.mark.parametrize("reward", [math_reward, exact_reward(final_answer)])
def test_an_empty_completion_scores_0_whatever_the_prompt_holds(reward):
    scored = compute_rewards(
        reward,
        prompts=["The answer is \\boxed{7}", "\\boxed{7}"],
        completions=["", "\\boxed{7}"],
        completion_ids=[[], [1]],
        columns={"answer": ["7", "7"], "problem": ["\\boxed{7}", "\\boxed{7}"]},
    )
    assert scored == [0.0, 1.0]


def test_exact_reward_scores_the_embedded_tasks_own_traces_1_and_a_changed_answer_0():
    problems = generate_problems(5, seed=3, split="train")
    reward = exact_reward(parse_answer)
    answers = [problem.answer for problem in problems]
    assert reward(completions=[problem.trace for problem in problems], answer=answers) == [1.0] * 5
    changed = [str((int(answer) + 1) % 10) for answer in answers]
    assert reward(completions=[problem.trace for problem in problems], answer=changed) == [0.0] * 5


def test_exact_reward_never_equates_no_answer_with_an_answer():
    assert exact_reward(lambda text: None)(completions=["x"], answer=["None"]) == [0.0]


# ---- what a completion can do to the process that reads it


def test_an_endless_answer_ends_at_the_cpu_limit_and_the_next_one_is_read():
    process = rewards_module._MathProcess(cpu_limit_seconds=0.5)
    assert process.same_value("\\frac{1}{2}", "0.5")
    start = time.monotonic()
    assert not process.same_value("7", "9^{9^{9^{9}}}")
    assert process.process.returncode == -signal.SIGPROF
    assert time.monotonic() - start < 20  # CPU seconds of the child; a busy machine stretches them
    assert process.same_value("\\frac{3}{7}", "\\dfrac{3}{7}")
    process._stop()


@pytest.mark.parametrize(
    "boxed", ["(" * 30 + "1", "\\frac{1}{" * 5, "\\left\\{\\left(", "%", "\\", "\x00", "\u2028\n", "\ud800"]
)
def test_a_malformed_answer_scores_0_without_raising(boxed):
    assert score("7", boxed) == 0.0
    assert not rewards_module._math_process().same_value("7", boxed)


def test_a_box_of_reasoning_is_no_answer():
    assert score("7", " " + "7 + 0" + " + 0" * 300) == 0.0


def test_a_child_ended_by_somebody_else_costs_no_reward():
    assert score("\\frac{2}{9}", "\\dfrac{2}{9}") == 1.0
    process = rewards_module._math_process().process
    os.kill(process.pid, signal.SIGKILL)
    assert score("\\frac{4}{9}", "\\dfrac{4}{9}") == 1.0


def test_math_reward_works_outside_the_main_thread():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(score("\\frac{5}{8}", "0.625")))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_an_interrupted_question_does_not_answer_the_next(monkeypatch):
    process = rewards_module._MathProcess()
    assert process.same_value("\\frac{1}{2}", "0.5")

    class InterruptedPipe:
        def readline(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(process.process, "stdout", InterruptedPipe())
        patch.setattr(process.process, "communicate", lambda: None)
        with pytest.raises(KeyboardInterrupt):
            process.same_value("1", "2")
    assert process.same_value("\\frac{1}{4}", "0.25")
    process._stop()


def test_without_math_verify_the_reward_raises_and_does_not_score_0(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="math_verify.*broken on purpose"):
        rewards_module._MathProcess().same_value("1", "x")


FAKE_MATH_VERIFY = """
def LatexExtractionConfig(**_): ...
def parse(text, config, parsing_timeout): return text
def verify(gold, candidate, timeout_seconds):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "same"),
    [
        ("return True", True),
        ("print(1); return False", False),  # what a library prints is no reply
        ("bytearray(5 * 2**30); return True", False),  # more memory than the limit
        ("raise RecursionError", False),
    ],
)
def test_only_a_comparison_that_finishes_within_its_memory_and_says_so_counts(monkeypatch, tmp_path, body, same):
    (tmp_path / "math_verify.py").write_text(FAKE_MATH_VERIFY.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = rewards_module._MathProcess()
    assert process.same_value("x", "y") == same
    assert process.same_value("x", "y") == same
    assert process.process.poll() is None
    process._stop()


def test_importing_the_module_does_not_import_math_verify():
    code = "import sys, pte.learn.rewards; print('math_verify' in sys.modules, 'sympy' in sys.modules)"
    path = str(Path(rewards_module.__file__).parents[2])
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert output.stdout.split() == ["False", "False"]


def test_math_reward_refuses_another_number_of_answers():
    with pytest.raises(ValueError, match=r"answer must have one entry for each completion \(2\), got 1"):
        math_reward(["a", "b"], ["1"])


# ---- a user's function


def user_reward(prompts, completions, completion_ids, **columns):
    return [len(completion) + columns["weight"][0] for completion in completions]


def compute(function, completions=("ab", "c"), **changes):
    arguments = {
        "prompts": ["p"] * 2,
        "completions": list(completions),
        "completion_ids": [[1, 2], [3]],
        "columns": {"weight": [10, 10]},
    }
    return compute_rewards(function, **{**arguments, **changes})


def test_a_function_with_trls_signature_gets_everything_by_keyword():
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [0, 1]

    assert compute(reward) == [0.0, 1.0]
    assert seen == {
        "prompts": ["p", "p"],
        "completions": ["ab", "c"],
        "completion_ids": [[1, 2], [3]],
        "columns": {"weight": [10, 10]},
    }


def test_a_named_function_is_loaded_and_scores():
    assert load_reward("pte.learn.rewards:math_reward") is math_reward
    assert compute(user_reward) == [12.0, 11.0]


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.int64(1)])
def test_every_kind_of_real_number_becomes_a_float(value):
    scored = compute(lambda **_: [value, 0])
    assert scored == [1.0, 0.0]
    assert all(type(reward) is float for reward in scored)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", [1], 1j, torch.tensor(1.0)])
def test_a_reward_that_is_no_finite_number_is_refused_with_function_index_and_value(value):
    def my_reward(**_):
        return [0.0, value]

    with pytest.raises(ValueError, match=r"my_reward must return finite numbers, got .* at index 1; return 0.0"):
        compute(my_reward)


def test_none_is_refused_and_the_text_says_what_to_return():
    with pytest.raises(ValueError, match=r'got None at index 0: TRL\'s "does not apply" .* return 0.0'):
        compute(lambda **_: [None, 1.0])


@pytest.mark.parametrize("returned", [[1.0], [1.0, 2.0, 3.0], []])
def test_the_wrong_number_of_rewards_is_refused(returned):
    with pytest.raises(ValueError, match=rf"one reward for each completion \(2\), got {len(returned)}"):
        compute(lambda **_: returned)


@pytest.mark.parametrize("returned", [1.0, None, torch.ones(2), (x for x in (1, 2))])
def test_something_other_than_a_list_is_refused(returned):
    with pytest.raises(TypeError, match="must return a list of numbers, got"):
        compute(lambda **_: returned)


def test_a_function_that_raises_is_named_and_its_error_is_the_cause():
    def failing_reward(**_):
        raise KeyError("difficulty")

    with pytest.raises(RuntimeError, match=r"failing_reward.*KeyError.*2 completions and the columns weight") as caught:
        compute(failing_reward)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"prompts": ["p"]}, "prompts"),
        ({"completion_ids": []}, "completion_ids"),
        ({"columns": {"answer": ["1"]}}, "answer"),
    ],
)
def test_arguments_of_unequal_length_are_refused(changes, name):
    with pytest.raises(ValueError, match=rf"{name} must have one entry for each completion \(2\)"):
        compute(user_reward, **changes)


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_with_a_reserved_name_is_refused(name):
    with pytest.raises(ValueError, match=f"reserved names, got '{name}'"):
        compute(user_reward, columns={name: ["a", "b"]})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("math_reward", 'must be written "module:function"'),
        (":math_reward", 'must be written "module:function"'),
        ("pte.learn.rewards:", 'must be written "module:function"'),
        ("no_such_module_here:f", "PYTHONPATH"),
        ("pte.learn.rewards:math_rewrd", "did you mean pte.learn.rewards:math_reward"),
        ("pte.learn.rewards:zzzzzz", "define it there"),
        ("pte.learn.rewards:BOX", "must name a function of pte.learn.rewards"),
    ],
)
def test_a_name_that_stands_for_no_function_is_refused(name, text):
    with pytest.raises(ValueError, match=text):
        load_reward(name)
