"""Overlap of problem sets: against comparing every pair, by hand at the threshold, and on the real sets."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte.tasks.overlap import find_overlap, overlap_warnings, word_grams
from pte.tasks.problems import Problem, load_problems

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]


def problems_of(*texts, answer="7"):
    return [Problem(id=f"p{number}", problem=text, answer=answer, source="") for number, text in enumerate(texts)]


def test_words_are_runs_of_letters_or_digits_whatever_the_case_and_the_markup():
    assert word_grams("If $x2=\\frac{10}{3}$, find Y") == {"if x 2 frac 10 3 find y"}
    assert word_grams("If x_2 = \\frac 10 3: FIND [asy] draw(a--b); [/asy] $y$!") == {"if x 2 frac 10 3 find y"}


def test_fewer_than_eight_words_have_no_gram_and_overlap_with_nothing():
    short = problems_of(" ".join(WORDS[:7]))
    assert find_overlap(short, short).evaluation_ids == ()


def test_exactly_sixty_percent_counts_and_less_does_not():
    # 12 words make 5 grams; a common beginning of 10 words keeps 3 of them (60 %), of 9 words 2 (40 %).
    evaluation = problems_of(" ".join(WORDS[:12]))
    assert find_overlap(problems_of(" ".join(WORDS[:10])), evaluation).evaluation_ids == ("p0",)
    assert find_overlap(problems_of(" ".join(WORDS[:9])), evaluation).evaluation_ids == ()


def test_the_share_is_taken_in_one_training_problem_and_not_in_their_union():
    # 12 words, 5 grams: each half problem holds 2 of them, together 4.
    evaluation = problems_of(" ".join(WORDS[:12]))
    assert find_overlap(problems_of(" ".join(WORDS[:9]), " ".join(WORDS[3:12])), evaluation).evaluation_ids == ()


def test_the_same_answer_is_counted_apart():
    text = " ".join(WORDS)
    evaluation = problems_of(text, answer="7")
    assert find_overlap(problems_of(text, answer="8"), evaluation).same_answer_ids == ()
    assert find_overlap([*problems_of(text, answer="8"), *problems_of(text)], evaluation).same_answer_ids == ("p0",)


TEXTS = st.lists(st.lists(st.sampled_from("ab"), min_size=6, max_size=14).map(" ".join), min_size=1, max_size=5)


@given(TEXTS, TEXTS)
def test_the_index_finds_what_comparing_every_pair_finds(training_texts, evaluation_texts):
    training, evaluation = problems_of(*training_texts), problems_of(*evaluation_texts)
    expected = []
    for problem in evaluation:
        grams = word_grams(problem.problem)
        shares = [len(grams & word_grams(other.problem)) / len(grams) for other in training if grams]
        if any(share >= 0.6 for share in shares):
            expected.append(problem.id)
    assert find_overlap(training, evaluation).evaluation_ids == tuple(expected)


@pytest.fixture(scope="module")
def dapo():
    path = DATA / "dapo_math_sample.jsonl"
    if not path.is_file():
        pytest.skip("the data set dapo_math_sample.jsonl is not in ../shared/data")
    return load_problems(path)


def test_the_real_sets_overlap_as_their_readme_says(dapo):
    names = ("amc23", "olympiadbench", "math500", "aime24", "aime25", "minerva_math", "gsm8k_test")
    evaluation = [problem for name in names for problem in load_problems(DATA / f"{name}.jsonl")]
    overlap = find_overlap(dapo, evaluation)
    source_of = {p.id: name for name in names for p in load_problems(DATA / f"{name}.jsonl")}
    counts = {
        name: tuple(sum(source_of[i] == name for i in ids) for ids in (overlap.evaluation_ids, overlap.same_answer_ids))
        for name in names
    }
    assert counts == {
        "amc23": (23, 20),
        "olympiadbench": (56, 17),
        "math500": (25, 12),
        "aime24": (0, 0),
        "aime25": (0, 0),
        "minerva_math": (0, 0),
        "gsm8k_test": (0, 0),
    }


def write_problems(path, problems):
    path.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in problems), encoding="utf-8")
    return path


def test_the_warning_names_both_files_the_counts_and_what_to_do(tmp_path):
    text = " ".join(WORDS)
    train = write_problems(tmp_path / "train.jsonl", problems_of(text))
    eval_ = write_problems(tmp_path / "eval.jsonl", problems_of("something else", *[text] * 4))
    assert overlap_warnings(train, eval_) == [
        "4 of the 5 problems of eval.jsonl also stand in train.jsonl (4 with the same answer): p1, p2, p3, .... "
        "Scores on them are not held-out scores; train on another set, or report the score without these problems."
    ]


def test_sets_without_overlap_give_no_warning(tmp_path):
    train = write_problems(tmp_path / "train.jsonl", problems_of("one two three"))
    assert overlap_warnings(train, write_problems(tmp_path / "eval.jsonl", problems_of(" ".join(WORDS)))) == []


def test_a_missing_or_broken_file_is_refused_as_when_loading(tmp_path):
    good = write_problems(tmp_path / "good.jsonl", problems_of("one"))
    with pytest.raises(FileNotFoundError, match="problem file must exist"):
        overlap_warnings(tmp_path / "nowhere.jsonl", good)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    with pytest.raises(ValueError, match="broken.jsonl, line 1"):
        overlap_warnings(good, broken)
