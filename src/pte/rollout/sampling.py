"""One function turns logits into the distribution that samples and that scores; one stream per sequence draws from it.

Decides: temperature (the only transformation: no top-p, no top-k, since the scoring side would have to mirror it),
how a token is drawn (inverse of the cumulative distribution at one uniform number), and where that number comes from
(a stream of the sequence's own, so that its tokens depend neither on the batch nor on the order of work).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


LEAST_TEMPERATURE = 1e-4
"""Above 0. A gap of 0.01 between two logits is 100 nats then, as good as greedy; far below, logits leave float32."""


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that nothing can be drawn at.

    Args:
        temperature: Of a request or an engine.

    Raises:
        ValueError: It is negative, or above 0 and so small that divided logits may overflow.
    """
    if temperature != 0 and not temperature >= LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}, got {temperature}; use for example 1.0"
        )


def token_logprobs(
    logits: Float[Tensor, "*rows vocab"], temperature: int | float | Float[Tensor, "*rows"]
) -> Float[Tensor, "*rows vocab"]:
    """log softmax(logits / temperature), in float32 or wider.

    Args:
        logits: Of the language-model head.
        temperature: Of all rows, or of each. Above 0; or 0, which stands for greedy decoding, whose log-probs are those
            of temperature 1.
    """
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    if isinstance(temperature, torch.Tensor):
        divisor = torch.where(temperature == 0, 1, temperature).to(wide.dtype)
        return torch.log_softmax(wide / divisor[..., None], dim=-1)
    return torch.log_softmax(wide if temperature in (0, 1) else wide / temperature, dim=-1)


def draw_tokens(
    logprobs: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, " rows"], *, greedy: bool | Bool[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """The token at which the cumulative distribution passes each row's uniform number; the likeliest if greedy.

    Args:
        logprobs: Normalised.
        uniforms: In [0, 1).
        greedy: Take the argmax, whatever the uniforms are; of all rows, or of each.
    """
    if isinstance(greedy, torch.Tensor):
        return torch.where(greedy, logprobs.argmax(dim=-1), draw_tokens(logprobs, uniforms, greedy=False))
    if greedy:
        return logprobs.argmax(dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniforms[:, None].to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed from names and numbers, for example (run seed, step, problem id, sample)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream_uniforms(seed: int, count: int) -> Float[Tensor, " count"]:
    """The first `count` numbers of a sequence's stream, in [0, 1), the same on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
