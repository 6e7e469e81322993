"""A module of ours runs right after one package of another library, whatever loads that package."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import pytest

from pte.import_hook import import_after

FILES = {
    "hooked_library/__init__.py": "from hooked_library import inside\nready = True\n",
    "hooked_library/inside.py": "",
    "hooked_neighbour.py": "",
    "hooked_ours.py": "import hooked_library\nseen = hooked_library.ready\n",
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library, its neighbour and a module of ours in one zip file: all have one loader."""
    with zipfile.ZipFile(tmp_path / "library.zip", "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    monkeypatch.syspath_prepend(str(tmp_path / "library.zip"))
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.startswith("hooked_")]:
        del sys.modules[name]


def test_neighbours_in_a_zip_file_do_not_set_off_what_waits_for_the_library(library: None) -> None:
    finders = list(sys.meta_path)
    import_after("hooked_library", "hooked_ours")
    spec = find_spec("hooked_library")
    assert spec is not None and spec.loader is find_spec("hooked_neighbour").loader, "the loader is shared"
    __import__("hooked_neighbour")
    assert "hooked_ours" not in sys.modules and sys.meta_path != finders
    __import__("hooked_library")
    assert sys.modules["hooked_ours"].seen and sys.meta_path == finders


def test_a_library_loads_after_somebody_has_cleared_the_finders(library: None) -> None:
    finders = list(sys.meta_path)
    import_after("hooked_library", "hooked_ours")
    spec = find_spec("hooked_library")
    assert spec is not None and spec.loader is not None
    sys.meta_path[:] = finders
    sys.modules["hooked_library"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["hooked_library"])
    assert sys.modules["hooked_ours"].seen and sys.meta_path == finders
