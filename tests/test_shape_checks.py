"""The test suite's own hook: it must refuse wrong shapes, and leave the library without jaxtyping."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError

import shape_checks
from pte.method.thought import normalize

pytestmark = pytest.mark.system


def test_a_function_of_the_library_refuses_a_state_that_is_not_square() -> None:
    torch.testing.assert_close(normalize(2 * torch.eye(3)), torch.eye(3))
    with pytest.raises(TypeCheckError):
        normalize(torch.ones(3, 2))


def test_a_method_of_the_library_refuses_axes_that_disagree() -> None:
    from pte.method.thought import ThoughtEncoder

    encoder = ThoughtEncoder(
        layers=2, kv_dim=4, hidden_size=4, rank=3, global_tokens=0, update_rule="read", generator=torch.Generator()
    )
    assert encoder.encode(torch.ones(2, 1, 5, 4), torch.ones(2, 1, 5, 4)).shape == (2, 1, 3, 3)
    with pytest.raises(TypeCheckError):
        encoder.encode(torch.ones(2, 1, 5, 4), torch.ones(2, 1, 6, 4))


def test_methods_under_decorators_dataclasses_and_later_names_are_checked(tmp_path: Path) -> None:
    module = load_checked(
        tmp_path,
        """
        from __future__ import annotations
        from contextlib import contextmanager
        from dataclasses import dataclass
        from typing import TYPE_CHECKING, Protocol
        import torch
        if TYPE_CHECKING:
            from collections.abc import Iterator
            from jaxtyping import Float
            from torch import Tensor

        class Policy(Protocol):
            name: str

        class Layer(torch.nn.Module):
            @torch.no_grad()
            def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
                return x.sum(-1)

            def evict(self, x: Float[Tensor, " tokens"], policy: Policy) -> None:
                pass

            @staticmethod
            def record(x: Float[Tensor, " tokens"]) -> Record:
                return Record(x, x)

            @contextmanager
            def bound(self, x: Float[Tensor, " tokens"]) -> Iterator[None]:
                yield

            @property
            def state(self) -> Float[Tensor, "rank rank"]:
                return torch.ones(2, 3)

        @dataclass(frozen=True)
        class Record:
            logprobs: Float[Tensor, " tokens"]
            entropies: Float[Tensor, " tokens"]
        """,
    )
    layer, ones = module.Layer(), torch.ones
    assert layer(ones(2, 3)).tolist() == [3.0, 3.0]
    assert layer.record(ones(2)).logprobs.tolist() == [1.0, 1.0]
    with layer.bound(ones(2)):
        pass
    layer.evict(ones(2), "shapes alone are checked")
    for wrong in (
        lambda: layer.evict(ones(2, 2), None),
        lambda: layer(ones(2)),
        lambda: layer.record(ones(2, 2)),
        lambda: layer.bound(ones(2, 2)),
        lambda: layer.state,
        lambda: module.Record(ones(2), ones(3)),
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_the_hook_refuses_to_come_after_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    shape_checks.install()
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(RuntimeError, match="before pte is imported"):
        shape_checks.install()


def load_checked(directory: Path, source: str) -> ModuleType:
    path = directory / "example.py"
    path.write_text(textwrap.dedent(source))
    loader = shape_checks.ShapeCheckLoader("example", str(path))
    module = ModuleType("example")
    sys.modules["example"] = module
    try:
        loader.exec_module(module)
    finally:
        del sys.modules["example"]
    return module


def test_the_library_runs_without_the_shape_checker_installed() -> None:
    program = (
        "import sys\n"
        "for name in ('jaxtyping', 'beartype', 'tyro', 'rich', 'accelerate', 'math_verify', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import pte.method.adapter, pte.method.cache, pte.model.load, pte.rollout.replay, pte.rollout.generate\n"
        "import pte.checkpoint, pte.config_file, pte.run_record\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
