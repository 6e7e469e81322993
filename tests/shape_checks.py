"""The import hook that checks the shapes of public tensors while the tests run.

Every function, method and dataclass of pte with a jaxtyping annotation is wrapped by beartype, right after its module
has run. The library itself imports jaxtyping under `if TYPE_CHECKING` only: the hook executes those imports in a
namespace of its own, once the module is complete, so that neither jaxtyping nor an import cycle enters the library.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence

from beartype import beartype
from jaxtyping import jaxtyped

JAXTYPING_NAMES = ("Float", "Int", "Int64", "Int32", "Integer", "Bool", "UInt8", "Shaped", "Num", "Inexact")


class ShapeCheckFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of pte as usual and has their annotations checked once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "pte" and not fullname.startswith("pte."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = ShapeCheckLoader(spec.loader.name, spec.loader.path)
        return spec


class ShapeCheckLoader(importlib.machinery.SourceFileLoader):
    """Runs a module, then wraps what it defines."""

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        source = self.get_source(module.__name__) or ""
        if any(name in source for name in ("jaxtyping", "Tensor")):
            names = vars(module) | typing_names(source, module)
            for owner, name, function in definitions(module):
                check_function(owner, name, function, names)
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == module.__name__:
                    check_dataclass(value, names)


def install() -> None:
    """Checks every module of pte that is imported from now on.

    Raises:
        RuntimeError: A module of pte is loaded already and would go unchecked.
    """
    loaded = [name for name in sys.modules if name == "pte" or name.startswith("pte.")]
    if loaded and not any(isinstance(finder, ShapeCheckFinder) for finder in sys.meta_path):
        raise RuntimeError(f"shape checks must be installed before pte is imported, got {', '.join(loaded)}")
    if not loaded:
        sys.meta_path.insert(0, ShapeCheckFinder())


def typing_names(source: str, module: types.ModuleType) -> dict[str, object]:
    """What a module imports under `if TYPE_CHECKING`."""
    names: dict[str, object] = {"__name__": module.__name__, "__package__": module.__package__}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom) and statement.module == "_typeshed":
                    continue
                exec(compile(ast.Module([statement], []), module.__name__, "exec"), names)
    return {name: value for name, value in names.items() if not name.startswith("__")}


def definitions(module: types.ModuleType) -> Iterator[tuple[object, str, object]]:
    """(owner, name, function) for the functions and methods that a module defines itself."""
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield module, name, value
        elif isinstance(value, type):
            for attribute, member in list(vars(value).items()):
                if isinstance(member, staticmethod | classmethod | property) or inspect.isfunction(member):
                    yield value, attribute, member


def check_function(owner: object, name: str, member: object, names: dict[str, object]) -> None:
    """Replaces a function or method that annotates shapes by its checked twin."""
    if isinstance(member, property):
        if member.fget is not None and annotates_shapes(member.fget):
            setattr(owner, name, property(checked(member.fget, names), member.fset, member.fdel, member.__doc__))
        return
    kind = type(member) if isinstance(member, staticmethod | classmethod) else None
    function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
    assert callable(function)
    if annotates_shapes(function):
        twin = checked(function, names)
        setattr(owner, name, twin if kind is None else kind(twin))


def checked(function: Callable, names: dict[str, object]) -> Callable:
    """The function with its shapes checked."""
    innermost = inspect.unwrap(function)
    resolved = typing.get_type_hints(innermost, globalns=names, include_extras=True)
    # Only shapes: other annotations, such as protocols, are the type checker's business.
    annotations = {name: resolved[name] for name, text in innermost.__annotations__.items() if has_shape(text)}
    if inspect.isgeneratorfunction(innermost):
        annotations.pop("return", None)
    function.__annotations__ = innermost.__annotations__ = annotations
    return jaxtyped(function, typechecker=beartype)


def annotates_shapes(function: Callable) -> bool:
    """Whether any annotation names a jaxtyping type."""
    return any(has_shape(text) for text in getattr(function, "__annotations__", {}).values())


def has_shape(annotation: object) -> bool:
    """Whether an annotation, still a string, names a jaxtyping type."""
    return any(f"{name}[" in str(annotation) for name in JAXTYPING_NAMES)


def check_dataclass(cls: type, names: dict[str, object]) -> None:
    """Has a dataclass that annotates shapes checked whenever an instance is made."""
    if not dataclasses.is_dataclass(cls) or not annotates_shapes(cls):
        return
    hints = typing.get_type_hints(cls, globalns=names, include_extras=True)
    for field in dataclasses.fields(cls):
        if has_shape(field.type):
            field.type = hints[field.name]
    jaxtyped(cls, typechecker=beartype)
