"""One adapted linear map under PEFT: which of several adapters it computes with.

Decides: that a map computes with the adapter that is bound, and which adapter a plain forward has to bind. The
computation is `pte.method.adapter.ThoughtLinear`, one for each adapter. Does not know: configurations, states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pte.method.adapter import ThoughtAdapter, ThoughtLinear

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AdaptedMap(nn.Module, BaseTunerLayer):
    """A frozen linear map that computes with the adapter that is bound, if any adapter of it is.

    A bounded forward binds its policy's adapter, whichever is active, disabled or deleted, so that policies of several
    adapters share a base; a plain forward binds the active adapter. Parameters lie with `PTEModel`: each has one name.

    Args:
        base_layer: The frozen map.
        adapters: All adapters of the base, by name.
    """

    adapter_layer_names = ("pte_adapters",)
    pte_adapters: nn.ModuleDict

    def __init__(self, base_layer: nn.Linear, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.maps: dict[str, ThoughtLinear] = {}
        # Past nn.Module's own registration.
        object.__setattr__(self, "pte_adapters", adapters)

    @property
    def base(self) -> nn.Module:
        """The frozen map, as `pte.model` asks for it."""
        return self.base_layer

    def add(self, adapter_name: str, adapter: ThoughtAdapter, *, layer: int, name: str) -> None:
        """Lets an adapter adapt this map.

        Args:
            adapter_name: Its name.
            adapter: The adapter.
            layer: Index of the map's layer.
            name: Of the map.
        """
        group, names = next((index, names) for index, names in enumerate(adapter.groups(layer)) if name in names)
        assert isinstance(self.base_layer, nn.Linear)
        self.maps[adapter_name] = ThoughtLinear(
            self.base_layer, layer=layer, group=group, member=names.index(name), binding=adapter.binding
        )

    def forward(self, x: Tensor) -> Tensor:
        """The map with the adapter that is bound; the frozen one where none is."""
        for adapted in self.maps.values():
            if adapted.binding.current is not None:
                return adapted(x)
        return self.base_layer(x)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves the adapter; its parameters stay float32 whatever the base is."""
        self.pte_adapters[adapter_name].to(self.base_layer.weight.device if device is None else device)


def active_adapter(block: nn.Module) -> ThoughtAdapter | None:
    """The adapter that a plain forward of a block computes with; None where it adapts nothing or is disabled."""
    for child in block.children():
        if isinstance(child, AdaptedMap) and not child.disable_adapters:
            for name in child.active_adapters:  # type: ignore[union-attr]
                if name in child.maps:
                    adapter = child.pte_adapters[name]
                    assert isinstance(adapter, ThoughtAdapter)
                    return adapter
    return None
