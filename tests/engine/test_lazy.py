"""Lazy exports: the modules that importing one name loads, and the agreement of a package's two lists of names."""

import ast
import importlib
import inspect
import subprocess
import sys
from pkgutil import iter_modules

import pytest

from rlhf_engine._lazy import exports

PACKAGES = ("rlhf_engine.config", "rlhf_engine.data")


def test_importing_one_section_loads_only_its_files():
    listed = "print(*sorted(name for name in sys.modules if name.startswith('rlhf_engine.config.')))"
    code = f"import sys; from rlhf_engine.config import PPOConfig; {listed}"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == [
        f"rlhf_engine.config.{name}" for name in ("importance", "limits", "optim", "ppo", "schema", "trpo")
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_export_exists_and_is_no_submodule(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert not {found.name for found in iter_modules(module.__path__)} & set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is vars(module)[name]  # kept after the first use


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_every_export_in_its_module(package):
    module = importlib.import_module(package)
    block = next(node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names if alias.name == alias.asname}
    assert sorted(seen) == module.__all__
    for name, defined in seen.items():
        assert getattr(importlib.import_module(defined), name) is getattr(module, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(ImportError, match=r"cannot import name 'PPOConfg' from 'rlhf_engine\.config'"):
        exec("from rlhf_engine.config import PPOConfg")
    with pytest.raises(AttributeError, match=r"module 'rlhf_engine\.data' has no attribute 'nothing'"):
        _ = importlib.import_module("rlhf_engine.data").nothing


def test_an_export_with_the_name_of_a_submodule_is_refused():
    with pytest.raises(AssertionError, match=r"\{'stored'\} are submodules too"):
        exports("rlhf_engine.data", {"stored": "stored"})
