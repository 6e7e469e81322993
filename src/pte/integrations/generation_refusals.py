"""Which options of Transformers' `generate` a bounded policy has, and which it refuses by name.

Decides: what would make another distribution, another search or another cache of it. Transformers fills in a top-k of
50 where nobody chose one; here what nobody chose is None and stands for no top-k, since the sampled distribution is the
scored one. An option that this file does not know is refused as soon as it has a value. Does not know: where a value
came from, what an honoured option does (`generation_options`).

Paper: pi^D_theta(y_t | C_t^D), of which nothing but the temperature changes a token's probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import GenerationConfig

HONOURED = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "max_time",
        "stop_strings",
        "do_sample",
        "temperature",
        "num_return_sequences",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)
WITHOUT_EFFECT = frozenset(
    {
        "early_stopping",
        "length_penalty",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "decoder_start_token_id",
        "disable_compile",
        "renormalize_logits",
        "transformers_version",
    }
)
"""Options of what is refused by another name, of encoder-decoders, of compilation; log-probs are normalised anyway."""


@dataclass(frozen=True)
class Refused:
    """Options that the bounded policy does not have.

    Args:
        reason: Why.
        neutral: The value of each that stands for not using it, beside None.
    """

    reason: str
    neutral: Mapping[str, object]


CUTS = Refused(
    "tokens are sampled from the distribution that scores them, softmax(logits / temperature), and no part of it is "
    "cut off",
    {
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "top_h": None,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
    },
)
"""Refused where tokens are sampled; the likeliest token is the same with and without them."""
REFUSED = (
    Refused(
        "a token's probability is the model's own, softmax(logits / temperature): nothing is forbidden, forced or "
        "favoured",
        {
            "repetition_penalty": 1.0,
            "encoder_repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0,
            "min_length": 0,
            "min_new_tokens": 0,
            "bad_words_ids": None,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "forced_bos_token_id": None,
            "forced_eos_token_id": None,
            "sequence_bias": None,
            "exponential_decay_length_penalty": None,
            "guidance_scale": 1.0,
            "watermarking_config": None,
            "remove_invalid_values": False,
        },
    ),
    Refused(
        "a token that was drawn stays, because the evictions after it cannot be taken back: one sequence is sampled or "
        "decoded greedily, without beams, assistants or look-ahead",
        {
            "num_beams": 1,
            "num_beam_groups": 1,
            "diversity_penalty": 0.0,
            "constraints": None,
            "force_words_ids": None,
            "penalty_alpha": 0.0,
            "dola_layers": None,
            "use_mtp": False,
            "prompt_lookup_num_tokens": None,
            "assistant_early_exit": None,
            "speculation_type": None,
            "is_assistant": False,
            "token_healing": False,
        },
    ),
    Refused(
        "the cache is the policy's own, and its size is the budget of the adapter's configuration",
        {
            "use_cache": True,
            "cache_implementation": None,
            "cache_config": None,
            "max_cache_len": None,
            "prefill_chunk_size": None,
            "compile_config": None,
            "continuous_batching_config": None,
            "low_memory": False,
        },
    ),
    Refused(
        "token ids alone are returned, and RolloutEngine(policy_of(model), ...) is what records log-probs",
        {"output_scores": False, "output_logits": False, "output_attentions": False, "output_hidden_states": False},
    ),
)

TAKEN_ARGUMENTS = ("input_ids", "attention_mask", "stopping_criteria", "streamer", "tokenizer")
REFUSED_ARGUMENTS = {
    "assistant_model": "a token that was drawn stays, and nothing drafts tokens that may be taken back",
    "assistant_tokenizer": "a token that was drawn stays, and nothing drafts tokens that may be taken back",
    "past_key_values": "the cache is the policy's own and begins with the prompt",
    "inputs_embeds": "a prompt is read as token ids",
    "position_ids": "positions count the tokens that the attention mask shows",
    "logits_processor": "a token's probability is the model's own, softmax(logits / temperature)",
    "prefix_allowed_tokens_fn": "a token's probability is the model's own, softmax(logits / temperature)",
    "negative_prompt_ids": "a token's probability is the model's own, softmax(logits / temperature)",
    "negative_prompt_attention_mask": "a token's probability is the model's own, softmax(logits / temperature)",
    "custom_generate": "the loop is that of the bounded cache",
    "synced_gpus": "a process stops when its own sequences have stopped",
}


def check_arguments(arguments: Mapping[str, object]) -> None:
    """Refuses arguments of a call that are no options and that a bounded policy cannot follow.

    Raises:
        ValueError: One has a value, or is not known at all.
    """
    for name, value in arguments.items():
        if name in TAKEN_ARGUMENTS or value is None:
            continue
        if name not in REFUSED_ARGUMENTS:
            raise ValueError(
                f"{name} is no argument of generate, got {value!r}; check its spelling, or leave it out: known are "
                f"{', '.join(TAKEN_ARGUMENTS)} and the options of transformers.GenerationConfig"
            )
        if value is not False and not (isinstance(value, list) and not value):
            raise ValueError(
                f"{name} must be None under a bounded cache, got {type(value).__name__}: {REFUSED_ARGUMENTS[name]}; "
                f"leave it out"
            )


def check_config(config: GenerationConfig) -> None:
    """Refuses options that the bounded policy does not have.

    Args:
        config: What was chosen, None where nobody chose.

    Raises:
        ValueError: Some have a value. All of them are named, so that one correction is enough.
    """
    found: dict[str, object] = {}
    reasons = []
    for kind in (CUTS, *REFUSED) if config.do_sample else REFUSED:
        values = {name: getattr(config, name, None) for name in kind.neutral}
        chosen = {name: value for name, value in values.items() if not is_neutral(value, kind.neutral[name])}
        if chosen:
            found |= chosen
            reasons.append(kind.reason)
    if found:
        neutral = {name: value for kind in (CUTS, *REFUSED) for name, value in kind.neutral.items()}
        raise ValueError(
            f"{', '.join(f'{name}={value!r}' for name, value in found.items())} (of the call, its generation_config or "
            f"the model's) cannot be had under a bounded cache: {'; '.join(reasons)}; pass "
            f"{', '.join(f'{name}={neutral[name]!r}' for name in found)}"
        )
    known = HONOURED | WITHOUT_EFFECT | {name for kind in (CUTS, *REFUSED) for name in kind.neutral}
    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        if not name.startswith("_") and name not in known and value is not None:
            raise ValueError(
                f"{name} must be None, because generate of a bounded policy does not know this option, got {value!r}; "
                f"pass {name}=None"
            )


def is_neutral(value: object, neutral: object) -> bool:
    """True for an option that was not chosen, or chosen so that it does nothing."""
    return value is None or value == neutral
