"""Law 7: a batch equals its singles, in tokens, log-probs and gradients; and a group reads its prompt once."""

import random

import pytest
import torch

from pte.model.policy import BoundedPolicy
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest, collate
from pte.rollout.replay import Replay
from sampled import SETTINGS, requests_for, sample
from tiny import random_sequences, tiny_policy

pytestmark = pytest.mark.system

PROMPTS = [(5,), (6,) * 14, *random_sequences(5, prompt=(2, 9), seed=3)[0]]
RANKED = ["h2o", "scissorhands", "tova", "snapkv", "rkv", "keydiff"]
SAMPLED = ["thought", "paper rule", "lora", "no adapter", "random eviction", "sinks", "full cache", *RANKED]


class CountingEngine(RolloutEngine):
    """Counts what the engine does, and does it."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.read_prompts: list[tuple[int, ...]] = []
        self.rows_per_step: list[int] = []
        self.rollouts: list[Rollout] = []

    def open(self, **options: object) -> None:
        super().open(**options)
        read_batch = self.reader.read_batch

        def counted(prompts: list[tuple[int, ...]]) -> None:
            self.read_prompts.extend(prompts)
            read_batch(prompts)

        self.reader.read_batch = counted

    def step(self) -> None:
        self.rows_per_step.append(self.buffers.cache.batch)
        super().step()

    def close(self) -> None:
        assert not self.reader.prefilled and not self.reader.waiting
        super().close()


def assert_same(ours: list[Rollout], theirs: list[Rollout]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.completion_ids == other.completion_ids
        assert mine.prompt_ids == other.prompt_ids and mine.stream_seed == other.stream_seed
        assert mine.finish_reason == other.finish_reason and mine.evictions == other.evictions
        torch.testing.assert_close(mine.rollout_logprobs, other.rollout_logprobs, rtol=0, atol=1e-9)
        assert (mine.evicted_tokens is None) == (other.evicted_tokens is None)
        if mine.evicted_tokens is not None:
            assert mine.evicted_tokens.tolist() == other.evicted_tokens.tolist()
        assert mine.state_norm == pytest.approx(other.state_norm, rel=1e-5)


@pytest.mark.parametrize("setting", SAMPLED)
def test_rollouts_of_a_batch_are_those_of_its_singles(setting: str) -> None:
    policy = tiny_policy("qwen2", **SETTINGS[setting])
    requests = requests_for(PROMPTS, first_seed=62)
    options = {"temperature": 1.0, "stop": (3, 4), "max_new_tokens": 18}
    singles = [sample(policy, [request], slots=1, **options)[0] for request in requests]
    # Some end early, some are cut off: idle rows, refilled rows and dropped rows are all in here.
    assert len({len(rollout.completion_ids) for rollout in singles}) >= 3
    assert {rollout.finish_reason for rollout in singles} == {"stop", "length"}
    for slots in (2, 7):
        assert_same(sample(policy, requests, slots=slots, **options), singles)


def test_the_order_of_requests_does_not_matter() -> None:
    policy = tiny_policy("llama", eviction=SETTINGS["random eviction"]["eviction"])
    requests = requests_for(PROMPTS)
    straight = sample(policy, requests, slots=3, temperature=1.0, stop=(3,))
    order = list(range(len(requests)))
    random.Random(1).shuffle(order)
    mixed = sample(policy, [requests[index] for index in order], slots=4, temperature=1.0, stop=(3,))
    assert_same([mixed[order.index(index)] for index in range(len(requests))], straight)


def test_a_very_long_neighbour_costs_a_short_prompt_no_token() -> None:
    # Padded to 40 tokens, a prompt of one token still has its own token and position 0, and nothing else.
    policy = tiny_policy("qwen3")
    requests = [RolloutRequest((7,), 1), RolloutRequest(tuple(range(3, 23)) * 2, 2)]
    together = sample(policy, requests, slots=2, temperature=1.0, max_new_tokens=20)
    alone = [sample(policy, [request], slots=1, temperature=1.0, max_new_tokens=20)[0] for request in requests]
    assert_same(together, alone)
    other_first_token = sample(policy, [RolloutRequest((8,), 1), requests[1]], slots=2, max_new_tokens=20)
    assert other_first_token[0].rollout_logprobs[0] != together[0].rollout_logprobs[0]


def test_a_stream_decides_a_sequence_s_tokens_and_nothing_else_s() -> None:
    policy = tiny_policy("qwen2")
    prompt = (5, 6, 7)
    rollouts = sample(policy, [RolloutRequest(prompt, seed) for seed in (1, 2, 1)], slots=3, temperature=1.0)
    assert_same([rollouts[0]], [rollouts[2]])
    assert rollouts[0].completion_ids != rollouts[1].completion_ids


@pytest.mark.parametrize("setting", ["thought", "random eviction", "no adapter", *RANKED])
def test_replayed_logprobs_do_not_depend_on_batch_mates(setting: str) -> None:
    policy = tiny_policy("mistral", **SETTINGS[setting])
    completions = random_sequences(7, completion=(1, 30), seed=4)[1]
    batch = collate(PROMPTS, completions, stream_seeds=range(7), temperature=0.9)
    together = Replay(policy)(batch)
    for row in range(7):
        alone = Replay(policy)(collate([PROMPTS[row]], [completions[row]], stream_seeds=[row], temperature=0.9))
        length = len(completions[row])
        for name in ("policy_logprobs", "entropies"):
            mine, own = getattr(together, name)[row], getattr(alone, name)[0]
            torch.testing.assert_close(mine[:length], own, rtol=0, atol=1e-9)
            assert not mine[length:].any()


@pytest.mark.parametrize(
    ("mode", "setting"),
    [
        ("chain", "thought"),
        ("chain", "paper rule"),
        ("chain", "sinks"),
        ("horizon", "thought"),
        ("exact", "thought"),
        ("chain", "h2o"),
        ("horizon", "h2o"),
        ("exact", "rkv"),
        ("chain", "scissorhands"),
        ("horizon", "snapkv"),
        ("exact", "tova"),
        ("chain", "keydiff"),
    ],
)
def test_gradients_of_a_batch_are_the_sum_of_its_singles(mode: str, setting: str) -> None:
    policy = tiny_policy("qwen2", **SETTINGS[setting])
    completions = [tuple(range(3, 3 + length)) for length in (21, 3, 1, 9, 24, 13, 10)]
    replay = Replay(policy, gradient_mode=mode, horizon=2 if mode == "horizon" else None)
    parameters = list(policy.adapter.parameters())
    weights = torch.linspace(-1, 2, 7 * 24, dtype=torch.float64).view(7, 24)

    def gradients(rows: list[int]) -> list[torch.Tensor]:
        batch = collate(
            [PROMPTS[row] for row in rows],
            [completions[row] for row in rows],
            stream_seeds=rows,
            temperature=1.0,
        )
        logprobs = replay(batch).policy_logprobs
        loss = (logprobs * weights[rows, : logprobs.shape[1]]).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    together = gradients(list(range(7)))
    singles = [gradients([row]) for row in range(7)]
    for index, whole in enumerate(together):
        total = sum(single[index] for single in singles)
        assert (whole - total).abs().max() <= 1e-9 * total.abs().max()
    assert all(whole.any() for whole in together)


def counted(policy: BoundedPolicy, requests: list[RolloutRequest], **options: object) -> CountingEngine:
    engine = CountingEngine(policy, temperature=1.0, max_new_tokens=20, **options)
    engine.rollouts = engine.run(requests)
    return engine


def test_a_group_reads_its_prompt_once() -> None:
    policy = tiny_policy("qwen2")
    prompts = [(5, 6), (7, 8, 9), (10,)]
    requests = requests_for([prompt for prompt in prompts for _ in range(8)])
    for slots in (3, 8, 24):
        engine = counted(policy, requests, slots=slots, stop_token_ids=(3, 4))
        assert sorted(engine.read_prompts) == sorted(prompts)


def test_finished_rows_stop_costing() -> None:
    policy = tiny_policy("qwen2")
    requests = requests_for(PROMPTS + PROMPTS)
    engine = counted(policy, requests, slots=8, stop_token_ids=tuple(range(3, 8)))
    tokens = [len(rollout.completion_ids) for rollout in engine.rollouts]
    assert len(set(tokens)) > 3
    # Rows shrink once no prompt waits; while prompts wait, every slot is refilled at once.
    assert engine.rows_per_step == sorted(engine.rows_per_step, reverse=True)
    assert engine.rows_per_step[0] == 8 and engine.rows_per_step[-1] <= 2
    # A step costs its rows. At most a third of them were idle at the end.
    assert sum(engine.rows_per_step) <= 1.34 * (sum(tokens) - len(tokens))
