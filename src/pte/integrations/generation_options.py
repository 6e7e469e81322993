"""What a call of `generate` asks for, in Transformers' words.

Decides: how the checkpoint's generation config, the call's and the call's keywords become one (the latter win, as in
Transformers; what nobody chose stays None), how its lengths, end tokens and stopping criteria are read. What is refused
is said in `generation_refusals`. Does not know: PEFT, engines, tokens.

Paper: pi^D_theta(y_t | C_t^D), of which nothing but the temperature changes a token's probability.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_BY_DEFAULT = 20
"""New tokens where a call names no length: Transformers' own default."""


@dataclass(frozen=True)
class GenerateOptions:
    """What a call asks for, apart from its prompts.

    Args:
        temperature: Of the distribution; 0 for greedy decoding.
        max_new_tokens: Completion tokens at most.
        num_return_sequences: Completions of each prompt.
        criteria: What else ends completions, asked after every token.
        returns_dict: Whether the answer is an output object.
    """

    temperature: float
    max_new_tokens: int
    num_return_sequences: int
    criteria: StoppingCriteriaList
    returns_dict: bool


def merged_config(
    base: PreTrainedModel, generation_config: GenerationConfig | None, arguments: Mapping[str, object]
) -> tuple[GenerationConfig, dict[str, object]]:
    """What was chosen, None where nobody chose, and the arguments that are no options.

    Args:
        base: Whose generation settings stand behind those of the call.
        generation_config: Of the call, or None.
        arguments: Keywords of the call; they stand before all others.

    Raises:
        TypeError: The generation config is something else.
        ValueError: Transformers itself refuses a value.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise TypeError(
            f"generation_config must be a transformers.GenerationConfig, got {type(generation_config).__name__}; pass "
            f"options as keywords, for example max_new_tokens=64"
        )
    config = GenerationConfig()
    for chosen in (base.generation_config, generation_config):
        if chosen is not None:
            config.update(**{name: value for name, value in vars(chosen).items() if value is not None})
    others = config.update(**arguments)
    return config, others


def read_options(
    config: GenerationConfig, arguments: Mapping[str, object], *, prompt_width: int, longest_prompt: int, trained: int
) -> GenerateOptions:
    """What a call asks for.

    Args:
        config: What was chosen and is honoured.
        arguments: Those that are no options.
        prompt_width: Tokens of the prompts with their padding, from which Transformers counts `max_length`.
        longest_prompt: Tokens of the longest prompt, without padding.
        trained: Positions that the base was trained on.

    Raises:
        ValueError: Nothing could be generated, positions run out, or stop strings come without a tokenizer.
    """
    new_tokens = max_new_tokens(config, prompt_width=prompt_width)
    if longest_prompt + new_tokens > trained:
        raise ValueError(
            f"prompt plus completion must stay within the model's {trained} trained positions, got {longest_prompt} + "
            f"{new_tokens} tokens; pass max_new_tokens={max(trained - longest_prompt, 1)} or less, or run "
            f"RolloutEngine(policy_of(model), ..., allow_beyond_trained_positions=True)"
        )
    temperature = 0.0
    if config.do_sample:
        temperature = 1.0 if config.temperature is None else float(config.temperature)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0 to sample, got {temperature}; pass do_sample=False")
    return GenerateOptions(
        temperature=temperature,
        max_new_tokens=new_tokens,
        num_return_sequences=1 if config.num_return_sequences is None else int(config.num_return_sequences),
        criteria=stopping_criteria(config, arguments),
        returns_dict=bool(config.return_dict_in_generate),
    )


def max_new_tokens(config: GenerationConfig, *, prompt_width: int) -> int:
    """Completion tokens at most, as Transformers reads both of its lengths.

    Raises:
        ValueError: `max_length` leaves room for none.
    """
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is None:
        warnings.warn(
            f"neither max_new_tokens nor max_length is set: completions end after {TOKENS_BY_DEFAULT} tokens, as "
            f"Transformers has it; pass max_new_tokens",
            stacklevel=2,
        )
        return TOKENS_BY_DEFAULT
    if config.max_length <= prompt_width:
        raise ValueError(
            f"max_length must be above the {prompt_width} tokens of the prompts, which it counts, got "
            f"{config.max_length}; pass max_new_tokens instead"
        )
    return int(config.max_length) - prompt_width


def stopping_criteria(config: GenerationConfig, arguments: Mapping[str, object]) -> StoppingCriteriaList:
    """What ends completions besides end tokens and length; one of the caller's takes the place of one of its class.

    Raises:
        TypeError: One of the caller's is no stopping criterion.
        ValueError: One of the caller's is an option under another name, or stop strings come without a tokenizer.
    """
    given = arguments.get("stopping_criteria") or []
    if not isinstance(given, list) or not all(isinstance(one, StoppingCriteria) for one in given):
        raise TypeError("stopping_criteria must be a StoppingCriteriaList; put each criterion into one")
    for kind, option in ((MaxLengthCriteria, "max_new_tokens"), (EosTokenCriteria, "eos_token_id")):
        if any(isinstance(one, kind) for one in given):
            raise ValueError(f"stopping_criteria must not hold a {kind.__name__}, got one; pass {option} instead")
    own: list[StoppingCriteria] = []
    if config.max_time is not None:
        own.append(MaxTimeCriteria(max_time=config.max_time))
    if config.stop_strings is not None:
        tokenizer = arguments.get("tokenizer")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"stop_strings need the tokenizer of the model, got {config.stop_strings!r} with "
                f"{type(tokenizer).__name__}; pass tokenizer=tokenizer"
            )
        own.append(StopStringCriteria(stop_strings=config.stop_strings, tokenizer=tokenizer))
    kept = [one for one in own if type(one) not in {type(other) for other in given}]
    return StoppingCriteriaList([*kept, *given])


def end_tokens(config: GenerationConfig) -> tuple[int, ...]:
    """Tokens that end a completion; none where the config names none."""
    if config.eos_token_id is None:
        return ()
    return tuple(torch.as_tensor(config.eos_token_id).flatten().tolist())


def pad_token(config: GenerationConfig) -> int | None:
    """What stands in a sequence that has ended before others: the first end token where no other was chosen."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = end_tokens(config)
    return ends[0] if ends else None
