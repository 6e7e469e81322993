"""The warm start: what is imitated, that the loss falls, and that a fresh adapter has nothing to learn uncut."""

from __future__ import annotations

import pytest
import torch

from pte.learn.distill import DistillStage
from pte.learn.optimizer import TrainingStopped
from pte.learn.trainer import build_stages
from pte.rollout.record import collate
from pte.rollout.replay import Replay
from short_runs import equal, largest_difference, open_short, parameters, text_model, write_problems, write_traces

pytestmark = pytest.mark.system


def stage_of(**changes: object):
    config, session = open_short(train__steps=0, **changes)
    (stage,) = build_stages(session, config)
    assert isinstance(stage, DistillStage)
    return stage, session


def test_the_loss_of_a_step_is_the_mean_negative_logprob_of_the_right_traces() -> None:
    stage, session = stage_of()
    problems = [session.task.training(4 + row) for row in range(4)]
    batch = collate(
        [session.task.prompt_ids(one.problem) for one in problems],
        [session.task.completion_ids(one.trace) for one in problems],
        stream_seeds=range(4),
        temperature=1.0,
    )
    with torch.no_grad():
        output = Replay(session.policy)(batch)
    metrics = stage.step(1).metrics
    assert metrics["loss"] == pytest.approx(-output.policy_logprobs.sum().item() / (4 * 44), rel=1e-9)
    assert metrics["entropy"] == pytest.approx(output.entropies.sum().item() / (4 * 44), rel=1e-9)
    assert metrics["completion_tokens"] == 44
    # 44 tokens, of which 43 enter: evictions before tokens 16, 20, ..., 40.
    assert metrics["evictions"] == 7


def test_a_step_walks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, session = stage_of()
    before = parameters(session)
    monkeypatch.setattr(Replay, "walk", None)  # the walk without a graph
    assert stage.step(0).metrics["entropy"] > 0
    assert not equal(before, parameters(session))


def test_every_step_takes_the_next_problems_and_a_problem_never_returns() -> None:
    stage, session = stage_of()
    seen = [prompt for index in range(3) for prompt, _ in stage.examples(index)[0]]
    assert seen == [session.task.prompt_ids(session.task.training(position).problem) for position in range(12)]


def test_imitating_traces_brings_their_loss_down() -> None:
    stage, _ = stage_of(distill__steps=6, distill__learning_rate=3e-3, distill__warmup_steps=0, cache__window_tokens=8)
    same = stage.examples(0)
    stage.examples = lambda index: same
    losses = [stage.step(index).metrics["loss"] for index in range(6)]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("policy", ["h2o", "rkv", "snapkv", "keydiff"])
@pytest.mark.parametrize("source", ["traces", "teacher"])
def test_a_warm_start_under_a_policy_that_looks_at_attention_needs_no_record(policy: str, source: str) -> None:
    stage, session = stage_of(cache__policy=policy, distill__source=source)
    before = parameters(session)
    examples = stage.examples(0)
    stage.examples = lambda index: examples
    batch = collate(*zip(*examples[0], strict=True), stream_seeds=range(4), temperature=1.0)
    with torch.no_grad():
        expected = Replay(session.policy)(batch).policy_logprobs.sum().item()
    metrics = stage.step(0).metrics
    assert metrics["evictions"] >= 5
    assert metrics["loss"] == pytest.approx(-expected / sum(len(completion) for _, completion in examples[0]), rel=1e-9)
    assert not equal(before, parameters(session))


def test_a_fresh_adapter_under_a_full_cache_is_its_teacher() -> None:
    stage, session = stage_of(distill__source="teacher", cache__policy="none")
    adapter = session.policy.adapter
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith(".up"):
                parameter.zero_()
    metrics = stage.step(0).metrics
    assert abs(metrics["teacher_kl"]) < 1e-9
    assert metrics["loss"] > 1e-6, "the teacher is not certain of its tokens, so the loss itself is above 0"
    assert metrics["evictions"] == 0


def test_under_the_window_the_student_is_far_from_its_teacher() -> None:
    stage, _ = stage_of(distill__source="teacher")
    assert stage.step(0).metrics["teacher_kl"] > 0.05


def test_the_teacher_is_the_base_with_its_full_cache_whatever_the_adapter_is() -> None:
    stage, session = stage_of(distill__source="teacher")
    examples, nll = stage.examples(0)
    with torch.no_grad():
        for parameter in session.policy.adapter.parameters():
            parameter.add_(1.0)
    assert stage.examples(0) == (examples, nll)
    assert all(prompt for prompt, _ in examples)


@pytest.mark.parametrize("source", ["traces", "teacher"])
def test_only_the_adapter_moves(source: str) -> None:
    stage, session = stage_of(distill__source=source)
    base = {name: tensor.clone() for name, tensor in session.policy.base.named_parameters()}
    before = parameters(session)
    stage.step(0)
    after = parameters(session)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved and largest_difference(before, after) > 1e-6
    assert all(torch.equal(base[name], tensor) for name, tensor in session.policy.base.named_parameters())


def test_one_step_is_the_same_however_it_is_cut_into_micro_batches() -> None:
    results = []
    for size in (1, 3, 4):
        stage, session = stage_of(distill__micro_batch_size=size)
        stage.step(0)
        results.append(parameters(session))
    assert max(largest_difference(results[0], other) for other in results[1:]) < 1e-9


def test_a_step_depends_on_its_index_alone() -> None:
    stage, session = stage_of(distill__source="teacher")
    before = parameters(session)
    again, other = stage_of(distill__source="teacher")
    assert equal(before, parameters(other))
    assert stage.examples(3) == again.examples(3)
    assert stage.examples(3) != stage.examples(4)


def test_traces_of_a_file_are_imitated_and_problems_without_one_left_out(tmp_path) -> None:
    problems, traces = write_problems(tmp_path / "p.jsonl", 8), write_traces(tmp_path / "t.jsonl", 5)
    stage, session = stage_of(
        model__path=str(text_model(tmp_path)),
        task__kind="jsonl",
        task__train_path=str(problems),
        task__traces_path=str(traces),
        task__boxed_instruction=False,
        distill__batch_size=5,
    )
    examples, _ = stage.examples(0)
    assert len(set(examples)) == 5
    assert all(len(completion) == 44 and completion[-1] in session.task.stop_token_ids for _, completion in examples)
    assert stage.step(0).metrics["completion_tokens"] == 44


def test_traces_where_there_are_none_are_refused_with_both_remedies(tmp_path) -> None:
    with pytest.raises(
        ValueError,
        match=r"distill.source 'traces' needs right traces.* set distill.source to 'teacher', or task.traces_",
    ):
        stage_of(
            model__path=str(text_model(tmp_path)),
            task__kind="jsonl",
            task__train_path=str(write_problems(tmp_path / "p.jsonl")),
        )


def test_a_loss_that_is_not_finite_stops_before_the_parameters_move() -> None:
    stage, session = stage_of()
    before = parameters(session)
    with torch.no_grad():
        weight = session.policy.base.get_parameter("model.norm.weight")
        weight.fill_(float("nan"))
    with pytest.raises(TrainingStopped, match="loss must be finite, got nan"):
        stage.step(0)
    assert equal(before, parameters(session))
