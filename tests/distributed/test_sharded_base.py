"""A base in shards is the base: ranks that are never in step decode, replay and step as one process does."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pte.checkpoint import load_adapter
from pte.cli import main
from pte.ranks import ALONE, Ranks
from pte.session import open_session
from ranked import GRPO, do_command, do_steps, on_ranks
from short_runs import equal, largest_difference, open_short, short_flags

pytestmark = pytest.mark.system

FEWER = {**GRPO, "train__minibatches_per_step": 1, "train__steps": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"train__gradient_mode": "horizon"},
        {"train__prompts_per_step": 1, "cache__policy": "h2o"},
        {"train__gradient_mode": "exact", "distill__gradient_mode": "exact", "cache__policy": "h2o"},
        {"cache__policy": "none"},
    ],
    ids=["horizon", "a rank without groups", "exact", "full cache"],
)
def test_two_ranks_with_shards_of_the_base_do_what_one_process_does(changes: dict[str, object]) -> None:
    settings = {**FEWER, **changes}
    alone, metrics, completions = do_steps(ALONE, settings)
    one, other = on_ranks(partial(do_steps, changes=settings, shards=True))
    assert equal(one[0], other[0]) and largest_difference(one[0], alone) < 1e-11
    assert one[2] == completions
    assert one[1][-1]["kl"] == pytest.approx(metrics[-1]["kl"], rel=1e-6)


def test_the_command_trains_a_base_of_which_each_rank_holds_half(tmp_path: Path) -> None:
    # The last problem of three is rank 0's alone, and rank 0 alone writes rollouts.json, which takes forwards.
    words = short_flags(
        **{**FEWER, "eval__problems": 3, "train__log_completions": True},
        run__output_dir=tmp_path,
    )
    words = [*words, "--eval.max-new-tokens", "26"]
    assert main(["train", *words, "--run.name", "alone"]) == 0
    base = open_short()[1].policy.base
    half = sum(parameter.nbytes for parameter in base.get_decoder().layers.parameters()) // 4
    for sizes in on_ranks(partial(do_command, words=[*words, "--run.name", "shards", "--shard-base"])):
        assert sizes["shards"] == half, "float32 has half of float64's bytes, and a rank half of the layers"
        assert sizes["whole"] == base.get_input_embeddings().weight.nbytes // 2 + base.config.hidden_size * 4
    alone, shards = tmp_path / "alone", tmp_path / "shards"
    assert largest_difference(load_adapter(alone)[0], load_adapter(shards)[0]) < 1e-5
    summary = json.loads((shards / "summary.json").read_text())
    assert summary["decode"] == "eager, one layer whole at a time (a base in shards has no fused decode step)"
    assert (shards / "rollouts.json").is_file()


def test_one_process_is_refused_a_share_of_a_base(tmp_path: Path) -> None:
    config, _ = open_short(double=False)
    with pytest.raises(ValueError, match="--shard-base needs several processes to hold the shards, got 1; start with"):
        open_session(config, shard_base=True)


def test_a_float8_base_is_refused_in_shards() -> None:
    config, _ = open_short(double=False)
    rounded = replace(config, model=replace(config.model, dtype="float8"))
    with pytest.raises(ValueError, match="--shard-base needs a model.dtype whose weights FSDP shards, got 'float8'"):
        open_session(rounded, ranks=Ranks(size=2), shard_base=True)
