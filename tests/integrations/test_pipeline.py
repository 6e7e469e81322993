"""Transformers' text-generation pipeline over a PTE model: the texts are those of our rollouts."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, pipeline

from peft_models import peft_model
from pte.integrations.peft import policy_of
from pte.rollout.record import RolloutRequest
from sampled import sample
from served import byte_tokenizer
from tiny import tiny_base

pytestmark = pytest.mark.system

TEXTS = ["ab", "what is it?", "x"]
TOKENS = 30
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = byte_tokenizer()
    found.pad_token, found.chat_template = found.eos_token, TEMPLATE
    return found


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PeftModel:
    """It has an end token that it says: the first text stops, the others are cut off."""
    found = peft_model(base=tiny_base(vocab_size=len(tokenizer), seed=2))
    found.generation_config.eos_token_id = [tokenizer.eos_token_id, 252]
    return found


@pytest.fixture(scope="module")
def write(model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> object:
    return pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=TOKENS)


def rolled_out(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    seeds: list[int] | None = None,
    temperature: float = 0.0,
) -> list[str]:
    """Completions by our engine, as text."""
    prompt = tuple(tokenizer(text)["input_ids"])
    rollouts = sample(
        policy_of(model),
        [RolloutRequest(prompt, seed) for seed in seeds or [0]],
        temperature=temperature,
        max_new_tokens=TOKENS,
        stop=model.generation_config.eos_token_id,
    )
    assert max(rollout.evictions for rollout in rollouts) >= 2
    return [tokenizer.decode(rollout.completion_ids, skip_special_tokens=True) for rollout in rollouts]


def test_greedy_texts_are_those_of_the_rollout(
    write: object, model: PeftModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = [rolled_out(model, tokenizer, text)[0] for text in TEXTS]
    (single,) = write(TEXTS[1], do_sample=False)
    assert single == {"generated_text": TEXTS[1] + expected[1]}
    for batch_size in (1, 2, 3):
        found = write(TEXTS, do_sample=False, batch_size=batch_size, return_full_text=False)
        assert found == [[{"generated_text": text}] for text in expected]


def test_sampled_texts_are_those_of_the_rollout_with_seeds_of_torch(
    write: object, model: PeftModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(4)
    found = write(TEXTS[0], num_return_sequences=3, return_full_text=False)
    torch.manual_seed(4)
    seeds = torch.randint(2**63 - 1, (3,)).tolist()
    # 0.7 is the pipeline's own temperature where nobody chose one.
    expected = rolled_out(model, tokenizer, TEXTS[0], seeds=seeds, temperature=0.7)
    assert [one["generated_text"] for one in found] == expected and len(set(expected)) == 3


def test_a_conversation_goes_through_the_template(
    write: object, model: PeftModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (found,) = write(messages, do_sample=False)
    (expected,) = rolled_out(model, tokenizer, "user: hello\nassistant: ")
    assert found["generated_text"] == [*messages, {"role": "assistant", "content": expected}]


def test_a_stop_sequence_ends_the_text(write: object, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    (whole,) = rolled_out(model, tokenizer, TEXTS[0])
    before, stop, after = whole.partition("zp")
    assert len(before) > 8 and stop and len(after) > 8
    (found,) = write(TEXTS[0], do_sample=False, return_full_text=False, stop_sequence=stop)
    assert found["generated_text"] == before + stop


def test_an_empty_text_begins_with_the_begin_token(write: object, model: PeftModel) -> None:
    (found,) = write("", do_sample=False, return_tensors=True)
    begin = model.generation_config.bos_token_id
    rollouts = sample(
        policy_of(model),
        [RolloutRequest((begin,), 0)],
        temperature=0.0,
        max_new_tokens=TOKENS,
        stop=model.generation_config.eos_token_id,
    )
    assert found["generated_token_ids"] == [begin, *rollouts[0].completion_ids]


def test_beams_are_refused_through_the_pipeline_too(write: object) -> None:
    with pytest.raises(ValueError, match="num_beams=4 .*; pass num_beams=1"):
        write("ab", num_beams=4, do_sample=False)
