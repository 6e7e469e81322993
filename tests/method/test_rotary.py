"""Keys before the rotation, recovered from the model's own rotation."""

import importlib

import pytest
import torch

from pte.method.rotary import unrotate
from tiny import ARCHITECTURES, tiny_base

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    # attention_factor scales cosines and sines, so that rotating twice would scale twice.
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.37,
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unrotate_inverts_the_model_s_own_rotation(architecture: str, rope: str) -> None:
    base = tiny_base(architecture, rope_parameters=ROPES[rope])
    rotary = base.get_decoder().rotary_emb
    assert rotary.attention_scaling == (1.37 if rope == "yarn" else 1.0)
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    head_dim = base.get_decoder().layers[0].self_attn.head_dim
    keys = torch.randn(2, 2, 6, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 77, 4095, 131071], [5, 9, 1000, 1001, 32768, 65537]])
    cos, sin = rotary(keys, positions)
    _, rotated = module.apply_rotary_pos_emb(keys, keys, cos, sin)
    back = unrotate(rotated.transpose(1, 2), cos, sin=sin, attention_scaling=rotary.attention_scaling)
    # The module makes cosines in float32, whose squares add up to 1 within 1.2e-7.
    torch.testing.assert_close(back, keys.transpose(1, 2), rtol=0, atol=1e-6)
    assert (rotated - keys).abs().max() > 0.1


def test_unrotate_takes_layers_in_front_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(3, 2, 4, 2, 6, generator=generator, dtype=torch.float64)
    angle = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64).repeat(1, 1, 2) * 6
    together = unrotate(keys, angle.cos(), sin=angle.sin(), attention_scaling=1.0)
    for layer in range(3):
        alone = unrotate(keys[layer], angle.cos(), sin=angle.sin(), attention_scaling=1.0)
        assert torch.equal(together[layer], alone)
