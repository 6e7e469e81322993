"""Which policies the fused decode step serves, asked before anything of it is imported.

Decides: what is refused, with the remedy; a caller that takes `DecodeStep` instead names the reason in its log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pte.kernels.available import why_no_kernels

if TYPE_CHECKING:
    from pte.model.policy import BoundedPolicy

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_RANK = 128


def fused_refusal(policy: BoundedPolicy) -> str | None:
    """Why `FusedDecodeStep` cannot run a policy, with the remedy; None where it can."""
    activation = policy.base.get_decoder().layers[0].mlp.act_fn
    rank = 0 if policy.adapter is None else policy.adapter.rank
    eviction = policy.eviction
    if (missing := why_no_kernels(policy.device)) is not None:
        return missing
    if policy.dtype not in DTYPES:
        return f"the fused decode step computes in bfloat16, float16 or float32, got {policy.dtype}; use DecodeStep"
    if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
        return f"the fused decode step computes silu, got activation {type(activation).__name__}; use DecodeStep"
    if rank > LARGEST_RANK:
        return f"the fused decode step serves ranks up to {LARGEST_RANK}, got {rank}; use DecodeStep or a smaller rank"
    if not policy.schedule.is_full and eviction.needs.attention is not None:
        return f"the fused decode step does not observe attention, which policy {eviction.name!r} needs; use DecodeStep"
    return None
