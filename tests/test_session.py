"""A session is what its configuration says."""

from __future__ import annotations

import torch

from pte.model.policy import query_maps
from short_runs import open_short


def test_b_starts_from_the_base_s_queries_unless_it_is_to_start_at_random() -> None:
    (_, queries), (_, random) = open_short(), open_short(adapter__down_start="random")
    adapter, other = queries.policy.adapter, random.policy.adapter
    assert adapter is not None and adapter.encoder is not None and other is not None
    expected = adapter.encoder.key_map[0] @ query_maps(queries.policy.base)[0]  # W_Q q_g is the identity
    down = adapter.pair(0, "v_proj").down
    torch.testing.assert_close(down / down.norm(), expected / expected.norm(), rtol=0, atol=1e-5)
    assert not torch.equal(other.pair(0, "v_proj").down, down)
    assert torch.equal(other.pair(0, "o_proj").down, adapter.pair(0, "o_proj").down)


def test_an_adapter_without_a_state_starts_at_random() -> None:
    (_, lora), (_, random) = (
        open_short(adapter__kind="lora", adapter__down_start=one) for one in ("queries", "random")
    )
    mine, theirs = (session.policy.adapter for session in (lora, random))
    assert mine is not None and theirs is not None
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
