"""The kernels as a GPU's compiler sees them, which refuses programs that the interpreter runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux")
pytestmark = pytest.mark.system

MULTIPROCESSOR_BYTES, PROGRAM_BYTES, RESERVED_BYTES = 228 * 1024, 227 * 1024, 1024


def test_every_program_compiles_for_a_gpu_and_fits_as_often_as_it_should(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "compiled_programs.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    output = subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True, text=True)
    shared = json.loads(output.stdout)
    assert max(shared.values()) <= PROGRAM_BYTES
    # Four programs of the attention on a multiprocessor, and one of each other kind at least.
    attention = max(bytes_ for name, bytes_ in shared.items() if name.startswith("attend"))
    assert 4 * (attention + RESERVED_BYTES) <= MULTIPROCESSOR_BYTES
    # Three tiles of keys and values are there at once, 16 KB each.
    assert shared["attend"] >= 3 * 2 * 32 * 128 * 2
