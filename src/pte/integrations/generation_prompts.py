"""The prompts of a call of Transformers' `generate`: token ids and an attention mask in, tuples of tokens out.

Decides: which tokens of a padded batch are prompts: those that the mask shows, wherever the padding stands, or all but
pad tokens where there is no mask. Does not know: options, engines.

Paper: the prompt p in C_t^D, which is never pruned.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def prompt_tensor(
    inputs: object, input_ids: object, *, begin: Int[Tensor, "1 1"] | None
) -> Int[Tensor, "batch prompt"]:
    """The token ids of a call, checked; the begin token where there are none.

    Args:
        inputs: The call's first argument.
        input_ids: The same, by name.
        begin: The begin token, or None for a base without.

    Raises:
        TypeError: They are no tensor of token ids.
        ValueError: They are given twice, or not at all and there is no begin token, or have no two axes.
    """
    if inputs is not None and input_ids is not None:
        raise ValueError("prompts must be given once, got inputs and input_ids; leave one out")
    given = next((one for one in (inputs, input_ids, begin) if one is not None), None)
    if given is None:
        raise ValueError("input_ids must be given where there is no bos_token_id, got neither; pass input_ids")
    if not isinstance(given, torch.Tensor) or given.dtype not in (torch.int64, torch.int32):
        found = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
        raise TypeError(
            f"input_ids must be a tensor of token ids, got {found}; pass **tokenizer(texts, return_tensors='pt')"
        )
    if given.ndim != 2 or not len(given):
        raise ValueError(f"input_ids must have shape (batch, tokens), got {tuple(given.shape)}; pass input_ids[None]")
    return given.long()


def checked_mask(mask: object, input_ids: Int[Tensor, "batch prompt"]) -> Int[Tensor, "batch prompt"] | None:
    """The attention mask of a call, 1 on prompt tokens.

    Raises:
        ValueError: It is no such mask of these prompts.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape or not ((mask == 0) | (mask == 1)).all():
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be 1 on prompt tokens and 0 on padding, of shape {tuple(input_ids.shape)}, got "
            f"{found}; pass the tokenizer's"
        )
    return mask.to(input_ids)


def inferred_mask(
    input_ids: Int[Tensor, "batch prompt"], *, pad_token_id: int | None, end_token_ids: Sequence[int]
) -> Int[Tensor, "batch prompt"]:
    """The mask of prompts that come without, as Transformers infers it: pad tokens are padding unless they end, too.

    Args:
        input_ids: Perhaps padded.
        pad_token_id: What fills up.
        end_token_ids: What ends a completion.
    """
    everything = torch.ones_like(input_ids)
    if pad_token_id is None:
        return everything
    prompt = input_ids != pad_token_id
    if pad_token_id not in end_token_ids:
        return prompt.to(input_ids)
    if len(input_ids) > 1 and not prompt.all():
        warnings.warn(
            f"attention_mask is not given, and token {pad_token_id} stands for padding and for an end: it is read as "
            f"part of the prompts; pass attention_mask",
            stacklevel=3,
        )
    return everything


def prompts_of(input_ids: Int[Tensor, "batch prompt"], mask: Int[Tensor, "batch prompt"]) -> list[tuple[int, ...]]:
    """The tokens of each prompt, in order, without padding.

    Raises:
        ValueError: A prompt has none.
    """
    prompts = []
    for row, (tokens, shown) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
        prompt = tuple(token for token, kept in zip(tokens, shown, strict=True) if kept)
        if not prompt:
            raise ValueError(f"every prompt must have at least 1 token, prompt {row} has none; leave it out")
        prompts.append(prompt)
    return prompts
