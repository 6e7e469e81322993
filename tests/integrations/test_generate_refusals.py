"""What `generate` of a PTE model refuses, by name and with what to pass instead."""

from __future__ import annotations

import re
from collections.abc import Iterator

import peft
import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from peft_models import peft_model
from pte.integrations.generation_refusals import CUTS, HONOURED, REFUSED, WITHOUT_EFFECT

PAD = 0

OF_THEIR_OWN_KIND = {"watermarking_config", "compile_config", "continuous_batching_config"}
"""Options whose values Transformers checks before anybody."""


def refused() -> Iterator[tuple[dict[str, object], str]]:
    """Options of a call and what the refusal says."""
    for kind in (CUTS, *REFUSED):
        for name, neutral in kind.neutral.items():
            other: object = 3 if neutral is None else not neutral if isinstance(neutral, bool) else neutral + 1
            value = [3] if "tokens" in name else "static" if name == "cache_implementation" else other
            if name not in OF_THEIR_OWN_KIND:
                text = re.escape(f"{name}={value!r} (of the call")
                yield {name: value}, f"^{text}.*{re.escape(kind.reason)}; pass {name}={neutral!r}$"
    yield (
        {"assistant_model": object()},
        "assistant_model must be None under a bounded cache, got object.*; leave it out",
    )
    yield {"past_key_values": object()}, "past_key_values must be None under a bounded cache, got object: the cache is"
    yield {"inputs_embeds": torch.zeros(1, 3, 16)}, "inputs_embeds must be None .*a prompt is read as token ids"
    yield {"logits_processor": [print]}, "logits_processor must be None .*a token's probability is the model's own"
    yield {"prefix_allowed_tokens_fn": print}, "prefix_allowed_tokens_fn must be None"
    yield {"custom_generate": "some/repository"}, "custom_generate must be None"
    yield {"synced_gpus": True}, "synced_gpus must be None"
    yield {"max_new_token": 4}, "max_new_token is no argument of generate, got 4; check its spelling"
    yield {"foo": False}, "foo is no argument of generate"
    yield {"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"
    yield {"temperature": 0.0}, "temperature must be above 0 to sample, got 0.0; pass do_sample=False"
    yield {"max_new_tokens": 0}, "max_new_tokens"
    yield {"stop_strings": ["a"]}, "stop_strings need the tokenizer of the model, got \\['a'\\] with NoneType; pass tok"
    for criterion, option in ((MaxLengthCriteria(5), "max_new_tokens"), (EosTokenCriteria(3), "eos_token_id")):
        yield {"stopping_criteria": [criterion]}, f"must not hold a {type(criterion).__name__}.*; pass {option} instead"
    yield {"attention_mask": torch.ones(1, 2)}, "of shape \\(1, 3\\), got \\(1, 2\\); pass the tokenizer's"
    yield {"attention_mask": torch.full((1, 3), 2)}, "attention_mask must be 1 on prompt tokens and 0 on padding"
    yield {"attention_mask": torch.zeros(1, 3)}, "every prompt must have at least 1 token, prompt 0 has none"
    yield {"input_ids": torch.tensor([[5]])}, "got inputs and input_ids; leave one out"


REFUSALS = list(refused())


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=[", ".join(options) for options, _ in REFUSALS])
def test_what_a_bounded_policy_cannot_do_is_refused_by_name(
    options: dict[str, object], message: str, shared: peft.PeftModel
) -> None:
    call = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": PAD, **options}
    with pytest.raises(ValueError, match=message):
        shared.generate(torch.tensor([[5, 6, 7]]), **call)


@pytest.fixture(scope="module")
def shared() -> peft.PeftModel:
    """A model for calls that are refused."""
    return peft_model()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"inputs": [[5, 6]]}, "input_ids must be a tensor of token ids, got list; pass \\*\\*tokenizer"),
        ({"inputs": torch.ones(1, 3)}, "got torch.float32"),
        ({"inputs": torch.tensor([[5]]), "streamer": object()}, "streamer must have put and end, got object"),
        ({"inputs": torch.tensor([[5]]), "stopping_criteria": [print]}, "put each criterion into one"),
        ({"inputs": torch.tensor([[5]]), "generation_config": {"top_k": 3}}, "must be a transformers.Gen.*got dict"),
    ],
)
def test_an_argument_of_another_kind_is_refused(call: dict[str, object], message: str, shared: peft.PeftModel) -> None:
    with pytest.raises(TypeError, match=message):
        shared.generate(**call, max_new_tokens=4)


def test_one_axis_of_tokens_is_refused(shared: peft.PeftModel) -> None:
    with pytest.raises(ValueError, match="must have shape \\(batch, tokens\\), got \\(2,\\); pass input_ids\\[None\\]"):
        shared.generate(torch.tensor([5, 6]), max_new_tokens=4)


def test_criteria_that_end_rows_of_a_batch_need_a_pad_token(shared: peft.PeftModel) -> None:
    criteria = StoppingCriteriaList([MaxTimeCriteria(3600.0)])
    with pytest.raises(ValueError, match="pad_token_id must be set where stopping criteria end some sequences"):
        shared.generate(torch.tensor([[5], [6]]), max_new_tokens=4, eos_token_id=None, stopping_criteria=criteria)


def test_every_option_of_transformers_is_honoured_without_effect_or_refused() -> None:
    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known = [HONOURED, WITHOUT_EFFECT, *(kind.neutral.keys() for kind in (CUTS, *REFUSED))]
    unknown = options.difference(*known)
    assert not unknown, f"Transformers has options now that generate does not know: {', '.join(sorted(unknown))}"
    assert sum(map(len, known)) == len(set().union(*known)), "an option is of two kinds"


def test_an_option_that_nobody_knows_yet_is_refused_once_it_has_a_value(
    monkeypatch: pytest.MonkeyPatch, shared: peft.PeftModel
) -> None:
    original = GenerationConfig.__init__

    def newer(self: GenerationConfig, **options: object) -> None:
        self.sampling_of_tomorrow = options.pop("sampling_of_tomorrow", None)
        original(self, **options)

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    call = {"inputs": torch.tensor([[5, 6]]), "max_new_tokens": 3, "do_sample": False}
    shared.generate(**call)
    with pytest.raises(ValueError, match="sampling_of_tomorrow must be None, .* got 3; pass sampling_of_tomorrow=None"):
        shared.generate(**call, sampling_of_tomorrow=3)
