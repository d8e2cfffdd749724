"""Tests that the stub of the compiled extension, against which its callers are type-checked, agrees with the extension."""

import ast
import re
from pathlib import Path

import pytest

import rlhf_kernels
from rlhf_kernels import _native

pytestmark = pytest.mark.skipif(not _native.AVAILABLE, reason="the extension is not built")

STUB = Path(rlhf_kernels.__file__).with_name("_C.pyi")
TEXT = STUB.read_text()
FIRST_CUDA_LINE = TEXT[: TEXT.index("# Only in a build with nvcc.")].count("\n")


def signature(function: ast.FunctionDef) -> tuple[int, list[str], bool]:
    """Return the number of positional parameters, the names of keyword-only ones, and whether there are `**kwargs`."""
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args) if p.arg != "self"]
    return len(names), [p.arg for p in a.kwonlyargs], a.kwarg is not None


def stub() -> dict[str, tuple[int, tuple[int, list[str], bool] | None]]:
    """Return the line and the signature of each name in the stub."""
    found = {}
    for node in ast.parse(TEXT).body:
        if isinstance(node, ast.ClassDef):
            (init,) = (x for x in node.body if isinstance(x, ast.FunctionDef))
            found[node.name] = (node.lineno, signature(init))
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = (node.lineno, signature(node))
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = (node.lineno, None)
    return found


def built_signature(value: object) -> tuple[int, list[str], bool] | None:
    """Return the signature of a function or constructor from the first line of its docstring, which pybind11 writes."""
    if not callable(value):
        return None
    documented = (value.__init__ if isinstance(value, type) else value).__doc__.splitlines()[0]
    parameters = documented[documented.index("(") : documented.rindex(" -> ")]
    keywords = re.findall(r"(\w+): ", parameters.partition("*, ")[2])
    return len(re.findall(r"\barg\d+: ", parameters)), keywords, "**kwargs" in parameters


def test_the_stub_has_the_names_and_parameters_of_the_extension():
    extension = _native.extension()
    built = {name for name in dir(extension) if not name.startswith("_")}
    described = stub()
    assert not built - set(described), "_C.pyi lacks these names"
    missing = {name for name, (line, _) in described.items() if name not in built and line <= FIRST_CUDA_LINE}
    assert not missing, "the extension lacks these names"
    wrong = {
        name: (described[name][1], built_signature(getattr(extension, name)))
        for name in built
        if described[name][1] != built_signature(getattr(extension, name))
    }
    assert not wrong, "names: (parameters in _C.pyi, parameters in the extension)"
