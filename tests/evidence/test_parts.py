"""What a part of an evidence run leaves behind, also where it was killed or had to stop."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from killed import exit_code_of, has_lines
from pte.evidence.measurements import Label, Origin, part_file
from pte.evidence.parts import BasePart, ScoredPart, TrainedPart, fingerprint_of, run_part
from pte.evidence.readings import Reading
from pte.report.runs import read_run
from pte.tasks import bases, multiplication
from pte.tasks.base_training import BaseSettings, BaseSize
from pte.tasks.bases import BaseRecipe
from pte.tasks.generated import GeneratedProblem
from short_runs import short_config

pytestmark = pytest.mark.system

Row = dict[str, object]
ORIGIN = Origin(commit="abc", hardware={"cores": 2}, versions={"python": "3.11"})


def trained_part(**changes: object) -> TrainedPart:
    """Both stages in miniature, scored between them and in the end, with curve and cost."""
    config = short_config(**{"distill__learning_rate": 1e-2, "train__checkpoint_every": 1, **changes})

    def readings(stage: str) -> tuple[Reading, ...]:
        greedy = Label("stages", "chained", "pte_delta", stage, 0, {"sampling": "greedy"})  # type: ignore[arg-type]
        sampled = replace(config, eval=replace(config.eval, temperature=1.0, samples_per_problem=2))
        return (Reading(greedy, config), Reading(replace(greedy, setting={"sampling": "temperature 1"}), sampled))

    return TrainedPart(
        name="miniature",
        config=config,
        arm="pte_delta",
        readings=readings("both"),
        between=readings("warm_start"),
        curve=Label("rl", "chained", "pte_delta", "both", 0, {"windows": 3}),
        cost=Label("training", "chained", "pte_delta", "both", 0),
        shown=True,
    )


def rows_of(directory: Path, part: str = "miniature") -> list[Row]:
    return json.loads(part_file(directory, part).read_text())["measurements"]


def of(rows: Sequence[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "runs" / "miniature" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part that nobody interrupts."""
    directory = tmp_path_factory.mktemp("evidence")
    run_part(trained_part(), directory, ORIGIN)
    return directory


def test_a_part_is_scored_between_its_stages_and_in_the_end_by_every_reading(done: Path) -> None:
    part, rows = trained_part(), rows_of(done)
    for reading in (*part.between, *part.readings):
        label = reading.label
        (accuracy,) = of(rows, question="stages", stage=label.stage, setting=dict(label.setting), metric="accuracy")
        total = reading.config.eval.problems * reading.config.eval.samples_per_problem  # type: ignore[operator]
        assert reading.config.eval.problems <= accuracy["total"] <= total  # type: ignore[operator]
        assert accuracy["right"] == round(accuracy["value"] * accuracy["total"])  # type: ignore[operator]
    before, after = (of(rows, question="stages", stage=stage) for stage in ("warm_start", "both"))
    assert [row["metric"] for row in before] == [row["metric"] for row in after]
    (rollouts,) = (done / "rollouts").glob("*.json")
    assert len(json.loads(rollouts.read_text())) == 8


def test_the_curve_adds_up_the_seconds_and_tokens_of_the_reinforcement_steps_alone(done: Path) -> None:
    grpo = [row for row in metrics_of(done) if row["stage"] == "grpo"]
    assert [row["step"] for row in grpo] == [3, 4], "two steps of warm start come before"
    curve = of(rows_of(done), question="rl", metric="reward")
    seconds = tokens = 0.0
    for row, point in zip(grpo, curve, strict=True):
        # 2 prompts a step, 4 completions each.
        seconds, tokens = seconds + row["seconds"], tokens + 8 * row["completion_tokens"]
        assert point["value"] == row["reward"]
        assert point["setting"] == {
            "windows": 3,
            "step": row["step"],
            "seconds": pytest.approx(seconds, abs=0.006),
            "tokens": pytest.approx(tokens),
        }
    for name in ("accuracy", "logprob_gap_max", "completion_tokens", "entropy"):
        assert [row["value"] for row in of(rows_of(done), question="rl", metric=name)] == [row[name] for row in grpo]


def test_the_cost_of_a_step_is_the_middle_one_of_the_last_stage(done: Path) -> None:
    (cost,) = of(rows_of(done), question="training")
    # The upper middle of two steps is the slower one.
    assert cost["metric"] == "step_seconds"
    assert cost["value"] == max(row["seconds"] for row in metrics_of(done) if row["stage"] == "grpo")


def test_the_report_reads_every_row_as_it_was_written(done: Path) -> None:
    (part,) = read_run(str(done)).parts
    assert part.name == "miniature"
    for row, one in zip(rows_of(done), part.measurements, strict=True):
        written = {**row, "setting": tuple(row["setting"].items())}  # type: ignore[attr-defined]
        assert written == {name: getattr(one, name) for name in written}


def without_seconds(rows: Sequence[Row]) -> list[Row]:
    """What must be equal however long it took."""
    kept = [row for row in rows if row["metric"] != "step_seconds"]
    return [
        {**row, "setting": {key: value for key, value in row["setting"].items() if key != "seconds"}}  # type: ignore[attr-defined]
        for row in kept
    ]


def test_a_part_killed_between_the_stages_and_in_the_last_step_measures_what_an_uninterrupted_one_does(
    done: Path, tmp_path: Path
) -> None:
    work, own = partial(run_part, trained_part(), tmp_path, ORIGIN), tmp_path / "runs" / "miniature"
    assert exit_code_of(work, (own / ".unfinished-between.json").exists) == -9
    assert has_lines(own / "metrics.jsonl", 2) and not has_lines(own / "metrics.jsonl", 3)
    assert exit_code_of(work, partial(has_lines, own / "metrics.jsonl", 4)) == -9
    assert not part_file(tmp_path, "miniature").exists(), "a part that is not done has no file"
    run_part(trained_part(), tmp_path, ORIGIN)
    assert without_seconds(rows_of(tmp_path)) == without_seconds(rows_of(done))
    assert len(of(rows_of(tmp_path), question="rl", metric="reward")) == 2


def test_a_run_that_stops_in_grpo_is_a_measurement_beside_what_was_measured_before(tmp_path: Path) -> None:
    run_part(trained_part(train__max_logprob_gap=1e-30), tmp_path, ORIGIN)
    rows = rows_of(tmp_path)
    (stopped,) = of(rows, metric="stopped_at_step")
    # Two steps of warm start, whose float32 replay nobody compares; the third samples and replays.
    assert (stopped["value"], stopped["stage"], stopped["setting"]) == (3, "both", {"sampling": "greedy"})
    assert len(of(rows, question="stages", stage="warm_start", metric="accuracy")) == 2
    assert not of(rows, question="stages", stage="both", metric="accuracy")
    assert not of(rows, question="rl")


def test_a_run_that_stops_at_its_very_first_step_is_a_measurement_too(tmp_path: Path) -> None:
    part = replace(trained_part(distill__steps=0, train__max_logprob_gap=1e-30), between=(), shown=False)
    run_part(part, tmp_path, ORIGIN)
    (row,) = rows_of(tmp_path)
    assert (row["metric"], row["value"]) == ("stopped_at_step", 1)


def test_a_run_that_stops_in_its_warm_start_has_no_scores_between_the_stages(tmp_path: Path) -> None:
    # The first update throws the adapter far away, the loss of the second step is not finite.
    run_part(replace(trained_part(distill__learning_rate=1e30), shown=False), tmp_path, ORIGIN)
    rows = rows_of(tmp_path)
    assert [(row["metric"], row["value"]) for row in rows if row["metric"] != "step_seconds"] == [
        ("stopped_at_step", 2)
    ]


def test_a_base_is_scored_under_the_full_cache_and_under_the_window_from_one_session(tmp_path: Path) -> None:
    config = short_config()
    readings = tuple(Reading(Label("arms", "chained", arm), config) for arm in ("base_full", "base_window"))
    run_part(ScoredPart("base", readings), tmp_path, ORIGIN)
    values = {(row["arm"], row["metric"]): row["value"] for row in rows_of(tmp_path, "base")}
    assert values["base_full", "accuracy"] == 1.0, "the embedded reasoner solves four statements"
    assert values["base_full", "evictions"] == 0 < values["base_window", "evictions"]
    assert values["base_full", "cache_bytes"] > values["base_window", "cache_bytes"]
    assert {row["stage"] for row in rows_of(tmp_path, "base")} == {"none"}


def draw(rng: random.Random, done: float) -> list[GeneratedProblem]:
    return multiplication.generate_problems(4, seed=rng.getrandbits(48), split="train")


def test_a_base_is_made_once_and_its_record_becomes_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = BaseSize(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1)
    shape = {"left_digits": 2, "right_digits": 1}
    recipe = BaseRecipe(
        families=("multiplication",),
        draw_batch=draw,
        settings=BaseSettings(steps=2, warmup_steps=1, size=size),
        measured=(("multiplication", shape),),
    )
    monkeypatch.setitem(bases.RECIPES, "tiny", recipe)
    monkeypatch.setattr(bases, "MEASURED_PROBLEMS", 4)
    part = BasePart("base-tiny", "tiny")
    run_part(part, tmp_path, ORIGIN)
    accuracy, parameters, seconds = rows_of(tmp_path, "base-tiny")
    record = json.loads((tmp_path / "bases" / "tiny" / "training.json").read_text())
    assert (accuracy["question"], accuracy["task"], accuracy["setting"]) == ("bases", "multiplication", shape)
    assert (accuracy["right"], accuracy["total"]) == (0, 4), "two steps teach nothing"
    assert (parameters["metric"], parameters["value"]) == ("parameters", record["parameters"])
    assert (seconds["metric"], seconds["value"]) == ("training_seconds", record["training_seconds"])
    lines = (tmp_path / "runs" / "base-tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2], "a bar can follow it"
    weights = tmp_path / "bases" / "tiny" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    run_part(part, tmp_path, ORIGIN)
    assert weights.stat().st_mtime_ns == made


def test_a_part_says_by_which_code_on_which_machine_and_with_which_settings_it_was_measured(done: Path) -> None:
    content = json.loads(part_file(done, "miniature").read_text())
    assert (content["commit"], content["hardware"], content["versions"]) == ("abc", {"cores": 2}, {"python": "3.11"})
    assert content["fingerprint"] == fingerprint_of(trained_part(), done)


def test_a_fingerprint_changes_with_settings_and_with_those_of_the_base_and_not_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(directory: Path, **changes: object) -> str:
        config = short_config(**changes)
        config = replace(config, model=replace(config.model, path=str(directory / "bases" / "recall")))
        return fingerprint_of(replace(trained_part(), config=config, after="base-recall"), directory)

    here = made(tmp_path)
    assert made(tmp_path / "elsewhere") == here
    assert made(tmp_path, distill__learning_rate=2e-2) != here
    # Left out only where it says what was done before there was a choice: it does change what a step costs.
    assert made(tmp_path, train__gradient_checkpointing=True) != here
    settings = replace(bases.RECIPES["recall"].settings, steps=7)
    monkeypatch.setitem(bases.RECIPES, "recall", replace(bases.RECIPES["recall"], settings=settings))
    assert made(tmp_path) != here


def test_what_was_begun_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    own = tmp_path / "runs" / "miniature"
    part = trained_part()
    assert exit_code_of(partial(run_part, part, tmp_path, ORIGIN), partial(has_lines, own / "metrics.jsonl", 1)) == -9
    other = replace(part, config=replace(part.config, adapter=replace(part.config.adapter, rank=3)))
    with pytest.raises(ValueError, match=r"must have the settings that it was begun with; .* or delete .*miniature"):
        run_part(other, tmp_path, ORIGIN)
