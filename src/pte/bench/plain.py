"""Their side: Transformers' `generate` with its full cache, and a GRPO step of plain LoRA.

Decides: the fastest plain form of the baseline. `generate` runs the bare base with a dynamic cache, sdpa attention,
no logits processor and no end token. The LoRA step samples with A B merged into the weights, then computes the
log-probs of a micro-batch in one teacher-forced forward: keeping every activation and logit, or with the library's
gradient checkpointing and as many logits at a time as our replay. Does not know our rollout or adapter.

Equals: our `lora` policy under a full cache, in loss and gradients (tested).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from pte.bench.workload import fixed_advantages, grpo_loss, make_optimizer, optimizer_step, randomize_ups
from pte.learn.loss import BatchTotals
from pte.learn.optimizer import backpropagate
from pte.rollout.scores import LOGITS_PER_CHUNK

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import Cache, PreTrainedModel


class PlainLoraLinear(nn.Module):
    """W x + A (B x), with float32 masters of A and B.

    Args:
        base: The frozen map W.
        rank: Of A and B.
        generator: Source of the initial values.
    """

    def __init__(self, base: nn.Linear, *, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        bound = base.in_features**-0.5
        down = torch.rand(rank, base.in_features, generator=generator) * (2 * bound) - bound
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Float[Tensor, "batch tokens in_features"]) -> Float[Tensor, "batch tokens out_features"]:
        """The adapted map."""
        out = self.base(x)
        low = functional.linear(x, self.down.to(x.dtype))
        return torch.addmm(out.flatten(0, 1), low.flatten(0, 1), self.up.to(x.dtype).t()).view(out.shape)


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


def detach_plain_lora(base: PreTrainedModel) -> None:
    """Puts the base's own linear maps back."""
    for home, name, adapted in adapted_places(base):
        setattr(home, name, adapted.base)


def adapted_places(base: PreTrainedModel) -> list[tuple[nn.Module, str, PlainLoraLinear]]:
    """Every adapted map with its home and its name there."""
    homes = [home for layer in base.get_decoder().layers for home in (layer.self_attn, layer.mlp)]
    return [
        (home, name, child)
        for home in homes
        for name, child in home.named_children()
        if isinstance(child, PlainLoraLinear)
    ]


def generate(
    base: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    cache: Cache | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Prompt and exactly `new_tokens` sampled tokens at temperature 1, by the library.

    Args:
        base: The model.
        prompt_ids: As many tokens in each.
        new_tokens: To sample.
        cache: What holds the keys and values, perhaps of the prompts' first tokens already; the library's dynamic
            cache when there is none.
    """
    tokens = torch.tensor(prompt_ids, device=base.device)
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
    held = {} if cache is None else {"past_key_values": cache}
    with torch.no_grad():
        return base.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), generation_config=config, **held
        )


def completion_logprobs(
    base: PreTrainedModel, tokens: Int[Tensor, "batch tokens"], *, prompt_tokens: int, logits_again: bool
) -> Float[Tensor, "batch completion"]:
    """Log-probs of the completions in one causal forward: logit of the token less log-sum-exp.

    Args:
        base: The model.
        tokens: Prompts with their completions.
        prompt_tokens: Of every prompt.
        logits_again: `LOGITS_PER_CHUNK` logits at a time, computed again in the backward, as
            `pte.rollout.scores.score` does; otherwise all at once, and kept.
    """
    hidden = base.get_decoder()(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[:, prompt_tokens - 1 :]
    targets, head = tokens[:, prompt_tokens:], base.get_output_embeddings()

    def scored(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)

    if not logits_again:
        return scored(hidden, targets)
    size = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    pieces = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    return torch.cat([checkpoint(scored, *piece, use_reentrant=False) for piece in pieces]).view(targets.shape)


@contextmanager
def checkpointed(base: PreTrainedModel, gradient_checkpointing: bool) -> Iterator[None]:
    """The library's gradient checkpointing for the duration of a block; it works in training mode only."""
    if not gradient_checkpointing:
        yield
        return
    with warnings.catch_warnings():
        # Newer releases call it activation checkpointing; the name that all supported ones know warns.
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.train()
        try:
            yield
        finally:
            base.eval()
            base.gradient_checkpointing_disable()


class PlainGenerate:
    """The base alone, completed by `generate`.

    Args:
        base: The model.
        prompts: Of each completion, all of one length.
    """

    def __init__(self, base: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> None:
        self.base = base
        self.prompts = prompts

    def run(self, tokens: int, seed: int) -> None:
        """Completes every prompt with `tokens` tokens."""
        torch.manual_seed(seed)
        out = generate(self.base, self.prompts, new_tokens=tokens)
        assert out.shape == (len(self.prompts), len(self.prompts[0]) + tokens)


class PlainLoraStep:
    """GRPO steps of plain LoRA under a full cache.

    Args:
        base: The model; it carries the adapters until `detach_plain_lora`.
        prompts: Of each completion, all of one length.
        rank: Of the adapters.
        micro_batch: Completions that are scored at once.
        gradient_checkpointing: Activations of a layer, and logits by chunks, are computed again in the backward.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        *,
        rank: int,
        micro_batch: int,
        gradient_checkpointing: bool,
    ) -> None:
        self.base = base
        self.prompts = prompts
        self.micro_batch = micro_batch
        self.gradient_checkpointing = gradient_checkpointing
        self.adapted = attach_plain_lora(base, rank=rank)
        randomize_ups(linear.up for linear in self.adapted)
        self.optimizer = make_optimizer(parameter for parameter in base.parameters() if parameter.requires_grad)

    def run(self, tokens: int, seed: int) -> None:
        """Samples, scores, descends."""
        torch.manual_seed(seed)
        with self.merged():
            sampled = generate(self.base, self.prompts, new_tokens=tokens)
        self.update(sampled)

    def update(self, sampled: Int[Tensor, "batch tokens"]) -> None:
        """One optimizer step on prompts with their completions."""
        prompt_tokens = len(self.prompts[0])
        completions, completion_tokens = sampled.shape[0], sampled.shape[1] - prompt_tokens
        totals = BatchTotals(completions, tokens=completions * completion_tokens)
        advantages = fixed_advantages(completions).split(self.micro_batch)
        with checkpointed(self.base, self.gradient_checkpointing):
            for some, advantage in zip(sampled.split(self.micro_batch), advantages, strict=True):
                logprobs = completion_logprobs(
                    self.base, some, prompt_tokens=prompt_tokens, logits_again=self.gradient_checkpointing
                )
                # On policy: the sampling log-probs are those of the forward, as trainers without their own record
                # take them.
                loss = grpo_loss(
                    logprobs,
                    logprobs.detach(),
                    advantages=advantage,
                    completion_mask=torch.ones_like(logprobs, dtype=torch.bool),
                    totals=totals,
                )
                backpropagate(loss)
        optimizer_step(self.optimizer)

    @contextmanager
    @torch.no_grad()
    def merged(self) -> Iterator[None]:
        """W + A B in place of the adapters, so that sampling costs what the bare base costs."""
        places = adapted_places(self.base)
        kept = [child.base.weight for _, _, child in places]
        try:
            for home, name, child in places:
                weight = torch.addmm(child.base.weight, child.up, child.down)
                child.base.weight = nn.Parameter(weight, requires_grad=False)
                setattr(home, name, child.base)
            yield
        finally:
            for (home, name, child), weight in zip(places, kept, strict=True):
                child.base.weight = weight
                setattr(home, name, child)
