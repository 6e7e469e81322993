"""A frozen base whose decoder layers lie in shards over the ranks, and are whole one at a time.

Decides: that layers are sharded by FSDP2 (`fully_shard`), and which one is whole when. Ranks are not in step: one draws
its 500th token while another replays, and a third has nothing left to do. FSDP's own hooks gather a layer whenever its
forward is called, and would wait for ranks that never come. Here a layer is gathered by agreement: each rank says which
it needs, all gather the lowest that any of them needs, and who needs another asks again; a rank without work takes part
until nobody needs one (`rest`). Ranks that need the same layers in the same order meet on the way.
Embedding, last norm and language-model head stay whole on every rank. Does not know: tokens, gradients. A backward pass
must compute each layer again, which fetches it (`run_layers`).

Paper: none; ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from pte.ranks import watched

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from pte.ranks import Ranks

NOTHING = 2**31


class ShardedLayers:
    """Decoder layers in shards: `shard` on each rank, then `begin` on all.

    Args:
        ranks: Several processes. Before they exchange words, they let each other finish with the layers.
        device: Where a rank's shards lie and its layers are whole.
    """

    def __init__(self, ranks: Ranks, *, device: torch.device) -> None:
        ranks.ready()
        self.ranks = ranks
        self.mesh = init_device_mesh(device.type, (ranks.size,))
        self.layers: list[FSDPModule] = []
        self.whole: int | None = None

    def shard(self, layers: Sequence[nn.Module]) -> None:
        """Leaves this rank its shards of layers; not collective.

        Args:
            layers: Whole, the same on every rank; their parameters are frozen and of one dtype.
        """
        for layer in layers:
            sharded = fully_shard(layer, mesh=self.mesh)
            assert isinstance(sharded, FSDPModule)
            self.layers.append(sharded)

    def begin(self) -> None:
        """From here on layers can be fetched; all ranks have their shards and begin at the same place."""
        self.ranks.before_words = self.rest

    def fetch(self, index: int) -> None:
        """Makes a layer whole, and the one that was whole before a shard again.

        Collective, though the other ranks may ask for another layer or for none (`rest`).

        Args:
            index: Of the layer.
        """
        if self.whole != index:
            self.release()
            while self.gather_lowest(index) != index:
                pass

    def rest(self) -> None:
        """Lets the other ranks fetch layers until none of them needs one."""
        self.release()
        while self.gather_lowest(NOTHING) != NOTHING:
            pass

    def gather_lowest(self, wanted: int) -> int:
        """Gathers the lowest layer that any rank wants, and says which; it stays whole where it was wanted."""
        lowest = self.ranks.least(wanted)
        if lowest != NOTHING:
            with watched():
                self.layers[lowest].unshard()
            if lowest == wanted:
                self.whole = lowest
            else:
                self.layers[lowest].reshard()
        return lowest

    def release(self) -> None:
        """Frees the layer that is whole."""
        if self.whole is not None:
            self.layers[self.whole].reshard()
            self.whole = None


def place_sharded(base: PreTrainedModel, sharded: ShardedLayers, *, device: torch.device) -> None:
    """Moves a base from the CPU to a device: its layers as shards, one after the other, the rest whole.

    Args:
        base: Frozen, the same on every rank.
        sharded: Takes the layers.
        device: Of this rank.
    """
    decoder = base.get_decoder()
    sharded.shard(list(decoder.layers))
    for module in (decoder.embed_tokens, decoder.norm, decoder.rotary_emb, base.get_output_embeddings()):
        module.to(device)
