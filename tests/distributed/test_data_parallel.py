"""Two processes are one: the same rollouts, steps and scores, however unequal their shares of the work."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from pte.checkpoint import latest_checkpoint
from pte.learn.optimizer import TrainingStopped
from pte.learn.trainer import CHECKPOINTS
from pte.ranks import ALONE, Ranks, launched_size
from ranked import GRPO, deal, disagree, do_evaluation, do_steps, drift_apart, launched, on_ranks
from short_runs import equal, largest_difference, odd_ids, open_short, parameters, rewarded, tied

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__kl_beta": 0.0, "train__loss": "dapo", "train__reference": "bounded", "cache__policy": "random"},
        {"train__kl_beta": 0.0, "distill__source": "teacher", "train__loss": "gspo", "cache__policy": "h2o"},
    ],
    ids=["kl", "random", "teacher"],
)
def test_two_ranks_do_what_one_process_does(changes: dict[str, object]) -> None:
    settings = {**GRPO, **changes}
    alone, metrics, completions = do_steps(ALONE, settings)
    assert len({tokens for step in completions for tokens in step}) > 3, "completions end anywhere"
    assert any(row.get("resample_rounds") for row in metrics), "some groups are sampled again"
    before = parameters(rewarded(open_short(**settings)[1], odd_ids))
    assert largest_difference(before, alone) > 1e-3, "the adapter moves"
    one, other = on_ranks(partial(do_steps, changes=settings))
    assert equal(one[0], other[0]), "both ranks hold the same adapter, bit for bit"
    assert largest_difference(one[0], alone) < 1e-11
    assert one[1:] == other[1:]
    assert one[2] == completions
    for row, expected in zip(one[1], metrics, strict=True):
        # Clipped fractions are float32; the largest gap is rounding, which depends on who shares a batch.
        assert row.pop("logprob_gap_max", 0) < 1e-10 and expected.pop("logprob_gap_max", 0) < 1e-10
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_rank_without_any_group_waits_for_the_others_and_steps_with_them() -> None:
    settings = {**GRPO, "train__prompts_per_step": 1, "train__minibatches_per_step": 1, "train__steps": 2}
    alone, _, completions = do_steps(ALONE, settings)
    one, other = on_ranks(partial(do_steps, changes=settings))
    assert equal(one[0], other[0]) and largest_difference(one[0], alone) < 1e-11
    assert one[2] == other[2] == completions


def test_where_all_groups_tie_no_rank_moves() -> None:
    settings = {**GRPO, "distill__steps": 0, "train__steps": 1, "train__kl_beta": 0.0, "train__dynamic_sampling": False}
    before = parameters(rewarded(open_short(**settings)[1], tied))
    for result in on_ranks(partial(do_steps, changes=settings, reward=tied)):
        assert equal(result[0], before), "weight decay would move a parameter whose gradient is zero and not absent"
        assert result[1][0]["tied_groups_fraction"] == 1


def test_two_ranks_score_what_one_process_scores() -> None:
    changes = {"eval__problems": 5, "eval__samples_per_problem": 2, "eval__temperature": 1.0, "eval__pass_at": (1, 2)}
    expected, completions = do_evaluation(ALONE, changes)
    for scores, done in on_ranks(partial(do_evaluation, changes=changes)):
        assert (scores.accuracy, scores.ci95, scores.pass_at) == (expected.accuracy, expected.ci95, expected.pass_at)
        assert scores.completion_tokens == expected.completion_tokens and scores.evictions == expected.evictions
        assert [(one.problem.id, one.text, one.right) for one in done] == [
            (one.problem.id, one.text, one.right) for one in completions
        ]


def test_a_stop_of_one_rank_stops_all_with_its_words_and_nothing_is_updated() -> None:
    settings = {**GRPO, "distill__steps": 0, "train__max_logprob_gap": 1e-300}
    assert [words.split(",")[0] for words in on_ranks(partial(do_steps, changes=settings))] == [
        "TrainingStopped: rollout and replay must agree within max_logprob_gap (1e-300 nats)"
    ] * 2
    with pytest.raises(TrainingStopped):
        do_steps(ALONE, settings)


def test_of_adapters_that_have_drifted_apart_no_checkpoint_is_written(tmp_path: Path) -> None:
    for words in on_ranks(partial(drift_apart, directory=tmp_path)):
        assert words.startswith("TrainingStopped: the adapters of all ranks must be the same, got sums [")
    assert latest_checkpoint(tmp_path / "run" / CHECKPOINTS) is None


def test_what_one_rank_raises_all_learn() -> None:
    assert on_ranks(partial(disagree, kind=ValueError, rank=1)) == ["ValueError: no more"] * 2
    first, other = on_ranks(partial(disagree, kind=OSError, rank=1))
    assert (first, other) == ("RankLost: rank 1 has failed (no more)", "OSError: no more")


def test_work_is_dealt_in_turns_and_gradients_are_added_where_any_rank_has_one() -> None:
    # Five items: 0, 2, 4 and 1, 3. Gradients 1 + 2 on both, 5 on one, none on any.
    assert on_ranks(partial(deal, count=5)) == [
        ([0, 2, 4], [0, 1, 2, 3, 4], [3, 5, -1]),
        ([1, 3], [0, 1, 2, 3, 4], [3, 5, -1]),
    ]
    assert deal(ALONE, 2) == ([0, 1], [0, 1], [1, 5, -1])


def test_states_are_not_shuffled_over_ranks() -> None:
    changes = {"eval__state_control": "shuffled"}
    for words in on_ranks(partial(do_evaluation, changes=changes)):
        assert "state_control 'shuffled' needs one process, whose sequences are neighbours, got 2 ranks" in words


def test_half_a_launcher_and_what_we_would_ignore_of_a_whole_one_are_refused() -> None:
    whole = launched(0, 2, 1)
    assert launched_size({}) == 1 and launched_size({"WORLD_SIZE": "1"}) == 1 and launched_size(whole) == 2
    with pytest.raises(ValueError, match="got WORLD_SIZE=2 without RANK, LOCAL_RANK; start with torchrun"):
        launched_size({name: value for name, value in whole.items() if name not in ("RANK", "LOCAL_RANK")})
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP must be 'false' for pte, got 'true': pte shards"):
        launched_size({**whole, "ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION must be 'no' for pte, got 'bf16': the base's"):
        launched_size({**whole, "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert launched_size({**whole, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}) == 2


def test_a_rank_computes_on_the_gpu_of_its_number_and_on_no_other_s(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(rank=9, size=16, local_rank=1, local_size=8)
    assert ranks.device("cpu") == "cpu" and ALONE.device("cuda:3") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.device("cuda") == "cuda:1"
    with pytest.raises(
        ValueError, match="model.device must be 'cuda' or 'cpu' with 16 ranks, got 'cuda:1'; with 'cuda'"
    ):
        ranks.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="a GPU for each process of a machine, got 1 for 8; start as many"):
        ranks.device("cuda")
