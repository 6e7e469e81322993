"""An evidence run with made-up numbers of every question, in the format that `pte evidence` writes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

ARMS = {
    "base_full": 0.995,
    "base_window": 0.03,
    "lora_full": 0.99,
    "lora_window": 0.14,
    "lora_window_larger": 0.17,
    "lora_random": 0.21,
    "lora_h2o": 0.26,
    "lora_rkv": 0.28,
    "global_only": 0.19,
    "pte_paper": 0.62,
    "pte_read": 0.93,
    "pte_delta": 0.97,
    "pte_zeroed": 0.02,
    "pte_shuffled": 0.09,
}
RULES = {"pte_paper": 2.0, "pte_read": 9.0, "pte_delta": 20.0}
ANSWERS = 256
Row = dict[str, object]


def row(task: str, arm: str, seed: int, metric: str, value: float, /, **setting: object) -> Row:
    stage = "none" if arm.startswith("base") else "both"
    return {
        "task": task,
        "arm": arm,
        "stage": setting.pop("stage", stage),
        "seed": seed,
        "setting": setting,
        "metric": metric,
        "value": value,
        "right": None,
        "total": None,
    }


def rate(task: str, arm: str, seed: int, value: float, /, **setting: object) -> Row:
    """An accuracy as right answers of `ANSWERS`."""
    right = round(min(1.0, max(0.0, value)) * ANSWERS)
    return {**row(task, arm, seed, "accuracy", right / ANSWERS, **setting), "right": right, "total": ANSWERS}


def arms(seeds: Sequence[int], noise: random.Random) -> Iterator[Row]:
    for task, penalty in (("chained", 0.0), ("recall", 0.02)):
        for windows in (4, 8, 16):
            for arm, accuracy in ARMS.items():
                for seed in seeds:
                    fall = 0.0 if "full" in arm else penalty + 0.01 * windows
                    yield rate(task, arm, seed, accuracy - fall + noise.gauss(0, 0.01), windows=windows)
                    kept = 400 * windows if "full" in arm else 1100
                    state = 24576.0 if arm.startswith("pte") else 0.0
                    yield row(task, arm, seed, "cache_bytes", 1024.0 * kept, windows=windows)
                    yield row(task, arm, seed, "state_bytes", state, windows=windows)
                    yield row(task, arm, seed, "evictions", 0.0 if "full" in arm else 4.0 * windows, windows=windows)
                    yield row(task, arm, seed, "completion_tokens", 8.0 * windows + noise.random(), windows=windows)


def capacity(seeds: Sequence[int], noise: random.Random) -> Iterator[Row]:
    for rule, holds in RULES.items():
        for rank in (8, 16, 32, 64):
            for facts in (4, 8, 16, 32, 64, 128):
                for seed in seeds:
                    value = 1 / (1 + (facts / (rank * holds / 8)) ** 2) + noise.gauss(0, 0.01)
                    yield rate("recall", rule, seed, value, facts=facts, rank=rank)


def forgetting(seeds: Sequence[int], noise: random.Random) -> Iterator[Row]:
    for rule, holds in RULES.items():
        for seed in seeds:
            yield row("recall", rule, seed, "answered_fraction", 0.9 + 0.01 * seed)
        for age in (0, 1, 2, 4, 8, 16, 32, 64):
            for seed in seeds:
                yield rate("recall", rule, seed, math.exp(-age / (8 * holds)) + noise.gauss(0, 0.01), evictions_ago=age)


def length(seeds: Sequence[int], noise: random.Random) -> Iterator[Row]:
    for arm, fall in (("lora_full", 0.08), ("lora_window", 0.02), ("pte_read", 0.03)):
        for windows in (4, 8, 16, 32, 64):
            for seed in seeds:
                value = ARMS[arm] - fall * math.log2(windows / 4) + noise.gauss(0, 0.01)
                yield rate("chained", arm, seed, value, windows=windows, trained_windows=8)


def ablation(seeds: Sequence[int], noise: random.Random) -> Iterator[Row]:
    factors = {
        "reference": ("reference",),
        "global_tokens": ("0", "8", "64"),
        "gradient_mode": ("exact", "horizon 1", "horizon 4", "horizon 16"),
        "evicted of 20 tokens": ("5 %", "10 %", "25 %", "50 %"),
    }
    for factor, values in factors.items():
        for place, value in enumerate(values):
            for seed in seeds:
                setting = {"factor": factor, "value": value}
                yield rate("chained", "pte_read", seed, 0.8 + 0.03 * place + noise.gauss(0, 0.01), **setting)
                yield row("chained", "pte_read", seed, "cache_bytes", 15335424.0, **setting)
                yield row("chained", "pte_read", seed, "step_seconds", 1 + 0.1 * place + noise.random(), **setting)
                if factor in ("reference", "gradient_mode"):
                    yield row("chained", "pte_read", seed, "peak_memory_bytes", 2**28 * (1 + 0.2 * place), **setting)


def transfer(seeds: Sequence[int], noise: random.Random) -> Iterator[Row]:
    tasks = ("chained", "recall", "mixture")
    for trained_on in tasks:
        for read_on in tasks:
            for seed in seeds:
                value = (0.92 if trained_on == read_on else 0.55) + noise.gauss(0, 0.02)
                yield rate(read_on, "pte_read", seed, value, trained_on=trained_on, read_on=read_on)


def cost(seeds: Sequence[int], noise: random.Random) -> Iterator[Row]:
    """As `measure_cost` returns it: parts that exclude each other, their sum, shares, speeds, arithmetic and memory."""
    parts = {"prefill": 1, "decode": 14, "fold": 0.7, "read": 0.9, "reward": 0.2, "forward": 5, "backward": 11}
    for arm, share in (("base_full", 1.2), ("lora_full", 1.4), ("lora_window", 0.95), ("pte_read", 1.0)):
        for seed in seeds:
            state = {"fold": 0.0, "read": 0.0} if arm != "pte_read" else {}
            seconds = {
                part: spent * share * (1 + 0.01 * noise.random())
                for part, spent in {**parts, "optimizer": 0.6, "other": 0.3, **state}.items()
            }
            fraction = (seconds["fold"] + seconds["read"]) / sum(seconds.values())
            costs = {
                "rollout_flops_per_token": 3.1e6 * share,
                "update_flops_per_token": 4.1e6 * share,
                "rollout_tokens_per_second": 9000 / share + noise.random(),
                "update_tokens_per_second": 7000 / share + noise.random(),
                **{f"{part}_seconds": spent for part, spent in seconds.items()},
                "step_seconds": sum(seconds.values()),
                "state_fraction": fraction,
                "rollout_state_fraction": fraction,
                "update_state_fraction": fraction,
                "cache_bytes": 2e6 * share,
                "state_bytes": 24576.0 if state == {} else 0.0,
                "peak_memory_bytes": 6e8 * share,
            }
            for metric, value in costs.items():
                if arm != "base_full" or not metric.startswith("update_"):
                    yield row("chained", arm, seed, metric, value)


def memory(seeds: Sequence[int], _: random.Random) -> Iterator[Row]:
    for arm in ("lora_full", "lora_window", "pte_read"):
        for tokens in range(0, 4097, 256):
            kept = tokens if arm == "lora_full" else min(tokens, 256)
            for seed in seeds:
                yield row("chained", arm, seed, "cache_bytes", (32 + kept) * 1536, tokens=tokens)
                yield row("chained", arm, seed, "state_bytes", (arm == "pte_read") * 24576, tokens=tokens)
                yield row("chained", arm, seed, "rollout_peak_bytes", (40 + kept) * 1536, tokens=tokens)


def rl(seeds: Sequence[int], noise: random.Random) -> Iterator[Row]:
    for arm, top, pace in (("lora_full", 0.98, 1.3), ("lora_window", 0.2, 0.9), ("pte_read", 0.9, 1.0)):
        for seed in seeds:
            for step in range(1, 61):
                setting = {"step": step, "seconds": pace * step * (4 + seed), "tokens": 5000 * step}
                reward = top * (1 - math.exp(-step / 18)) + noise.gauss(0, 0.02)
                yield row("chained", arm, seed, "reward", reward, **setting)
                yield row("chained", arm, seed, "accuracy", min(1, max(0, reward)), **setting)
                yield row("chained", arm, seed, "logprob_gap_max", 1e-6 * (1 + noise.random()), **setting)


def rules(seeds: Sequence[int], _: random.Random) -> Iterator[Row]:
    for rule in RULES:
        for evictions in (1, 10, 100, 1000, 10000):
            for seed in seeds:
                norm = 5.6 if rule == "pte_paper" else 3.0 * evictions**0.5
                yield row("recall", rule, seed, "state_norm", norm * (1 + 0.01 * seed), evictions=evictions)
                yield row("recall", rule, seed, "read_norm", 5.6, evictions=evictions)


def surprise(seeds: Sequence[int], _: random.Random) -> Iterator[Row]:
    """A question that the report has no form for."""
    for seed in seeds:
        yield row("chained", "an_arm_of_later", seed, "half_life", 12.0 + seed, colour="red", size=3)


QUESTIONS = {
    one.__name__: one
    for one in (arms, capacity, forgetting, length, ablation, transfer, cost, memory, rl, rules, surprise)
}


def write_evidence(
    directory: Path, *, seeds: Sequence[int] = (0, 1, 2), questions: Sequence[str] | None = None
) -> Path:
    """The run; half of the measurements of each question are in a part of their own."""
    (directory / "parts").mkdir(parents=True)
    record = {
        "preset": "full",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory_bytes": 25_000_000_000, "gpus": []},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    (directory / "record.json").write_text(json.dumps(record))
    for number, question in enumerate(questions or QUESTIONS):
        rows = list(QUESTIONS[question](seeds, random.Random(number)))
        middle = len(rows) // 2
        for half, some in enumerate((rows[:middle], rows[middle:])):
            part = {
                "part": f"{question}-{half}",
                "seconds": 60.0 + number,
                "commit": record["commit"],
                "hardware": record["hardware"],
                "versions": record["versions"],
                "measurements": [{"question": question, **one} for one in some],
            }
            (directory / "parts" / f"{question}-{half}.json").write_text(json.dumps(part))
    return directory
