"""What the worker decides before its thread runs."""

from __future__ import annotations

from itertools import permutations

import pytest

from pte.method.adapter import ThoughtAdapter
from pte.method.eviction.window import OldestFirst
from pte.method.schedule import EvictionSchedule
from pte.model.fused_weights import FusedWeights
from pte.model.policy import BoundedPolicy, layer_sizes
from pte.rollout.generate import RolloutEngine
from pte.serve.worker import Worker
from served import limits
from tiny import tiny_base

RANKS = (0, 4, 17, 40)
"""No adapter, and ranks that are padded to 16, 32 and 64."""


class FusingEngine(RolloutEngine):
    """Fuses the base's weights when it opens, as every engine does on a GPU."""

    fused: FusedWeights

    def open(self, **options: object) -> None:
        """Takes the weights that a fused step would take."""
        adapter = self.policy.adapter
        self.fused = FusedWeights.of(self.policy.base, rank=0 if adapter is None else adapter.rank)
        super().open(**options)


@pytest.mark.parametrize("ranks", [RANKS, RANKS[::-1], *list(permutations(RANKS))[7:10]])
def test_all_models_share_one_storage_of_the_base_s_weights(ranks: tuple[int, ...]) -> None:
    base = tiny_base()
    engines = {}
    for rank in ranks:
        adapter = ThoughtAdapter(layer_sizes(base), rank=rank, global_tokens=2) if rank else None
        policy = BoundedPolicy(base, adapter, EvictionSchedule(8, evict_tokens=4), OldestFirst())
        engines[f"rank {rank}"] = FusingEngine(policy, slots=2, max_new_tokens=8, temperature=1.0, stop_token_ids=(2,))
    worker = Worker(engines, limits=limits(slots=2, prompt=8, new=8), publish=print, on_failure=print)
    assert list(worker.lanes) == list(engines)
    (kept,) = {engine.fused for engine in engines.values()}
    assert kept.spare == 64 and kept.holds_the_weights()
    held = {group.matrix.untyped_storage().data_ptr() for groups in kept.layers for group in groups}
    for layer in base.get_decoder().layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            assert linear.weight.untyped_storage().data_ptr() in held
