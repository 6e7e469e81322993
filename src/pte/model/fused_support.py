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
    """Why a rollout of a policy takes `DecodeStep` instead of `FusedDecodeStep`; None where it takes the fused step.

    That the kernels can be interpreted on a CPU is no reason to sample there with them.
    """
    if policy.device.type != "cuda":
        return f"the fused decode step is for CUDA devices, got {policy.device.type}; use DecodeStep"
    return unsupported(policy)


def unsupported(policy: BoundedPolicy) -> str | None:
    """What `FusedDecodeStep` cannot compute of a policy, with the remedy; None where it can compute all."""
    activation = policy.base.get_decoder().layers[0].mlp.act_fn
    rank = 0 if policy.adapter is None else policy.adapter.rank
    eviction = policy.eviction
    if policy.sharded is not None:
        return "the fused decode step keeps a base's weights beside B, got a base in shards; use ShardedDecodeStep"
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
