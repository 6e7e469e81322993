"""The thought state: its equation term by term, its norm, its update rules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.method.thought import ThoughtEncoder, corrected, normalize


def make_encoder(*, rule: str = "read", rank: int = 3, kv_dim: int = 4, layers: int = 2) -> ThoughtEncoder:
    return ThoughtEncoder(
        layers=layers,
        kv_dim=kv_dim,
        hidden_size=6,
        rank=rank,
        global_tokens=2,
        update_rule=rule,
        generator=torch.Generator().manual_seed(0),
    ).double()


def evicted_tokens(count: int, *, batch: int = 2) -> list[torch.Tensor]:
    """Keys and values of random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, batch, count, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_encode_is_the_sum_of_outer_products() -> None:
    # S'^T = (W_Q q_g)(W_K K)^T (W_V V) = sum over tokens of [(W_Q q_g) (W_K k_t)] outer (W_V v_t).
    encoder = make_encoder()
    keys, values = evicted_tokens(5)
    state = encoder.encode(keys, values)
    assert state.shape == (2, 2, 3, 3)
    for layer in range(2):
        for row in range(2):
            total = torch.zeros(3, 3, dtype=torch.float64)
            for token in range(5):
                key = encoder.key_map[layer] @ keys[layer, row, token]
                value = encoder.value_map[layer] @ values[layer, row, token]
                for query in range(3):
                    mapped_query = encoder.query_map[layer] @ encoder.query[layer, query]
                    total[:, query] += (mapped_query @ key) * value
            torch.testing.assert_close(state[layer, row], total, rtol=0, atol=1e-12)


def test_a_worked_encoding() -> None:
    # Rank 1, kv_dim 2: q = (1, 2), W_Q = (3, 4): W_Q q = 11. k = (1, 1), W_K = (1, 2): 3. v = (2, 0), W_V = (5, 7): 10.
    # One token gives 11 * 3 * 10 = 330; a second token with k = (0, 1): 2, v = (0, 1): 7 adds 11 * 2 * 7 = 154.
    encoder = make_encoder(rank=1, kv_dim=2, layers=1)
    with torch.no_grad():
        encoder.query.copy_(torch.tensor([[[1.0, 2.0]]]))
        encoder.query_map.copy_(torch.tensor([[[3.0, 4.0]]]))
        encoder.key_map.copy_(torch.tensor([[[1.0, 2.0]]]))
        encoder.value_map.copy_(torch.tensor([[[5.0, 7.0]]]))
    keys = torch.tensor([[[[1.0, 1.0], [0.0, 1.0]]]], dtype=torch.float64)
    values = torch.tensor([[[[2.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    assert encoder.encode(keys, values).item() == pytest.approx(484)


@given(st.integers(1, 6), st.floats(-30, 30), st.integers(0, 10**6))
def test_normalised_states_have_the_norm_of_the_identity(rank: int, log_size: float, seed: int) -> None:
    state = torch.randn(2, rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state = state * 10**log_size
    unit = normalize(state)
    torch.testing.assert_close(unit.norm(dim=(1, 2)), torch.full((2,), rank**0.5, dtype=torch.float64))
    # A positive multiple of the state, in the same direction.
    torch.testing.assert_close(unit * state.norm(dim=(1, 2), keepdim=True), state * rank**0.5)


def test_the_identity_is_its_own_normal_form() -> None:
    # Not to the last bit: the guard against zero adds 1e-19 under the root.
    torch.testing.assert_close(normalize(torch.eye(5)[None]), torch.eye(5)[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_zero_state_stays_zero_and_has_a_finite_gradient(dtype: torch.dtype) -> None:
    state = torch.zeros(2, 3, 3, dtype=dtype, requires_grad=True)
    unit = normalize(state)
    assert torch.equal(unit, torch.zeros_like(state))
    (gradient,) = torch.autograd.grad(unit.sum(), state)
    assert gradient.isfinite().all()


def test_rule_paper_normalises_what_it_stores_and_rule_read_what_is_read() -> None:
    keys, values = evicted_tokens(4)
    paper, read = make_encoder(rule="paper"), make_encoder(rule="read")
    read.load_state_dict(paper.state_dict())
    start = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    update = paper.encode(keys, values)
    stored = paper.fold(start, keys, values)
    torch.testing.assert_close(stored, normalize(start + update), rtol=0, atol=0)
    assert paper.read(stored) is stored
    plain = read.fold(start, keys, values)
    torch.testing.assert_close(plain, start + update, rtol=0, atol=0)
    torch.testing.assert_close(read.read(plain), stored, rtol=1e-12, atol=1e-12)


def test_rule_read_does_not_care_in_which_blocks_tokens_leave() -> None:
    encoder = make_encoder(rule="read")
    keys, values = evicted_tokens(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    whole = encoder.fold(zero, keys, values)
    blocks = zero
    for part in order.split([1, 4, 2, 5]):
        blocks = encoder.fold(blocks, keys[:, :, part], values[:, :, part])
    torch.testing.assert_close(encoder.read(blocks), encoder.read(whole), rtol=0, atol=1e-12)


def test_a_worked_correction() -> None:
    # Rank 1, S = 3. u = 2, v = 10: S <- 3 + (10 - 3 * 2) * 2 / (1 + 4) = 4.6. Then u = 1, v = 0: 4.6 - 4.6 / 2 = 2.3.
    state = torch.tensor([[[[3.0]]]], dtype=torch.float64)
    addresses = torch.tensor([[[[2.0], [1.0]]]], dtype=torch.float64)
    contents = torch.tensor([[[[10.0], [0.0]]]], dtype=torch.float64)
    assert corrected(state, addresses, contents).item() == pytest.approx(2.3)


@given(st.integers(1, 9), st.integers(0, 10**6))
def test_rule_delta_is_one_token_after_the_other(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state, addresses, contents = (
        torch.randn(2, 3, rows, 4, generator=generator, dtype=torch.float64) * 2 for rows in (4, count, count)
    )
    expected = state.clone()
    for layer in range(2):
        for row in range(3):
            for u, v in zip(addresses[layer, row], contents[layer, row], strict=True):
                correction = (v - expected[layer, row] @ u) / (1 + u @ u)
                expected[layer, row] += torch.outer(correction, u)
    torch.testing.assert_close(corrected(state, addresses, contents), expected, rtol=0, atol=1e-10)


def test_rule_delta_replaces_what_was_stored_under_an_address_and_leaves_the_others() -> None:
    first, second = 1000 * torch.eye(4, dtype=torch.float64)[:2]
    old, new, other = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    zero = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    addresses, contents = torch.stack([first, second, first])[None, None], torch.stack([old, other, new])[None, None]
    state = corrected(zero, addresses, contents)[0, 0]
    # The share 1 / (1 + |u|^2) that a write leaves is 1e-6 here.
    torch.testing.assert_close(state @ first, new, rtol=0, atol=1e-5)
    torch.testing.assert_close(state @ second, other, rtol=0, atol=1e-5)


def test_rule_delta_hardly_writes_under_a_small_address() -> None:
    state = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    small = torch.full((1, 1, 1, 3), 1e-6, dtype=torch.float64)
    torch.testing.assert_close(corrected(state, small, torch.ones_like(small)), state, rtol=0, atol=1e-5)


def test_rule_paper_weighs_recent_blocks_more() -> None:
    # Each Normalize shrinks what came before to a fixed size: the last block weighs as much as all earlier ones.
    encoder = make_encoder(rule="paper")
    keys, values = evicted_tokens(16)
    forwards = backwards = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    for part in range(0, 16, 4):
        forwards = encoder.fold(forwards, keys[:, :, part : part + 4], 100 * values[:, :, part : part + 4])
        last = 12 - part
        backwards = encoder.fold(backwards, keys[:, :, last : last + 4], 100 * values[:, :, last : last + 4])
    assert (forwards - backwards).abs().max() > 0.1


@pytest.mark.parametrize("rule", ["delta", "paper", "read"])
def test_what_is_read_stays_bounded_over_many_evictions(rule: str) -> None:
    encoder = make_encoder(rule=rule).float()
    state = torch.zeros(2, 2, 3, 3)
    keys, values = (x.float() * 50 for x in evicted_tokens(4))
    for _ in range(2000):
        state = encoder.fold(state, keys, values)
    sizes = encoder.read(state).norm(dim=(2, 3))
    torch.testing.assert_close(sizes, torch.full((2, 2), 3**0.5), rtol=1e-5, atol=0)
    if rule != "read":
        assert state.norm(dim=(2, 3)).max() < 400
    if rule == "paper":
        torch.testing.assert_close(state.norm(dim=(2, 3)), torch.full((2, 2), 3**0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", ["delta", "paper", "read"])
def test_the_first_state_folds_the_global_tokens_into_nothing(rule: str) -> None:
    encoder = make_encoder(rule=rule)
    keys, values = evicted_tokens(2, batch=1)
    first = encoder.first_state(keys[:, 0], values[:, 0])
    update = encoder.encode(keys, values)[:, 0]
    by_token = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    for token in range(2):
        by_token = encoder.fold(by_token, keys[:, :, token : token + 1], values[:, :, token : token + 1])
    expected = {"read": update, "paper": normalize(update), "delta": by_token[:, 0]}
    torch.testing.assert_close(first, expected[rule], rtol=0, atol=1e-12)


def test_without_global_tokens_the_first_state_is_zero() -> None:
    encoder = make_encoder()
    nothing = torch.zeros(2, 0, 4, dtype=torch.float64)
    assert torch.equal(encoder.first_state(nothing, nothing), torch.zeros(2, 3, 3, dtype=torch.float64))


def test_the_state_is_float32_beside_bfloat16_keys() -> None:
    encoder = make_encoder().float()
    keys, values = (x.bfloat16() for x in evicted_tokens(3))
    state = encoder.encode(keys, values)
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, encoder.encode(keys.float(), values.float()), rtol=0, atol=0)


def test_a_fresh_encoder_is_orthogonal_and_its_query_the_identity() -> None:
    encoder = ThoughtEncoder(
        layers=2,
        kv_dim=8,
        hidden_size=5,
        rank=4,
        global_tokens=1,
        update_rule="read",
        generator=torch.Generator().manual_seed(0),
    )
    identity = torch.eye(4).expand(2, -1, -1)
    for maps in (encoder.key_map, encoder.value_map, encoder.query_map):
        torch.testing.assert_close(maps @ maps.mT, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.query @ encoder.query_map.mT, identity, rtol=0, atol=1e-5)
    assert not torch.allclose(encoder.key_map, encoder.value_map)


def test_under_rule_paper_a_fresh_block_does_not_drown_the_state() -> None:
    # S has norm sqrt(rank) before an eviction; the same block under an orthogonal W_K would be 250 times as large.
    paper, read = make_encoder(rule="paper"), make_encoder(rule="read")
    torch.testing.assert_close(250 * paper.key_map, read.key_map, rtol=1e-6, atol=0)
    assert torch.equal(paper.value_map, read.value_map) and torch.equal(paper.query, read.query)
