"""`generate` of a PTE model: Transformers' own where nothing is evicted, our rollout where something is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.stopping_criteria import MaxTimeCriteria

from peft_models import SMALL, add_adapter, peft_model
from pte.integrations import generate as module
from pte.integrations.peft import PTEConfig, policy_of
from pte.method.cache import analytic_bytes
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest
from pte.tasks.chained import embedded_model_dir, generate_problems
from sampled import sample
from served import byte_tokenizer
from tiny import ARCHITECTURES, tiny_base

pytestmark = pytest.mark.system

PAD, END = 0, 4
PROMPTS = [(5,), (9, 6, 7, 5, 21, 8, 3), (11, 12, 28), (7, 7, 19, 3, 22)]
TOKENS = 24


def batch_of(prompts: list[tuple[int, ...]] = PROMPTS, *, side: str = "left") -> dict[str, torch.Tensor]:
    """Prompts as a tokenizer pads them."""
    width = max(map(len, prompts))
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for prompt in prompts:
        padding = width - len(prompt)
        left, right = (padding, 0) if side == "left" else (0, padding)
        found["input_ids"].append([PAD] * left + list(prompt) + [PAD] * right)
        found["attention_mask"].append([0] * left + [1] * len(prompt) + [0] * right)
    return {name: torch.tensor(rows) for name, rows in found.items()}


def fresh_model(
    architecture: str = "qwen2", *, base: torch.nn.Module | None = None, **options: object
) -> torch.nn.Module:
    """A fresh adapter under a window longer than any completion: the base itself."""
    base = tiny_base(architecture) if base is None else base
    return get_peft_model(base, PTEConfig(**{**SMALL, "window_tokens": 64, "evict_tokens": 16, **options}))


def seeded_requests(prompts: list[tuple[int, ...]], *, copies: int = 1, seed: int = 0) -> list[RolloutRequest]:
    """What `generate` draws for these prompts after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    seeds = torch.randint(2**63 - 1, (copies * len(prompts),)).tolist()
    return [RolloutRequest(prompt, seeds.pop(0), max_new_tokens=None) for prompt in prompts for _ in range(copies)]


def as_sequences(rows: torch.Tensor, rollouts: list[Rollout]) -> torch.Tensor:
    """Padded prompts and completions side by side, written out slowly."""
    longest = max(len(rollout.completion_ids) for rollout in rollouts)
    lines = []
    for row, rollout in zip(rows.tolist(), rollouts, strict=True):
        completion = list(rollout.completion_ids)
        while len(completion) < longest:
            completion.append(PAD)
        lines.append(row + completion)
    return torch.tensor(lines)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[RolloutEngine]:
    """The engines that calls of `generate` make, in order; on a GPU's rhythm, which looks at tokens in groups."""
    made: list[RolloutEngine] = []

    class Kept(RolloutEngine):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            self.look_every_tokens = 5
            made.append(self)

    monkeypatch.setattr(module, "RolloutEngine", Kept)
    return made


@pytest.mark.parametrize("end", [END, [END, 17, 5]], ids=["one end token", "three end tokens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_under_a_long_window_generates_what_the_base_does(
    architecture: str, end: int | list[int]
) -> None:
    call = {**batch_of(), "max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": PAD}
    expected = tiny_base(architecture).generate(**call)
    found = fresh_model(architecture).generate(**call)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    narrow = fresh_model(architecture).generate(**{**call, "input_ids": call["input_ids"].int()})
    assert torch.equal(narrow, expected) and narrow.dtype == expected.dtype


def test_some_of_these_sequences_end_early_and_some_do_not() -> None:
    # Otherwise the test above would compare no padding behind completions.
    call = {
        **batch_of(),
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "eos_token_id": [END, 17, 5],
        "pad_token_id": PAD,
    }
    ends = [(fresh_model(one).generate(**call)[:, 7:] == PAD).any(1) for one in ARCHITECTURES]
    assert torch.stack(ends).any() and not torch.stack(ends).all()


@pytest.mark.parametrize("options", [{}, {"eviction": "sinks", "sink_tokens": 2}, {"eviction": "random"}])
def test_sampled_sequences_are_the_rollouts_of_seeds_from_torch_s_generator(options: dict[str, object]) -> None:
    model, batch = peft_model("llama", **options), batch_of()
    torch.manual_seed(3)
    found = model.generate(
        **batch,
        max_new_tokens=30,
        do_sample=True,
        temperature=0.7,
        num_return_sequences=3,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    rollouts = sample(
        policy_of(model), seeded_requests(PROMPTS, copies=3, seed=3), temperature=0.7, stop=(END,), slots=5
    )
    assert max(rollout.evictions for rollout in rollouts) >= 4
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert torch.equal(found, as_sequences(batch["input_ids"].repeat_interleave(3, 0), rollouts))


def test_greedy_decoding_leaves_torch_s_generator_as_it_was() -> None:
    model, before = peft_model(), torch.get_rng_state()
    model.generate(**batch_of(), max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.get_rng_state(), before)
    model.generate(**batch_of(), max_new_tokens=4, do_sample=True)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_seed_of_torch_decides_what_is_sampled() -> None:
    model, texts = peft_model(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(**batch_of(), max_new_tokens=12, do_sample=True).tolist())
    assert texts[0] == texts[1] != texts[2]
    rows = model.generate(torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=True, num_return_sequences=4)
    assert len({tuple(row) for row in rows.tolist()}) == 4, "sequences of a prompt have streams of their own"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_singles_and_padding_costs_no_prompt_token(side: str) -> None:
    model, batch = peft_model("qwen3"), batch_of(side=side)
    found = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    assert torch.equal(found[:, :7], batch["input_ids"])
    for row, prompt in zip(found, PROMPTS, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        assert torch.equal(row[7:], alone[0, len(prompt) :])


def test_the_budget_bounds_the_cache_and_changes_what_is_said(engines: list[RolloutEngine]) -> None:
    model, batch = peft_model(), batch_of()
    call = {**batch, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    found = model.generate(**call)
    policy = policy_of(model)
    expected = analytic_bytes(policy.cache_shape, batch=4, prompt_slots=7, window_slots=8, dtype=torch.float64)
    assert engines[0].peak_cache_bytes == expected
    rollouts = sample(policy, seeded_requests(PROMPTS), temperature=0.0)
    assert torch.equal(found, as_sequences(batch["input_ids"], rollouts))
    unbounded = model.get_base_model().generate(**call)  # Transformers' own loop, every token under S_0
    # The window of 8 fills with tokens 0 to 7: token 8 is the first that is drawn after an eviction.
    assert torch.equal(found[:, : 7 + 9], unbounded[:, : 7 + 9]) and not torch.equal(found, unbounded)


def test_a_mask_with_holes_hides_tokens_as_in_transformers() -> None:
    batch = batch_of()
    batch["attention_mask"][1, 3] = 0
    call = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(fresh_model().generate(**batch, **call), tiny_base().generate(**batch, **call))


def test_a_mask_that_is_not_given_is_inferred_as_in_transformers() -> None:
    ids = batch_of()["input_ids"]
    call = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": END}
    model, base = fresh_model(), tiny_base()
    assert torch.equal(model.generate(ids, pad_token_id=PAD, **call), base.generate(ids, pad_token_id=PAD, **call))
    # A pad token that is an end token may be part of a prompt: nothing is hidden, and the call says so.
    with pytest.warns(
        UserWarning, match="token 0 stands for padding and for an end: it is read as part of the prompts"
    ):
        found = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=PAD)
    assert torch.equal(found, base.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=PAD))


def test_without_prompts_a_sequence_begins_with_the_begin_token() -> None:
    call = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(fresh_model().generate(**call), tiny_base().generate(**call))


class SeenSteps(StoppingCriteria):
    """Keeps what it is shown; ends a row once it has said one of some tokens, counting steps by itself."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.ends = ends
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        assert scores is None and not torch.is_grad_enabled()
        self.seen.append(input_ids.tolist())
        return torch.tensor([row[-1] in self.ends for row in input_ids.tolist()])


class Streamed:
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.values: list[object] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


@pytest.mark.parametrize("grouped", [False, True], ids=["token by token", "in groups of 5"])
@pytest.mark.parametrize("end", [END, None], ids=["an end token", "none"])
def test_criteria_and_streamers_see_every_step_as_in_transformers(
    grouped: bool, end: int | None, request: pytest.FixtureRequest
) -> None:
    if grouped:
        request.getfixturevalue("engines")
    batch = batch_of()
    call = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": PAD}
    free = tiny_base("llama").generate(**batch, **call)[:, 7:]
    ends = (int(free[0, 6]), int(free[2, 2]))
    sequences, criteria, streamers = [], [], []
    for model in (tiny_base("llama"), fresh_model("llama")):
        criteria.append(SeenSteps(ends))
        streamers.append(Streamed())
        options = {"stopping_criteria": StoppingCriteriaList([criteria[-1]])}
        sequences.append(model.generate(**batch, **call, **options))
        options["stopping_criteria"] = StoppingCriteriaList([SeenSteps((ends[0],))])
        one = model.generate(batch["input_ids"][1:2], **call, **options, streamer=streamers[-1])
        assert streamers[-1].values[-1] == "end" and len(streamers[-1].values) == one.shape[1] - 7 + 2
    assert streamers[0].values == streamers[1].values
    if end is not None:  # without an end token Transformers goes on with rows that have stopped
        assert torch.equal(*sequences) and criteria[0].seen == criteria[1].seen
        assert not torch.equal(sequences[0][:, 7:], free)
        return
    for row, (mine, theirs) in enumerate(zip(sequences[1][:, 7:].tolist(), free.tolist(), strict=True)):
        stop = next((step for step, token in enumerate(theirs) if token in ends), TOKENS - 1)
        assert mine == theirs[: stop + 1] + [PAD] * (len(mine) - stop - 1), row


def test_streams_of_a_batch_are_those_of_transformers() -> None:
    call = {
        **batch_of(),
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "eos_token_id": [END, 17, 5],
        "pad_token_id": PAD,
    }
    streamers = Streamed(), Streamed()
    for model, streamer in zip((tiny_base("qwen3"), fresh_model("qwen3")), streamers, strict=True):
        model.generate(**call, streamer=streamer)
    assert streamers[0].values == streamers[1].values


def test_a_sampled_sequence_is_the_same_watched_or_not(engines: list[RolloutEngine]) -> None:
    model = peft_model()
    call = {**batch_of(), "max_new_tokens": 40, "do_sample": True, "eos_token_id": END, "pad_token_id": PAD}
    found = []
    for watched in ({}, {"streamer": Streamed()}, {"stopping_criteria": [SeenSteps(())]}):
        torch.manual_seed(5)
        found.append(model.generate(**call, **watched))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not any(engine.opened for engine in engines)


def test_stop_strings_end_sequences_as_in_transformers(engines: list[RolloutEngine]) -> None:
    tokenizer = byte_tokenizer()
    base = tiny_base(vocab_size=len(tokenizer))
    ids = torch.tensor([[70, 71], [80, 81]])
    call = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": len(tokenizer) - 1, "pad_token_id": PAD}
    said = tokenizer.decode(base.generate(ids, **call)[0, 2:].tolist())
    stop = {"stop_strings": [said[4:6]], "tokenizer": tokenizer}
    expected = base.generate(ids, **call, **stop)
    found = fresh_model(base=base).generate(ids, **call, **stop)
    assert torch.equal(found, expected)
    assert (found[0] == PAD).any() or found.shape[1] < 32, "it stopped"


def test_text_streams_through_transformers_own_streamer() -> None:
    tokenizer = byte_tokenizer()
    model = peft_model(base=tiny_base(vocab_size=len(tokenizer)))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    found = model.generate(torch.tensor([[70, 71]]), max_new_tokens=20, streamer=streamer, eos_token_id=None)
    assert "".join(streamer) == tokenizer.decode(found[0, 2:].tolist())


def test_time_ends_a_batch_behind_the_token_that_is_being_drawn(engines: list[RolloutEngine]) -> None:
    call = {**batch_of(), "max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    model = peft_model()
    assert torch.equal(model.generate(**call, max_time=0.0), model.generate(**call)[:, : 7 + 1])
    # As in Transformers, a criterion of the caller's takes the place of one of its class.
    found = model.generate(**call, max_time=0.0, stopping_criteria=[MaxTimeCriteria(3600.0)])
    assert torch.equal(found, model.generate(**call))


def test_options_of_a_call_stand_before_its_config_and_that_before_the_model_s() -> None:
    model, ids = peft_model(), torch.tensor([[5, 6, 7]])
    model.generation_config = GenerationConfig(max_new_tokens=4, eos_token_id=None, do_sample=True)
    assert model.generate(ids).shape[1] == 3 + 4
    assert model.generate(ids, GenerationConfig(max_new_tokens=5, temperature=0.5)).shape[1] == 3 + 5
    assert model.generate(ids, GenerationConfig(max_new_tokens=5), max_new_tokens=6).shape[1] == 3 + 6
    torch.manual_seed(0)
    cold = model.generate(ids, max_new_tokens=20, temperature=1e-3)
    assert torch.equal(cold, model.generate(ids, max_new_tokens=20, do_sample=False)), "do_sample is the model's"


def test_lengths_are_counted_as_in_transformers() -> None:
    model, base, batch = fresh_model(), tiny_base(), batch_of()
    call = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    for lengths in ({"max_length": 18}, {"max_length": 18, "max_new_tokens": 3}):
        assert torch.equal(model.generate(**batch, **call, **lengths), base.generate(**batch, **call, **lengths))
    with pytest.warns(UserWarning, match="completions end after 20 tokens.*; pass max_new_tokens"):
        found = model.generate(**batch, **call)
    with pytest.warns(UserWarning, match="max_length"):
        assert torch.equal(found, base.generate(**batch, **call))
    with pytest.raises(ValueError, match="max_length must be above the 7 tokens of the prompts.*got 7; pass max_new"):
        model.generate(**batch, max_length=7)
    with pytest.raises(
        ValueError, match="within the model's 256 trained positions, got 7 \\+ 250 tokens; pass max_new_tokens=249"
    ):
        model.generate(**batch, max_new_tokens=250)


def test_an_output_object_holds_the_sequences() -> None:
    model, ids = peft_model(), torch.tensor([[5, 6, 7]])
    out = model.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=9, do_sample=False))
    assert set(out.keys()) == {"sequences"}


QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def test_what_a_checkpoint_chose_is_refused_with_the_call_that_works(tmp_path: Path) -> None:
    # The generation settings that Qwen2.5's instruction-tuned checkpoints come with.
    (tmp_path / "generation_config.json").write_text(
        json.dumps({**QWEN, "eos_token_id": [2, 3], "chat_format": "chatml"})
    )
    model, ids = peft_model(), torch.tensor([[5, 6, 7]])
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    message = "^top_k=20, top_p=0.8, repetition_penalty=1.05 .*; pass top_k=0, top_p=1.0, repetition_penalty=1.0$"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, max_new_tokens=6)
    torch.manual_seed(0)
    found = model.generate(ids, max_new_tokens=6, top_k=0, top_p=1.0, repetition_penalty=1.0)
    (rollout,) = sample(policy_of(model), seeded_requests([(5, 6, 7)]), temperature=0.7, max_new_tokens=6, stop=(2, 3))
    assert found[0, 3:].tolist() == list(rollout.completion_ids)
    # The likeliest token is the likeliest with every cut.
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, repetition_penalty=1.0)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=6, do_sample=False, repetition_penalty=1.0, top_k=0))


def test_neither_training_mode_nor_checkpointing_changes_what_is_generated() -> None:
    model = peft_model()
    call = {**batch_of(), "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**call)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    found = model.generate(**call)
    assert torch.equal(found, expected) and not found.requires_grad
    assert model.training and all(layer.gradient_checkpointing for layer in model.get_base_model().get_decoder().layers)


@pytest.mark.parametrize("kind", ["thought", "lora"])
def test_autocast_changes_nothing_that_is_generated(kind: str) -> None:
    model = peft_model(dtype=torch.float32, kind=kind)
    call = {**batch_of(), "max_new_tokens": 30, "do_sample": True, "eos_token_id": None}
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(model.generate(**call))
    assert torch.equal(*found)


def test_a_disabled_adapter_leaves_the_base_under_the_same_budget() -> None:
    model = peft_model()
    call = {**batch_of(), "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    adapted = model.generate(**call)
    rollouts = sample(policy_of(model).without_adapter(), seeded_requests(PROMPTS), temperature=0.0)
    with model.disable_adapter():
        found = model.generate(**call)
    assert torch.equal(found, as_sequences(call["input_ids"], rollouts)) and not torch.equal(found, adapted)
    assert torch.equal(model.generate(**call), adapted)
    unloaded = model.unload()
    assert torch.equal(unloaded.generate(**call), tiny_base().generate(**call)), "the base has its own loop again"


def test_the_active_adapter_generates_under_its_own_budget(engines: list[RolloutEngine]) -> None:
    model = peft_model()
    add_adapter(model, "other", seed=7, window_tokens=12)
    call = {**batch_of(), "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    first = model.generate(**call)
    model.set_adapter("other")
    second = model.generate(**call)
    assert [engine.policy.schedule.window_tokens for engine in engines] == [8, 12]
    assert engines[1].policy.adapter is model.base_model.pte_adapters["other"] and not torch.equal(first, second)


def test_a_saved_folder_generates_under_its_budget(tmp_path: Path) -> None:
    base = tiny_base("llama", dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = peft_model(base=base, dtype=torch.float32, eviction="tova", evict_tokens=2)
    call = {**batch_of(), "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**call)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert policy_of(loaded).eviction.name == "tova" and policy_of(loaded).schedule.evict_tokens == 2
    assert torch.equal(loaded.generate(**call), expected)


def test_a_trained_reasoner_generates_what_its_base_does() -> None:
    path = embedded_model_dir()
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64),
        AutoTokenizer.from_pretrained(path),
    )
    problems = [generate_problems(2, seed=1, split="heldout", num_statements=n) for n in (3, 6, 9)]
    batch = tokenizer([one.problem for some in problems for one in some], return_tensors="pt", padding=True)
    call = {**batch, "max_new_tokens": 70, "do_sample": False}
    expected = base.generate(**call)
    ended = (expected[:, -1] == tokenizer.pad_token_id).tolist()
    assert any(ended) and not all(ended)
    model = get_peft_model(base, PTEConfig(r=16, window_tokens=96, evict_tokens=32))
    assert torch.equal(model.generate(**call), expected)


def test_the_documented_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = text.partition("## Transformers' generate and pipeline")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    monkeypatch.chdir(root)
    exec(code, names)
    model, rows = names["model"], names["rows"]
    assert torch.equal(
        rows[:, : names["batch"]["input_ids"].shape[1]], names["batch"]["input_ids"].repeat_interleave(4, 0)
    )
    assert isinstance(model, peft.PeftModel) and names["text"] in capsys.readouterr().out
