"""A base in shards is the base: ranks that are never in step decode, replay and step as one process does."""

from __future__ import annotations

from functools import partial

import pytest

from pte.ranks import ALONE
from ranked import GRPO, do_steps, on_ranks
from short_runs import equal, largest_difference

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    "changes",
    [
        {"train__minibatches_per_step": 1, "train__steps": 2},
        {"train__prompts_per_step": 1, "train__minibatches_per_step": 1, "train__steps": 2, "cache__policy": "h2o"},
    ],
    ids=["uneven", "a rank without groups"],
)
def test_two_ranks_with_shards_of_the_base_do_what_one_process_does(changes: dict[str, object]) -> None:
    settings = {**GRPO, **changes}
    alone, metrics, completions = do_steps(ALONE, settings)
    one, other = on_ranks(partial(do_steps, changes=settings, shards=True))
    assert equal(one[0], other[0]) and largest_difference(one[0], alone) < 1e-11
    assert one[2] == completions
    assert one[1][-1]["kl"] == pytest.approx(metrics[-1]["kl"], rel=1e-6)
