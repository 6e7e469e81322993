"""The same work for both sides: a random base, prompts, a GRPO loss and an optimizer step.

Decides: what both arms share, so that a ratio compares nothing else. Does not know rollouts or adapters.
Paper: Section 3, one cache-aware GRPO step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pte.learn.loss import BatchTotals, PolicyObjective, policy_loss
from pte.model.load import freeze

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from pte.bench.presets import Preset

LEARNING_RATE = 1e-5
MAX_GRADIENT_NORM = 1.0
UP_STD = 0.02


def random_base(preset: Preset) -> PreTrainedModel:
    """A frozen float32 base; equal for equal presets."""
    shape = preset.shape
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = "sdpa"
    return freeze(Qwen2ForCausalLM(config).float())


def prompts(preset: Preset) -> list[tuple[int, ...]]:
    """Random prompts, all different: nothing is gained by a shared prefill."""
    generator = torch.Generator().manual_seed(1)
    size = (preset.batch, preset.prompt_tokens)
    return [tuple(row) for row in torch.randint(preset.shape.vocab, size, generator=generator).tolist()]


def randomize_ups(ups: Iterable[nn.Parameter]) -> None:
    """Gives every A values other than zero: the adapter of a run that has begun."""
    generator = torch.Generator().manual_seed(2)
    for up in ups:
        up.data = torch.randn(up.shape, generator=generator) * UP_STD


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def grpo_loss(
    policy_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    *,
    completion_mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """The clipped policy loss with fixed advantages of mean 0, as if half of a group were right."""
    batch = policy_logprobs.shape[0]
    advantages = torch.tensor([1.0, -1.0]).repeat(batch)[:batch]
    totals = BatchTotals(sequences=batch, tokens=int(completion_mask.sum()))
    return policy_loss(
        policy_logprobs,
        rollout_logprobs,
        advantages=advantages,
        completion_mask=completion_mask,
        objective=PolicyObjective(),
        totals=totals,
    ).loss


def descend(loss: Float[Tensor, ""], optimizer: torch.optim.Optimizer) -> None:
    """Backward, clipping, one optimizer step, gradients freed."""
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
