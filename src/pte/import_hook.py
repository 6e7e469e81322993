"""Running a module of ours as soon as a package that the user may import has been imported, in either order.

Decides: how another library comes to know what pte brings for it without `import pte` importing that library: at once
where it is loaded already, otherwise right after its own import. Does not know: which library, what the module does.
Needs the standard library only, so that it adds nothing to the time of `import pte`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def import_after(package: str, module: str) -> None:
    """Imports `module` once `package` is loaded: now, or right after its own import.

    A module that refuses the installed version by an ImportError leaves the import of the package alone: the user may
    not need the two together, and is told by a warning.

    Args:
        package: Top-level package of another library.
        module: Module that makes itself known to it when it is imported.
    """
    if package in sys.modules:
        _import_or_warn(module)
    else:
        sys.meta_path.insert(0, _ImportWatcher(package, module))


class _ImportWatcher(MetaPathFinder):
    """Finds one package as the finders after it do, and has its loader import a module when it is done.

    Args:
        package: The package that it waits for.
        module: What is imported then.
    """

    def __init__(self, package: str, module: str) -> None:
        self.package = package
        self.module = module
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package's own spec, its loader extended; None for every other module.

        A loader may be that of other modules, too, as a zip file's is; what it does for these stays as it was.
        """
        if fullname != self.package or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_import(loaded: ModuleType) -> None:
            run(loaded)
            if loaded.__spec__ is spec:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _import_or_warn(self.module)

        # On the instance: whoever looks at the loader still sees the class that it knows.
        spec.loader.exec_module = run_and_import  # type: ignore[assignment, method-assign]
        return spec


def _import_or_warn(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
