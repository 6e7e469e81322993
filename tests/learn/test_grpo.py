"""One GRPO step on the embedded reasoner: law 1, what moves and what does not, and when a run is stopped or warned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pte.learn.grpo import GrpoStage
from pte.learn.optimizer import TrainingStopped
from pte.learn.scored import score_rollouts
from pte.learn.trainer import build_stages
from pte.rollout.replay import Replay
from pte.session import Session
from short_runs import equal, largest_difference, odd_ids, open_short, parameters, rewarded, tied

pytestmark = pytest.mark.system

# Traces of 24 tokens: evictions before tokens 8, 12, 16, 20.
SHORTER = {
    "distill__steps": 0,
    "task__num_statements": 2,
    "cache__window_tokens": 8,
    "rollout__max_new_tokens": 26,
    "rollout__temperature": 1.5,
}

LONGER = {"task__num_statements": 4, "cache__window_tokens": 16, "rollout__max_new_tokens": 56}


def stage_of(reward: Callable[..., list[float]] | None = odd_ids, **changes: object) -> tuple[GrpoStage, Session]:
    config, session = open_short(**{**SHORTER, **changes})
    if reward is not None:
        session = rewarded(session, reward)
    (stage,) = build_stages(session, config)
    assert isinstance(stage, GrpoStage)
    return stage, session


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_rollout_and_replay_are_one_policy_at_every_step(temperature: float) -> None:
    stage, session = stage_of(
        **LONGER, train__group_size=8, rollout__temperature=temperature, train__learning_rate=3e-3
    )
    for index in range(3):
        before = parameters(session)
        metrics = stage.step(index).metrics
        assert metrics["evictions"] >= 7
        assert metrics["logprob_gap_max"] < 1e-10
        assert metrics["logprob_gap_mean"] <= metrics["logprob_gap_max"]
        assert abs(metrics["logprob_gap_kl"]) < 1e-15
        assert not equal(before, parameters(session)), "the next step must show the gap of another policy"


@pytest.mark.parametrize("policy", ["h2o", "scissorhands", "tova", "snapkv", "rkv", "keydiff"])
@pytest.mark.parametrize("reference", ["full", "bounded"])
def test_under_a_policy_that_looks_at_attention_the_gap_is_none(policy: str, reference: str) -> None:
    options = {"train__kl_beta": 0.1, "train__reference": reference, "train__learning_rate": 3e-3}
    stage, session = stage_of(**LONGER, cache__policy=policy, **options)
    for index in range(2):
        before = parameters(session)
        metrics = stage.step(index).metrics
        assert metrics["evictions"] >= 7 and metrics["logprob_gap_max"] < 1e-10
        assert metrics["kl"] > 0 and not equal(before, parameters(session))


def test_in_float32_the_gap_of_a_trained_model_is_rounding_alone() -> None:
    """Off its own traces the reasoner turns rounding into some 1e-5 nats: rollout and replay are each 2e-5 off."""
    stage, _ = stage_of(**LONGER, rollout__temperature=1.0, double=False)
    for index in range(2):
        metrics = stage.step(index).metrics
        assert metrics["logprob_gap_max"] < 1e-4
        assert metrics["logprob_gap_mean"] < 2e-6
        assert metrics["logprob_gap_kl"] < 1e-10


def test_with_several_updates_on_a_batch_the_gap_is_that_of_the_first() -> None:
    stage, _ = stage_of(train__minibatches_per_step=2, train__learning_rate=0.05)
    metrics = stage.step(0).metrics
    assert metrics["ratio"] != pytest.approx(1, abs=1e-4), "the second update sees a policy that has moved"
    assert metrics["logprob_gap_max"] < 1e-10


@pytest.mark.parametrize(("reward", "walks"), [(odd_ids, [0, 1]), (tied, [1, 1])], ids=["learning", "tied"])
def test_the_policy_that_sampled_is_walked_once(
    reward: Callable[..., list[float]], walks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The walk without a graph: none where the backward walk compares, one where the policy has moved or nothing learns.
    stage, _ = stage_of(reward)
    scored = [replace(one, advantage=0.0 if reward is tied else 1.0) for one in stage.sample_groups(0, 0, count=1)[0]]
    found = []
    walk = Replay.walk
    monkeypatch.setattr(Replay, "walk", lambda self, batch: found.append(batch) or walk(self, batch))
    for first, expected in zip((True, False), walks, strict=True):
        found.clear()
        metrics = stage.update(scored, first=first)
        assert len(found) == expected
        assert metrics["ratio"] == pytest.approx(1, abs=1e-12) or not first
        assert metrics["entropy"] > 0


def test_groups_that_all_tie_leave_the_adapter_alone_and_the_step_says_so() -> None:
    stage, session = stage_of(tied)
    before = parameters(session)
    result = stage.step(0)
    assert equal(before, parameters(session))
    assert result.metrics["grad_norm"] == 0
    assert result.metrics["tied_groups_fraction"] == 1
    assert any("all 2 groups tie (reward 0.5): this step has no gradient; use" in text for text in result.warnings)


def test_one_group_of_mixed_rewards_moves_the_adapter() -> None:
    def first_of_all(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [1.0] + [0.0] * (len(completion_ids) - 1)

    stage, session = stage_of(first_of_all)
    before = parameters(session)
    result = stage.step(0)
    assert result.metrics["tied_groups_fraction"] == 0.5
    assert result.metrics["grad_norm"] > 0
    assert not equal(before, parameters(session))
    assert not any("tie" in text for text in result.warnings)


def test_only_the_adapter_moves_and_the_base_stays_bit_for_bit() -> None:
    stage, session = stage_of(train__kl_beta=0.1)
    base = {name: tensor.clone() for name, tensor in session.policy.base.state_dict().items()}
    for index in range(2):
        stage.step(index)
    after = session.policy.base.state_dict()
    assert base.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.items())
    assert not any(parameter.requires_grad for parameter in session.policy.base.parameters())


def test_one_step_at_the_papers_learning_rate_moves_an_adapter_beside_a_bfloat16_base() -> None:
    stage, session = stage_of(double=False, model__dtype="bfloat16", train__learning_rate=1e-5)
    before = parameters(session)
    metrics = stage.step(0).metrics
    after = parameters(session)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    moved = torch.cat([(before[name] != after[name]).flatten() for name in before]).float().mean().item()
    assert moved > 0.95
    assert metrics["logprob_gap_max"] < 1.0


def test_accumulation_gives_the_same_step_in_micro_batches_of_any_size() -> None:
    results = []
    for size in (1, 2, 8):
        stage, session = stage_of(train__micro_batch_size=size)
        stage.step(0)
        results.append(parameters(session))
    assert max(largest_difference(results[-1], other) for other in results[:-1]) < 1e-9


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_a_batch_is_cut_into_as_many_optimizer_steps_as_asked(updates: int) -> None:
    stage, _ = stage_of(train__minibatches_per_step=updates)
    stage.step(0)
    assert stage.optimizer.steps == updates
    assert stage.optimizer.total_steps == 2 * updates
    stage.step(1)
    assert stage.optimizer.steps == 2 * updates


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_every_loss_takes_a_step_of_its_own(loss: str) -> None:
    stage, session = stage_of(train__loss=loss)
    before = parameters(session)
    result = stage.step(0)
    rewards = torch.tensor([row["reward"] for row in result.completions]).view(2, 4)
    advantages = torch.tensor([row["advantage"] for row in result.completions]).view(2, 4)
    assert math.isfinite(result.metrics["loss"]) and result.metrics["grad_norm"] > 0
    assert not equal(before, parameters(session))
    assert result.metrics["ratio"] == pytest.approx(1, abs=1e-9)
    # dr_grpo leaves the rewards' scale; the others divide by the group's deviation.
    centred = rewards - rewards.mean(1, keepdim=True)
    if loss == "dr_grpo":
        torch.testing.assert_close(advantages, centred)
    else:
        assert advantages.abs().max() > centred.abs().max()


def kl_gradient(**changes: object) -> dict[str, torch.Tensor]:
    """The gradient of a step whose rewards tie, so that all of it comes from the KL term."""
    stage, session = stage_of(tied, train__kl_beta=0.5, **changes)
    gradients: dict[str, torch.Tensor] = {}

    def keep() -> tuple[float, float]:
        gradients.update({name: p.grad.clone() for name, p in session.policy.adapter.named_parameters()})
        return 0.0, 0.0

    stage.optimizer.step = keep
    metrics = stage.step(0).metrics
    assert metrics["kl"] > 0
    return gradients


def test_the_kl_term_pulls_towards_the_reference_that_is_asked_for() -> None:
    full, bounded = kl_gradient(train__reference="full"), kl_gradient(train__reference="bounded")
    assert largest_difference(full, bounded) > 1e-4
    # Before any eviction there is one base: a window longer than the completion makes the two the same.
    uncut = {"cache__window_tokens": 32, "cache__evict_tokens": 32}
    same = largest_difference(
        kl_gradient(train__reference="full", **uncut), kl_gradient(train__reference="bounded", **uncut)
    )
    assert same < 1e-9


def test_the_kl_term_brings_the_policy_back_to_the_base() -> None:
    stage, _ = stage_of(tied, train__kl_beta=1.0, train__learning_rate=2e-4, train__reference="bounded")
    rollouts = [one for group in stage.sample_groups(0, 0, count=2) for one in group]
    divergences = [stage.update(rollouts, first=index == 0)["kl"] for index in range(6)]
    assert divergences[-1] < 0.5 * divergences[0]


def test_without_a_kl_term_there_is_no_reference_to_run() -> None:
    stage, _ = stage_of()
    assert stage.reference is None
    assert stage.step(0).metrics["kl"] == 0


def mixed_for(*problems: str) -> Callable[..., list[float]]:
    """A reward that splits the groups of the named problems and ties all others."""

    def reward(completion_ids: list[list[int]], id: list[str], **_: object) -> list[float]:
        return [float(index % 2) if name in problems else 0.0 for index, name in enumerate(id)]

    return reward


def problem_names(session: Session, count: int) -> list[str]:
    return [session.task.training(position).problem.id for position in range(count)]


def test_dynamic_sampling_draws_further_prompts_until_all_groups_are_mixed() -> None:
    _, session = stage_of()
    names = problem_names(session, 8)
    # Rounds take prompts 0 1, then (one kept) 2, then 3: the second mixed one is prompt 3.
    stage, _ = stage_of(mixed_for(names[1], names[3]), train__dynamic_sampling=True)
    result = stage.step(0)
    assert [row["problem_id"] for row in result.completions] == [names[1]] * 4 + [names[3]] * 4
    assert result.metrics["resample_rounds"] == 2
    assert result.metrics["tied_groups_fraction"] == 0
    assert stage.position == 4


def test_dynamic_sampling_ends_after_its_rounds_and_fills_up_with_tied_groups() -> None:
    _, session = stage_of()
    names = problem_names(session, 8)
    stage, _ = stage_of(mixed_for(names[2]), train__dynamic_sampling=True, train__max_resample_rounds=2)
    result = stage.step(0)
    # Prompts 0 1 | 2 3 | 4: the mixed one first, then the first that tied.
    assert [row["problem_id"] for row in result.completions] == [names[2]] * 4 + [names[0]] * 4
    assert result.metrics["resample_rounds"] == 2
    assert stage.position == 5


def test_without_dynamic_sampling_tied_groups_stay() -> None:
    _, session = stage_of()
    names = problem_names(session, 2)
    stage, _ = stage_of(mixed_for(names[1]))
    result = stage.step(0)
    assert [row["problem_id"] for row in result.completions] == [names[0]] * 4 + [names[1]] * 4
    assert (result.metrics["resample_rounds"], stage.position) == (0, 2)


def test_dynamic_sampling_looks_at_accuracy_and_not_at_the_reward() -> None:
    stage, session = stage_of(odd_ids, run__seed=1, train__dynamic_sampling=True, train__max_resample_rounds=1)
    stage.task = replace(session.task, accuracy=lambda completions, **_: [0.0] * len(completions))
    result = stage.step(0)
    assert result.metrics["resample_rounds"] == 1
    assert result.metrics["tied_groups_fraction"] == 0


def test_the_same_step_of_the_same_seed_is_the_same_and_another_step_or_seed_is_not() -> None:
    def completions(index: int, seed: int = 0) -> list[str]:
        stage, _ = stage_of(moved=False, run__seed=seed, train__dynamic_sampling=True)
        stage.position = 2 * index
        return [row["completion"] for row in stage.step(index).completions]

    first = completions(0)
    assert first == completions(0)
    assert first != completions(1)
    assert first != completions(0, seed=1)


def test_each_member_of_a_group_has_a_completion_of_its_own() -> None:
    stage, _ = stage_of(train__prompts_per_step=1, train__group_size=8, rollout__temperature=1.5)
    rows = stage.step(0).completions
    assert len({row["problem_id"] for row in rows}) == 1
    assert len({row["completion"] for row in rows}) >= 6


def test_the_metrics_are_what_the_completions_say() -> None:
    stage, _ = stage_of()
    result = stage.step(0)
    metrics, rows = result.metrics, result.completions
    assert len(rows) == 8
    for metric, field in (("reward", "reward"), ("completion_tokens", "tokens"), ("evictions", "evictions")):
        assert metrics[metric] == pytest.approx(statistics.fmean(row[field] for row in rows))
    assert metrics["reward_std"] == pytest.approx(statistics.pstdev(row["reward"] for row in rows))
    cut = statistics.fmean(row["finish_reason"] == "length" for row in rows)
    assert metrics["cut_off_fraction"] == cut
    assert metrics["state_norm"] > 0
    entropy, loss = metrics["entropy"], metrics["loss"]
    assert 0 < entropy < math.log(400) and math.isfinite(loss)
    wanted = {"accuracy", "grad_norm", "tokens_per_second", "peak_memory_bytes", "logprob_gap_max", "learning_rate"}
    assert wanted <= metrics.keys()


def test_a_step_whose_completions_are_all_cut_off_warns() -> None:
    stage, _ = stage_of(rollout__max_new_tokens=16)
    warnings = stage.step(0).warnings
    assert any(text.startswith("100% of the completions were cut off at 16 tokens; raise") for text in warnings)


class AnotherPolicy(Replay):
    """A replay that is not the policy that sampled: every log-prob is off by some nats."""

    off = 0.1

    def scores(self, *arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = super().scores(*arguments, **options)
        return logprobs + self.off, entropies


@pytest.mark.parametrize(
    ("off", "message"),
    [
        (
            0.1,
            r"agree within max_logprob_gap \(0.001 nats\), got 0.1 \(mean 0.1\): they are not the same policy; raise",
        ),
        (math.nan, r"agree within max_logprob_gap \(0.001 nats\), got nan"),
    ],
)
def test_a_replay_of_another_policy_stops_the_run_and_leaves_the_adapter_alone(off: float, message: str) -> None:
    stage, session = stage_of(train__micro_batch_size=2)
    stage.replay = AnotherPolicy(session.policy)
    stage.replay.off = off
    before = parameters(session)
    with pytest.raises(TrainingStopped, match=message):
        stage.step(0)
    assert equal(before, parameters(session))
    assert stage.optimizer.steps == 0
    assert all(parameter.grad is None for parameter in session.policy.adapter.parameters())


def test_a_threshold_of_the_users_own_stops_the_run_earlier_or_later() -> None:
    for threshold, stops in ((0.2, False), (0.05, True)):
        stage, session = stage_of(train__max_logprob_gap=threshold)
        stage.replay = AnotherPolicy(session.policy)
        if stops:
            with pytest.raises(TrainingStopped, match="0.05 nats"):
                stage.step(0)
        else:
            assert stage.step(0).metrics["logprob_gap_max"] == pytest.approx(0.1, abs=1e-9)


def test_a_gradient_that_is_not_finite_stops_before_the_adapter_moves() -> None:
    stage, session = stage_of()
    before = parameters(session)
    parameter = next(session.policy.adapter.parameters())
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingStopped, match="gradient must be finite, got norm (nan|inf)"):
        stage.step(0)
    assert equal(before, parameters(session))


def test_a_reward_sees_the_completion_and_every_field_of_its_problem() -> None:
    stage, session = stage_of()
    seen: dict[str, list[object]] = {}

    def reward(**arguments: list[object]) -> list[float]:
        seen.update(arguments)
        return [0.0] * len(arguments["completions"])

    groups = stage.sample_groups(0, 0, count=2)
    rollouts = [one.rollout for group in groups for one in group]
    problems = [one.problem for group in groups for one in group]
    score_rollouts(rewarded(session, reward).task, rollouts, problems)
    assert set(seen) == {"prompts", "completions", "completion_ids", "answer", "id", "source"}
    assert seen["prompts"] == [problem.problem for problem in problems]
    assert seen["completions"] == [session.task.text(rollout.completion_ids) for rollout in rollouts]
    assert not any("<eos>" in text or "?" in text for text in seen["completions"])


def test_the_stage_goes_on_where_its_saved_state_says() -> None:
    whole, _ = stage_of(train__dynamic_sampling=True)
    rows = [whole.step(index).completions for index in range(2)]
    first, session = stage_of(train__dynamic_sampling=True)
    first.step(0)
    second, other = stage_of(train__dynamic_sampling=True)
    other.policy.adapter.load_state_dict(session.policy.adapter.state_dict())
    second.load_state(first.state())
    assert second.step(1).completions == rows[1]
