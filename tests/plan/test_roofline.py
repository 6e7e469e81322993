"""The arithmetic of the bound, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from pte.method.schedule import EvictionSchedule
from pte.plan.roofline import (
    DecodeWork,
    DeviceRates,
    StepLine,
    attended_sum,
    attention_bound_seconds,
    step_bound_seconds,
    update_flops,
    weights_bound_seconds,
)
from pte.plan.shapes import SHAPES, ModelShape, model_config, random_base

# Two layers: q and o 8 x 8, k and v 8 x 4, MLP 3 x 8 x 10: 64 + 64 + 32 + 32 + 240 = 432 each; head 8 x 20 = 160.
SMALL = ModelShape(8, 10, layers=2, heads=4, kv_heads=2, vocab=20, tied=False, max_positions=64)
WORK = DecodeWork.of(SMALL, torch.bfloat16)


def test_a_small_model_s_work_by_hand() -> None:
    assert WORK.layer_parameters == 2 * 432
    assert WORK.head_parameters == 160
    assert WORK.weight_bytes == 2 * (864 + 160)
    # 2 layers, keys and values, 2 heads of 2 numbers, 2 bytes each.
    assert WORK.kv_token_bytes == 2 * 2 * 4 * 2
    # A query head's product with a key: 2 x 2 FLOPs, with a value as many; 4 heads, 2 layers.
    assert WORK.attention_flops == 8 * 4 * 2


def test_parameters_are_those_of_the_model_itself() -> None:
    base = random_base(SMALL)
    matrices = sum(p.numel() for name, p in base.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert WORK.layer_parameters + WORK.head_parameters == matrices


@pytest.mark.parametrize(
    ("name", "read_bytes", "kv_bytes"),
    [
        # 36 x (2 x 2048 x 2048 + 2 x 2048 x 256 + 3 x 2048 x 11008) + 2048 x 151936 = 3,085,697,024 parameters.
        ("3b", 2 * 3_085_697_024, 36_864),
        # 28 x (2 x 3584 x 3584 + 2 x 3584 x 512 + 3 x 3584 x 18944) + 3584 x 152064 = 7,070,285,824.
        ("7b", 2 * 7_070_285_824, 57_344),
        # 32 x (2 x 4096 x 4096 + 2 x 4096 x 1024 + 3 x 4096 x 14336) + 4096 x 128256 = 7,504,658,432.
        ("8b", 2 * 7_504_658_432, 131_072),
    ],
)
def test_real_shapes_read_what_their_checkpoints_hold(name: str, read_bytes: int, kv_bytes: int) -> None:
    work = DecodeWork.of(SHAPES[name], torch.bfloat16)
    assert (work.weight_bytes, work.kv_token_bytes) == (read_bytes, kv_bytes)
    assert model_config(SHAPES[name]).num_key_value_heads == SHAPES[name].kv_heads


def test_each_half_of_a_step_is_the_slower_of_reading_and_multiplying() -> None:
    # 2048 weight bytes at 1000 B/s: 2.048 s; 2 x 1024 x batch FLOPs at 10,000 FLOP/s: 0.2048 s a sequence.
    rates = DeviceRates(bytes_per_second=1000.0, flops_per_second=10_000.0)
    assert weights_bound_seconds(WORK, rates, batch=1) == pytest.approx(2.048)
    assert weights_bound_seconds(WORK, rates, batch=20) == pytest.approx(4.096)
    # 3 sequences x 5 tokens x 32 bytes = 480 bytes: 0.48 s; x 64 FLOPs = 960: 0.096 s.
    assert attention_bound_seconds(WORK, rates, batch=3, attended_tokens=5) == pytest.approx(0.48)
    slow = DeviceRates(bytes_per_second=1000.0, flops_per_second=100.0)
    assert attention_bound_seconds(WORK, slow, batch=3, attended_tokens=5) == pytest.approx(9.6)
    assert step_bound_seconds(WORK, rates, batch=3, attended_tokens=5) == pytest.approx(2.048 + 0.48)


def test_attended_tokens_are_counted_one_by_one() -> None:
    # W = 4, E = 2. Token 4 enters after 0 and 1 have gone: it attends to 2, 3, 4; token 5 to four, token 6 to three.
    schedule = EvictionSchedule(4, 2)
    assert [attended_sum(schedule, range(t, t + 1)) for t in range(8)] == [1, 2, 3, 4, 3, 4, 3, 4]
    assert attended_sum(schedule, range(8)) == 24
    assert attended_sum(EvictionSchedule(None), range(8)) == 36


def test_a_window_of_1024_behind_128_prompt_tokens_is_1k_attended() -> None:
    steady = attended_sum(EvictionSchedule(1024, 256), range(1024, 2048)) / 1024
    assert 128 + steady == 1024.5


def test_an_update_s_flops_by_hand() -> None:
    # 3 prompt tokens, 5 completion tokens of which 4 enter. Products: 4 x (864 x 7 + 160 x 5) = 27,392.
    # Attended: prompt 1 + 2 + 3 = 6; completion 4 x 3 + (1 + 2 + 3 + 4) = 22; 3 x 64 x 28 = 5376.
    full = update_flops(WORK, EvictionSchedule(None), sequences=1, prompt_tokens=3, tokens=5)
    assert full == 27_392 + 5376
    # Under W = 2, E = 1 reasoning tokens attend to 1, 2, 2, 2: 12 + 7 + 6 = 25.
    bounded = update_flops(WORK, EvictionSchedule(2, 1), sequences=2, prompt_tokens=3, tokens=5)
    assert bounded == 2 * (27_392 + 3 * 64 * 25)


def test_a_completion_on_a_line_is_the_sum_of_its_steps() -> None:
    # 1 s at position 10, 3 s at 20: 0.2 s more each, -1 at 0; over 40 tokens the middle step takes 3 s.
    line = StepLine((10.0, 20.0), (1.0, 3.0))
    assert line.at(15) == 2.0
    assert line.completion_seconds(40) == pytest.approx(120.0)
    fine = sum(line.at((index + 0.5) / 100) / 100 for index in range(4000))
    assert line.completion_seconds(40) == pytest.approx(fine)
