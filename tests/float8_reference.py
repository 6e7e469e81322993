"""The slow reference under float8: a table of all codes, the nearest by looking, scales by halving and doubling.

It shares nothing with `pte.method.float8`: weights come wide and are rounded here again.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from reference import Reference, rotate

# e4m3: subnormals m/8 x 2^-6, then (1 + m/8) x 2^e for e = -6 .. 8; the last of these, 480, is no number.
POSITIVE = [m / 8 * 2.0**-6 for m in range(8)]
POSITIVE += [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (m, e) != (7, 8)]
CODES = sorted({sign * code for code in POSITIVE for sign in (1, -1)})


def nearest_code(x: float) -> float:
    """The nearest e4m3 number; of two as near the one with an even last bit."""
    above = bisect_left(POSITIVE, abs(x))
    # Neighbours in the table differ in the last bit: a place is even as its code is.
    places = [place for place in (above - 1, above) if 0 <= place < len(POSITIVE)]
    size = POSITIVE[min(places, key=lambda place: (abs(abs(x) - POSITIVE[place]), place % 2))]
    return size if x >= 0 else -size


def rounded_vector(numbers: list[float]) -> list[float]:
    """What float8 keeps of a vector of float32 numbers or of wider ones."""
    largest, scale = max(map(abs, numbers)), 1.0
    while largest > 448 * scale:
        scale *= 2
    while scale > 2.0**-117 and largest <= 448 * (scale / 2):
        scale /= 2
    return [nearest_code(x / scale) * scale for x in numbers]


def straight_through(x: torch.Tensor) -> torch.Tensor:
    """The vectors of the last axis as float8 keeps them, with the gradient of x."""
    kept = [rounded_vector(row) for row in x.detach().reshape(-1, x.shape[-1]).tolist()]
    return x + (torch.tensor(kept, dtype=x.dtype).view(x.shape) - x.detach())


class Float8Reference(Reference):
    """Teacher-forced log-probs of a policy whose base was rounded.

    Args:
        policy: With float8 maps.
        plain: The base as it was before, for its weights.
        options: As of `Reference`.
    """

    def __init__(self, policy, plain, **options):
        super().__init__(policy, **options)
        rounded = [m for m in policy.base.modules() if type(m).__name__ == "Float8Linear"]
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        own = [layer.get_submodule(name) for layer in plain.get_decoder().layers for name in names]
        assert len(own) == len(rounded)
        self.matrices = {}
        for index, layer in enumerate(self.layers):
            for name, linear in zip(names, own[index * 7 : index * 7 + 7], strict=True):
                self.matrices[self.weight(layer, name.split(".")[1])] = straight_through(linear.weight.detach())

    def matrix(self, linear):
        return self.matrices[linear]

    def entering(self, x):
        return straight_through(x)

    def stored(self, rotated, before, value, position):
        rotated = straight_through(rotated)
        value = straight_through(value.view(rotated.shape)).reshape(-1)
        return rotated, rotate(rotated, self.config, -position), value
