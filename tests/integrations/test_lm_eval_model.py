"""`--model pte` at the harness's own interface: what it generates, how it scores, what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from peft_models import SMALL
from pte.integrations.lm_eval.arguments import Sampling, experiment_of, sampling_of
from pte.integrations.lm_eval.model import BoundedLM
from pte.integrations.peft import PTEConfig
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import RolloutRequest
from pte.rollout.sampling import stream_seed
from pte.tasks.chained import embedded_model_dir
from reference import Reference

PROMPTS = ("A3 B5 #1 A B C #2 C A D ? D", "A7 B2 #1 B A C #2 C C D #3 D A E ? E", "A1 B4 #1 A A C ? C")
WINDOW = {"window_tokens": 8, "evict_tokens": 2, "max_new_tokens": 40, "slots": 2}


def request(kind: str, *arguments: object, doc_id: int = 0, doc: dict | None = None) -> Instance:
    return Instance(kind, doc or {"id": f"doc-{doc_id}"}, arguments, 0, metadata=("some_task", doc_id, 1))


def generated(lm: BoundedLM, prompts: tuple[str, ...] = PROMPTS, **options: object) -> list[str]:
    requests = [request("generate_until", text, dict(options), doc_id=n) for n, text in enumerate(prompts)]
    return lm.generate_until(requests, disable_tqdm=True)


def plain_logprobs(lm: BoundedLM, ids: list[int]) -> torch.Tensor:
    """Log-probs of all tokens behind each position, by Transformers' own forward."""
    with torch.no_grad():
        return torch.log_softmax(lm.session.policy.base(torch.tensor([ids]), use_cache=False).logits[0], -1)


def test_the_harness_finds_the_model_by_its_name_and_keeps_its_own() -> None:
    assert get_model("pte") is BoundedLM
    assert get_model("dummy").__name__ == "DummyLM"


@pytest.mark.parametrize("imports", ["import pte, lm_eval", "import lm_eval, pte"])
def test_importing_pte_beside_the_harness_is_enough_and_loads_nothing_heavy(imports: str) -> None:
    code = f"import sys; {imports}; from lm_eval.api.registry import model_registry as known"
    found = "print('pte' in known, 'hf' in known, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}; {found}"], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_completions_are_the_engine_s_with_the_streams_of_pte_eval(temperature: float) -> None:
    lm = BoundedLM(**WINDOW, temperature=temperature, seed=5)
    task = lm.session.task
    engine = RolloutEngine(
        lm.session.policy, slots=2, max_new_tokens=40, temperature=temperature, stop_token_ids=task.stop_token_ids
    )
    expected = [
        task.text(rollout.completion_ids)
        for rollout in engine.run(
            [
                RolloutRequest(tuple(task.tokenizer.encode(text)), stream_seed(5, "eval", f"doc-{n}", 0))
                for n, text in enumerate(PROMPTS)
            ]
        )
    ]
    assert generated(lm) == expected
    assert len(set(expected)) == 3


def test_repeats_of_a_request_are_different_samples_and_the_first_is_the_single_one() -> None:
    lm = BoundedLM(**WINDOW, temperature=1.5)
    single = generated(lm, PROMPTS[:1])
    one = request("generate_until", PROMPTS[0], {})
    repeated = lm.generate_until([one] * 4, disable_tqdm=True)
    assert repeated[0] == single[0] and len(set(repeated)) > 1


def test_a_completion_ends_before_its_first_stop_string_and_its_neighbours_go_on() -> None:
    lm = BoundedLM(pretrained="embedded", policy=None, max_new_tokens=60, slots=2)
    whole = generated(lm)
    stop = whole[0].split()[3]
    cut = whole[0].index(stop)
    requests = [
        request("generate_until", text, {"until": [stop, "never"]} if n == 0 else {}, doc_id=n)
        for n, text in enumerate(PROMPTS)
    ]
    assert lm.generate_until(requests, disable_tqdm=True) == [whole[0][:cut], *whole[1:]]
    assert cut > 0
    # A special token has no text: named as a stop string it ends the completion where it is drawn.
    end = lm.tokenizer.eos_token
    assert generated(lm, until=[end]) == whole


def test_log_probs_of_the_full_cache_are_transformers_own_and_greedy_means_greedy() -> None:
    lm = BoundedLM(pretrained="embedded", policy=None, max_new_tokens=40)
    written = generated(lm, PROMPTS[:1])[0]
    words = written.split()
    other = " ".join(["D" if words[0] != "D" else "A", *words[1:]])
    pairs = [(PROMPTS[0], f" {written}"), (PROMPTS[0], f" {other}"), (PROMPTS[1], f" {written}"), ("", written)]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        before = lm.tok_encode(context) if context else [lm.prefix_token_id]
        after = lm.tok_encode(continuation.strip(), add_special_tokens=False)
        logprobs = plain_logprobs(lm, [*before, *after])[len(before) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(after)[:, None]).sum().item()
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert greedy == bool((logprobs.argmax(-1) == torch.tensor(after)).all())
    assert [greedy for _, greedy in found[:2]] == [True, False]
    rolling = lm.loglikelihood_rolling([request("loglikelihood_rolling", written)], disable_tqdm=True)
    assert rolling == [pytest.approx(found[3][0], abs=1e-4)]


def test_log_probs_under_a_window_are_the_slow_reference_s() -> None:
    lm = BoundedLM(**WINDOW)
    context, continuation = PROMPTS[1], PROMPTS[0] + " " + PROMPTS[2]
    (found,) = lm.loglikelihood([request("loglikelihood", context, f" {continuation}")], disable_tqdm=True)
    prompt, completion = lm.tok_encode(context), lm.tok_encode(continuation, add_special_tokens=False)
    assert len(completion) > 12
    expected = Reference(lm.session.policy).logprobs(prompt, completion, dtype=torch.float32).sum().item()
    assert found[0] == pytest.approx(expected, abs=1e-3)
    full = BoundedLM(policy=None).loglikelihood(
        [request("loglikelihood", context, f" {continuation}")], disable_tqdm=True
    )
    assert abs(full[0][0] - expected) > 0.1, "the window matters here"


def test_a_saved_adapter_brings_its_options_and_its_budget_and_the_user_s_words_win(tmp_path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    config = PTEConfig(**{**SMALL, "window_tokens": 12, "evict_tokens": 3})
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    found = experiment_of({"adapter": str(tmp_path / "adapter"), "slots": 3})
    assert (found.adapter.kind, found.adapter.rank) == ("thought", SMALL["r"])
    assert (found.cache.window_tokens, found.cache.evict_tokens, found.rollout.slots) == (12, 3, 3)
    narrow = experiment_of({"adapter": str(tmp_path / "adapter"), "cache.window_tokens": 6})
    assert (narrow.cache.window_tokens, narrow.cache.evict_tokens) == (6, 3)
    assert BoundedLM(adapter=str(tmp_path / "adapter")).session.policy.schedule.window_tokens == 12


def test_an_experiment_file_is_read_and_an_adapter_is_only_there_when_it_is_named(tmp_path) -> None:
    (tmp_path / "some.toml").write_text("[cache]\nwindow_tokens = 32\nevict_tokens = 8\n[eval]\nmax_new_tokens = 7\n")
    found = experiment_of({"experiment": str(tmp_path / "some.toml"), "evict_tokens": 4})
    assert (found.cache.window_tokens, found.cache.evict_tokens, found.eval.max_new_tokens) == (32, 4, 7)
    assert found.adapter.kind == "none" and experiment_of({"adapter.kind": "lora"}).adapter.kind == "lora"
    assert experiment_of({"policy": None}).cache.schedule.is_full, "the harness reads the word none as None"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windw_tokens": 64}, "did you mean 'window_tokens'"),
        ({"cache.windw_tokens": 64}, "did you mean 'window_tokens'"),
        ({"train.steps": 3}, "problems, samples and scores are the harness's"),
        ({"eval.samples_per_problem": 3}, "problems, samples and scores are the harness's"),
        ({"window_tokens": 10, "evict_tokens": 4}, "multiple of evict_tokens"),
        ({"window_tokens": 8, "cache.window_tokens": 8}, "name each field once"),
        ({"slots": 2, "batch_size": 3}, "must agree"),
        ({"max_batch_size": 8}, "max_batch_size is not offered"),
        ({"pretrained": "nowhere/at-all"}, "model.path must name a directory"),
    ],
)
def test_a_wrong_model_argument_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        BoundedLM(**arguments)


@pytest.mark.parametrize(("batch_size", "slots"), [(1, 64), ("auto:4", 64), (5, 5), ("5", 5)])
def test_the_batch_size_is_the_number_of_slots_but_for_the_harness_s_default(batch_size: object, slots: int) -> None:
    assert BoundedLM(batch_size=batch_size).config.rollout.slots == slots


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.0, 99)),
        ({"do_sample": True}, (0.9, 99)),
        ({"do_sample": True, "temperature": 0.6, "max_gen_toks": 5}, (0.6, 5)),
        ({"temperature": 0.6}, (0.6, 99)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 1.0, "max_new_tokens": 7}, (0.0, 7)),
    ],
)
def test_what_a_request_leaves_open_is_the_experiment_s(options: dict, expected: tuple[float, int]) -> None:
    config = experiment_of({"max_new_tokens": 99, "rollout.temperature": 0.9})
    temperature, length = expected
    assert sampling_of({"until": "\n", **options}, config) == Sampling(("\n",), length, temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, "top_p=0.9 is not offered: sampling would follow another distribution"),
        ({"top_k": 40}, "top_k=40 is not offered"),
        ({"num_beams": 4}, "num_beams=4 is not offered"),
        ({"presence_penalty": 1}, "presence_penalty=1 is not offered"),
        ({"do_sample": True, "temperature": 0}, "temperature must be above 0"),
        ({"until": [""]}, "until must be strings"),
        ({"max_gen_toks": 0}, "max_gen_toks must be an integer of at least 1"),
    ],
)
def test_an_option_that_the_policy_cannot_follow_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        sampling_of(options, experiment_of({}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_harness_s_default_device_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="use --device cpu"):
        BoundedLM(device="cuda:0")


def test_a_prompt_is_never_cut_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = BoundedLM(**WINDOW)
    long = " ".join([PROMPTS[0]] * 400)
    with pytest.raises(ValueError, match="positions"):
        generated(lm, (long,))
    with pytest.raises(ValueError, match="positions"):
        lm.loglikelihood([request("loglikelihood", long, " A")], disable_tqdm=True)
    with pytest.raises(ValueError, match="chat template"):
        lm.apply_chat_template([{"role": "user", "content": "A"}])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        BoundedLM()
