"""Their side: Transformers' `generate` with its full cache, and a GRPO step of plain LoRA.

Decides: the fastest plain form of the baseline. `generate` runs the bare base with a dynamic cache, sdpa attention,
no logits processor and no end token. The LoRA step samples with A B merged into the weights, then computes all
log-probs in one teacher-forced forward, without gradient checkpointing. Does not know our rollout or adapter.

Equals: our `lora` policy under a full cache, in loss and gradients (tested).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig

from pte.bench.workload import descend, grpo_loss, make_optimizer, prompts, random_base, randomize_ups

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from pte.bench.presets import Preset


class PlainLoraLinear(nn.Module):
    """W x + A (B x).

    Args:
        base: The frozen map W.
        rank: Of A and B.
        generator: Source of the initial values.
    """

    def __init__(self, base: nn.Linear, *, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        bound = base.in_features**-0.5
        self.down = nn.Parameter(torch.rand(rank, base.in_features, generator=generator) * (2 * bound) - bound)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Float[Tensor, "batch tokens in_features"]) -> Float[Tensor, "batch tokens out_features"]:
        """The adapted map."""
        out = self.base(x)
        low = functional.linear(x, self.down)
        return torch.addmm(out.flatten(0, 1), low.flatten(0, 1), self.up.t()).view(out.shape)


def attach_plain_lora(base: PreTrainedModel, *, rank: int) -> list[PlainLoraLinear]:
    """Puts plain LoRA on the seven linear maps of every layer."""
    generator = torch.Generator().manual_seed(0)
    adapted = []
    for layer in base.get_decoder().layers:
        for home in (layer.self_attn, layer.mlp):
            for name, linear in list(home.named_children()):
                if isinstance(linear, nn.Linear):
                    adapted.append(PlainLoraLinear(linear, rank=rank, generator=generator))
                    setattr(home, name, adapted[-1])
    return adapted


def generate(
    base: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], *, new_tokens: int
) -> Int[Tensor, "batch tokens"]:
    """Prompt and exactly `new_tokens` sampled tokens at temperature 1, by the library."""
    tokens = torch.tensor(prompt_ids)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    with torch.no_grad():
        return base.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), generation_config=config
        )


def completion_logprobs(
    base: PreTrainedModel, tokens: Int[Tensor, "batch tokens"], *, prompt_tokens: int
) -> Float[Tensor, "batch completion"]:
    """Log-probs of the completions in one causal forward: logit of the token less log-sum-exp."""
    hidden = base.get_decoder()(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = base.get_output_embeddings()(hidden[:, prompt_tokens - 1 :])
    chosen = logits.gather(2, tokens[:, prompt_tokens:, None])[..., 0]
    return chosen - logits.logsumexp(-1)


class PlainGenerate:
    """The base alone, completed by `generate`."""

    def __init__(self, preset: Preset) -> None:
        self.base = random_base(preset)
        self.prompts = prompts(preset)

    def run(self, tokens: int, seed: int) -> None:
        """Completes every prompt with `tokens` tokens."""
        torch.manual_seed(seed)
        out = generate(self.base, self.prompts, new_tokens=tokens)
        assert out.shape == (len(self.prompts), len(self.prompts[0]) + tokens)


class PlainLoraStep:
    """GRPO steps of plain LoRA under a full cache."""

    def __init__(self, preset: Preset) -> None:
        self.base = random_base(preset)
        self.prompts = prompts(preset)
        self.adapted = attach_plain_lora(self.base, rank=preset.rank)
        randomize_ups(linear.up for linear in self.adapted)
        self.optimizer = make_optimizer(parameter for parameter in self.base.parameters() if parameter.requires_grad)

    def run(self, tokens: int, seed: int) -> None:
        """Samples, scores, descends."""
        torch.manual_seed(seed)
        with self.merged():
            sampled = generate(self.base, self.prompts, new_tokens=tokens)
        logprobs = completion_logprobs(self.base, sampled, prompt_tokens=len(self.prompts[0]))
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        # On policy: the sampling log-probs are those of the forward, as trainers without their own record take them.
        descend(grpo_loss(logprobs, logprobs.detach(), completion_mask=mask), self.optimizer)

    @contextmanager
    @torch.no_grad()
    def merged(self) -> Iterator[None]:
        """W + A B in place of the adapters, so that sampling costs what the bare base costs."""
        kept = [linear.base.weight for linear in self.adapted]
        plain = {linear: linear.base for linear in self.adapted}
        homes = [home for layer in self.base.get_decoder().layers for home in (layer.self_attn, layer.mlp)]
        places = [
            (home, name, child)
            for home in homes
            for name, child in home.named_children()
            if isinstance(child, PlainLoraLinear)
        ]
        try:
            for home, name, child in places:
                weight = torch.addmm(child.base.weight, child.up, child.down)
                child.base.weight = nn.Parameter(weight, requires_grad=False)
                setattr(home, name, plain[child])
            yield
        finally:
            for linear, weight in zip(self.adapted, kept, strict=True):
                linear.base.weight = weight
            for home, name, child in places:
                setattr(home, name, child)
