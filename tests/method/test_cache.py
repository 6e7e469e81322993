"""The bounded cache against a dictionary of tokens, step by step."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pte.method.cache import BoundedCache, CacheShape, analytic_bytes

SHAPE = CacheShape(layers=2, kv_heads=2, head_dim=2)


def token_numbers(serial: int) -> torch.Tensor:
    """Keys of one token, (layers, kv_heads, head_dim), all numbers different; values are their negatives."""
    return serial * 100.0 + torch.arange(8, dtype=torch.float64).view(2, 2, 2)


class DictionaryCache:
    """What a sequence holds, in plain Python: position -> serial number of the token that was written."""

    def __init__(self) -> None:
        self.prompt: dict[int, int] = {}
        self.window: dict[int, int] = {}
        self.newest = -1


def check_row(cache: BoundedCache, row: int, model: DictionaryCache) -> None:
    """The tensors hold exactly the tokens of the model."""
    held = {}
    for slot, position in enumerate(cache.positions[row].tolist()):
        if position >= 0:
            region = "prompt" if slot < cache.prompt_slots else "window"
            held[region, position] = cache.keys[:, row, :, slot], cache.values[:, row, :, slot]
    expected = {("prompt", p): s for p, s in model.prompt.items()} | {("window", p): s for p, s in model.window.items()}
    assert held.keys() == expected.keys()
    for place, serial in expected.items():
        assert torch.equal(held[place][0], token_numbers(serial))
        assert torch.equal(held[place][1], -token_numbers(serial))


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**9))
def test_the_cache_holds_what_a_dictionary_would(blocks: int, block: int, batch: int, seed: int) -> None:
    choices = random.Random(seed)
    window, prompt_slots, cpu = blocks * block, 3, torch.device("cpu")
    cache = BoundedCache.allocate(
        SHAPE, batch=batch, prompt_slots=prompt_slots, window_slots=window, dtype=torch.float64, device=cpu
    )
    size = cache.kv_bytes
    models = [DictionaryCache() for _ in range(batch)]
    serial = 0

    def place(rows: list[int]) -> None:
        nonlocal serial
        lengths = [choices.randint(1, prompt_slots) for _ in rows]
        keys = torch.full((2, len(rows), 2, max(lengths), 2), float("nan"), dtype=torch.float64)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            models[row].__init__()
            for position in range(length):
                serial += 1
                keys[:, index, :, position] = token_numbers(serial)
                models[row].prompt[position] = serial
        cache.place_prompt(torch.tensor(rows), keys, -keys, lengths=torch.tensor(lengths))

    place(list(range(batch)))
    stopped: set[int] = set()
    for _ in range(25):
        if choices.random() < 0.1:
            refilled = choices.sample(range(batch), choices.randint(1, batch))
            place(refilled)
            stopped -= set(refilled)
        if batch > 1 and choices.random() < 0.03:
            kept = sorted(choices.sample(range(batch), choices.randint(1, batch)))
            cache, models, batch = cache.compact(torch.tensor(kept)), [models[row] for row in kept], len(kept)
            stopped = {place for place, row in enumerate(kept) if row in stopped}
            size = cache.kv_bytes
        full = [row for row, model in enumerate(models) if len(model.window) == window and row not in stopped]
        if full:
            chosen = [choices.sample(range(window), block) for _ in full]
            table = cache.positions[full, prompt_slots:].gather(1, torch.tensor(chosen))
            evicted = cache.evict(torch.tensor(full), torch.tensor(chosen))
            assert torch.equal(evicted.positions, table)
            for index, row in enumerate(full):
                for place_in_block, position in enumerate(table[index].tolist()):
                    gone = models[row].window.pop(position)
                    assert torch.equal(evicted.keys[:, index, place_in_block], token_numbers(gone).flatten(1))
                    assert torch.equal(evicted.values[:, index, place_in_block], -token_numbers(gone).flatten(1))
        # A row that has stopped goes on taking slots, free or not, until it is refilled; nobody else may feel it.
        stopped |= {row for row in range(batch) if choices.random() < 0.1}
        positions = []
        for model in models:
            model.newest = max(model.newest, len(model.prompt) - 1)
            positions.append(model.newest + 1)
        slots = cache.take_slots(torch.tensor(positions)[:, None])
        for row, model in enumerate(models):
            slot = int(slots[row, 0])
            assert prompt_slots <= slot < prompt_slots + window
            serial += 1
            cache.keys[:, row, :, slot] = token_numbers(serial)
            cache.values[:, row, :, slot] = -token_numbers(serial)
            model.window[positions[row]] = serial
            model.newest = positions[row]
        for row, model in enumerate(models):
            if row not in stopped:
                check_row(cache, row, model)
        assert cache.kv_bytes == size


def test_an_evicted_block_gives_its_slots_to_the_next_tokens_in_the_given_order() -> None:
    cache = BoundedCache.allocate(
        SHAPE, batch=1, prompt_slots=2, window_slots=4, dtype=torch.float64, device=torch.device("cpu")
    )
    zeros = torch.zeros(2, 1, 2, 2, 2, dtype=torch.float64)
    cache.place_prompt(torch.tensor([0]), zeros, zeros, lengths=torch.tensor([1]))
    assert cache.positions.tolist() == [[0, -1, -1, -1, -1, -1]]
    assert cache.take_slots(torch.tensor([[1, 2, 3, 4]])).tolist() == [[2, 3, 4, 5]]
    assert cache.token_indices().tolist() == [[0, 1, 2, 3]]
    evicted = cache.evict(torch.tensor([0]), torch.tensor([[3, 0]]))
    assert evicted.positions.tolist() == [[4, 1]]
    assert cache.positions.tolist() == [[0, -1, -1, 2, 3, -1]]
    assert cache.take_slots(torch.tensor([[5]])).tolist() == [[5]]
    assert cache.take_slots(torch.tensor([[6]])).tolist() == [[2]]
    assert cache.positions.tolist() == [[0, -1, 6, 2, 3, 5]]


def test_a_refilled_row_forgets_the_sequence_before_it() -> None:
    cache = BoundedCache.allocate(
        SHAPE, batch=2, prompt_slots=3, window_slots=2, dtype=torch.float64, device=torch.device("cpu")
    )
    ones = torch.ones(2, 2, 2, 3, 2, dtype=torch.float64)
    cache.place_prompt(torch.tensor([0, 1]), ones, ones, lengths=torch.tensor([3, 2]))
    cache.take_slots(torch.tensor([[3, 4], [2, 3]]))
    cache.place_prompt(torch.tensor([1]), ones[:, :1, :, :1], ones[:, :1, :, :1], lengths=torch.tensor([1]))
    assert cache.positions.tolist() == [[0, 1, 2, 3, 4], [0, -1, -1, -1, -1]]
    assert cache.prompt_lengths.tolist() == [3, 1]
    assert cache.take_slots(torch.tensor([[9], [1]]))[1].tolist() == [3]


def test_bytes_are_batch_times_slots_times_bytes_of_a_token() -> None:
    # 2 (keys and values) x 3 layers x 2 heads x 8 numbers x 2 bytes = 192 bytes a token; 5 x (7 + 16) tokens.
    shape = CacheShape(layers=3, kv_heads=2, head_dim=8)
    assert shape.token_bytes(torch.bfloat16) == 192
    expected = 5 * (7 + 16) * 192
    assert analytic_bytes(shape, batch=5, prompt_slots=7, window_slots=16, dtype=torch.bfloat16) == expected
    cache = BoundedCache.allocate(
        shape, batch=5, prompt_slots=7, window_slots=16, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert cache.kv_bytes == expected
