"""Sequences start in free rows: their prompts, their first states, their streams and their first tokens.

Decides: what a row holds before its first token is drawn, whatever it held before. Does not know: which requests come
first, when a row is free.

Paper: Section 3, "the state lives for one rollout only".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pte.rollout.sampling import stream_uniforms, token_logprobs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from pte.model.policy import BoundedPolicy
    from pte.rollout.buffers import DecodeBuffers
    from pte.rollout.prefill import PromptReader
    from pte.rollout.sequences import RunningSequence


def admit_sequences(
    policy: BoundedPolicy,
    buffers: DecodeBuffers,
    admitted: Sequence[tuple[int, RunningSequence]],
    *,
    reader: PromptReader,
    first: Float[Tensor, "layers rank rank"] | None,
    temperature: float,
) -> None:
    """Starts sequences in free rows and draws their first tokens.

    Args:
        policy: The bounded policy.
        buffers: Written in place.
        admitted: Row and sequence of each.
        reader: Has read their prompts.
        first: The state before any eviction, or None.
        temperature: The engine's; each sequence's own is taken where the buffers hold one of each row.
    """
    device = policy.device
    rows = torch.tensor([row for row, _ in admitted], device=device)
    requests = [sequence.request for _, sequence in admitted]
    logits = []
    for (row, _), request in zip(admitted, requests, strict=True):
        prompt = reader.take(request.prompt_ids)
        buffers.cache.place_prompt(
            torch.tensor([row], device=device),
            prompt.keys[:, None],
            prompt.values[:, None],
            lengths=torch.tensor([len(request.prompt_ids)], device=device),
        )
        logits.append(prompt.logits)
    if first is not None:
        buffers.set_states(policy, rows, first[:, None].expand(-1, len(admitted), -1, -1))
    divisor: float | Tensor = temperature
    if buffers.temperatures is not None:
        own = [sequence.temperature for _, sequence in admitted]
        divisor = torch.tensor(own, dtype=buffers.temperatures.dtype, device=device)
        buffers.temperatures[rows] = divisor
    uniforms = [stream_uniforms(request.stream_seed, buffers.last_column) for request in requests]
    buffers.admit(
        rows,
        token_logprobs(torch.stack(logits), divisor),
        uniforms=torch.stack(uniforms).to(device),
        stream_seeds=torch.tensor([request.stream_seed for request in requests], device=device),
        greedy=divisor == 0,
    )
