"""Public names of a package that are imported on first use (PEP 562).

A package that imports all that it exports loads every module below it with each name. With `exports`, importing one name loads
only the module that defines it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of `package`; `modules` gives the submodule that defines each name.

    No name may be that of a submodule: importing the submodule would set the package's attribute to it and hide the export.
    Type checkers read the names from an `if TYPE_CHECKING` block in the package, as `from ... import Name as Name`.
    """
    hidden = {module.partition(".")[0] for module in modules.values()} & modules.keys()
    assert not hidden, f"{package}: {hidden} are submodules too"

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # later reads find it there
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return load, names, sorted(modules)
