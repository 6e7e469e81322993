"""What no adapter can be, said before one is made.

Decides: which maps, layers, ranks and global tokens are refused, and the remedy. Does not know: models, parameters.

Paper: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pte.method.adapter import AdapterKind


def check_encoder(kind: AdapterKind, *, rank: int, global_tokens: int) -> None:
    """Refuses sizes of a state that cannot be.

    Raises:
        ValueError: A rank below 1, a negative number of global tokens, or `global_only` without any.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}; the paper uses 32")
    if global_tokens < 0:
        raise ValueError(f"global_tokens must be 0 or more, got {global_tokens}; the paper uses 32")
    if kind == "global_only" and global_tokens == 0:
        raise ValueError("global_only needs global_tokens of at least 1, got 0; the state would always be zero")


def check_targets(targets: tuple[str, ...], *, known: tuple[str, ...]) -> None:
    """Refuses maps that a layer does not have.

    Args:
        targets: Names of the maps to adapt.
        known: Names of the linear maps of a layer.

    Raises:
        ValueError: None is named, one is unknown, or one is named twice.
    """
    if not targets:
        raise ValueError(f"targets must name at least one linear map, got none; use some of {', '.join(known)}")
    for name in targets:
        if name not in known:
            raise ValueError(f"targets must be linear maps of a layer, got {name!r}; use some of {', '.join(known)}")
    if len(set(targets)) != len(targets):
        raise ValueError(f"targets must not repeat a linear map, got {', '.join(targets)}; name each once")


def check_layers(layers: tuple[int, ...] | None, *, count: int) -> None:
    """Refuses layers that a model does not have.

    Args:
        layers: Indices of the layers to adapt; None for all.
        count: Layers of the model.

    Raises:
        ValueError: None is named, one is named twice, or one is out of range.
    """
    if layers is not None and (not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(count))):
        raise ValueError(
            f"layers must be different indices from 0 to {count - 1}, at least one, got {layers}; leave it out for all"
        )
