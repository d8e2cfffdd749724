"""Public names of a package that are imported on first use (PEP 562).

A package that imports all of its exports loads all of their modules, even if one name is needed. With `exports`, importing a
name loads only the module that defines it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of `package`; `modules` maps each name to the submodule that defines it.

    A name must not equal that of a submodule, because importing the submodule would replace the exported attribute. Type
    checkers read the names from an `if TYPE_CHECKING` block in the package, as `from ... import Name as Name`.
    """
    hidden = {module.partition(".")[0] for module in modules.values()} & modules.keys()
    assert not hidden, f"{package}: {hidden} are submodules too"

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # later reads do not call `load`
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return load, names, sorted(modules)
