"""Suites: which number is a set's score, what is averaged, and how sampled sets are drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pte.config import EvalConfig, ExperimentConfig, RolloutConfig
from pte.tasks.evaluate import Evaluation
from pte.tasks.suites import SUITES, incomplete_sets, set_experiments, suite_scores


def evaluation(name: str, problems: int, accuracy: float, pass_at: dict[int, float]) -> Evaluation:
    return Evaluation(name, problems, max(pass_at), accuracy, (0.0, 1.0), pass_at, 9.0, 0.0, 0.0, 1, 0, 1.0)


def published() -> dict[str, Evaluation]:
    """The paper's PTE row of the 8B base; the sixth set is what its average leaves for it."""
    scores = {"math500": 0.576, "olympiadbench": 0.397, "amc23": 0.6, "minerva_math": 0.163}
    found = {
        one.name: evaluation(one.name, one.problems, scores.get(one.name, 0.01), {1: scores.get(one.name, 0.01)})
        for one in SUITES["math6"]
    }
    for name, value in (("aime24", 0.567), ("aime25", 0.433)):
        found[name] = replace(found[name], samples_per_problem=16, pass_at={1: 0.01, 16: value})
    return found


def test_the_score_of_aime_is_pass_at_16_and_the_average_is_over_six_sets() -> None:
    scores = suite_scores("math6", published())
    # 57.6 + 39.7 + 60.0 + 56.7 + 43.3 + 16.3 = 273.6, a sixth of it is 45.6: the table's average.
    assert list(scores.values()) == pytest.approx([0.576, 0.397, 0.6, 0.567, 0.433, 0.163, 0.456])
    assert list(scores)[3:5] == ["AIME24", "AIME25"]


def test_there_is_no_average_before_the_last_set() -> None:
    found = published()
    del found["minerva_math"]
    assert "average" not in suite_scores("math6", found) and len(suite_scores("math6", found)) == 5


@pytest.mark.parametrize(("own", "drawn"), [(0.0, 0.9), (0.6, 0.6)])
def test_sampled_sets_are_drawn_at_the_experiment_s_temperature_or_at_the_rollouts(own: float, drawn: float) -> None:
    config = ExperimentConfig(rollout=RolloutConfig(temperature=0.9), eval=EvalConfig(temperature=own, problems=7))
    experiments = set_experiments(config, "math6")
    for one in SUITES["math6"]:
        settings = experiments[one.name].eval
        assert settings.problems == 7
        if one.samples is None:
            assert settings == config.eval
        else:
            assert (settings.temperature, settings.samples_per_problem, settings.pass_at) == (drawn, 16, (1, 16))


def test_a_set_that_is_cut_short_is_named() -> None:
    found = published()
    assert incomplete_sets("math6", found) == []
    found["aime25"] = replace(found["aime25"], problems=2)
    assert incomplete_sets("math6", found) == [
        "AIME25 was scored on 2 problems, the set has 30: the score is not comparable"
    ]
