"""Recording of the Triton launchers' launches instead of running them: needs no GPU and computes no result.

The launchers run unmodified, on CPU tensors. Only the call that passes a kernel to the driver is replaced, and only inside
`recording`, so signatures, constexprs and numbers of warps are those that a GPU would receive.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

BINDING = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
"""One target per kind of device: arguments are specialised per kind of device, not per architecture."""


NVIDIA_OPTIONS = ("maxnreg",)


@dataclass(frozen=True)
class Form:
    """One form of a kernel to compile, which would be one entry of Triton's cache."""

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]

    @property
    def name(self) -> str:
        return label(self.kernel)

    @property
    def key(self) -> str:
        """A string that is equal for launches that share a compiled kernel."""
        parts = (self.signature, self.constexprs, self.attributes, self.options)
        return f"{self.name} " + " ".join(repr(sorted(part.items())) for part in parts)

    def facts(self) -> dict[str, str]:
        """Return each argument's type and specialisation, and each option: all that can differ between forms of a kernel."""
        names = self.kernel.arg_names
        facts = {name: str(kind) for name, kind in self.signature.items()}
        for path, value in self.constexprs.items():
            facts[_place(names, path)] = f"constexpr {value!r}"
        for path, attributes in self.attributes.items():
            if attributes:
                notes = ", ".join(f"{name}={value}" for name, value in attributes)
                facts[_place(names, path)] = f"{facts.get(_place(names, path), '')} {notes}"
        return facts | {key: repr(value) for key, value in self.options.items()}


def _place(names: list[str], path: tuple[int, ...]) -> str:
    """Return the name of an argument, or of an item of an argument that is a tuple."""
    return "".join([names[path[0]], *(f"[{i}]" for i in path[1:])])


@dataclass
class Recording:
    """The forms launched inside one `with recording()`, per kind of device, in order."""

    forms: dict[str, list[Form]] = field(default_factory=lambda: {kind: [] for kind in BINDING})
    refusals: list[str] = field(default_factory=list)
    """Launches with options that a kind of device does not support."""


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the arguments of `kernel[grid](...)` inside this context instead of launching the kernel."""
    made = Recording()

    def run(kernel: JITFunction, *args, grid, warmup, **kwargs):
        for kind, target in BINDING.items():
            # On an AMD device the launchers omit these options (rlhf_kernels/_triton/scan.py).
            known = {name: value for name, value in kwargs.items() if kind == "cuda" or name not in NVIDIA_OPTIONS}
            try:
                made.forms[kind].append(bind(kernel, make_backend(target), args, known))
            except KeyError as error:
                made.refusals.append(f"{label(kernel)} cannot be launched on a {kind} device: {error.args[0]}")
        if callable(grid):
            grid(dict(zip(kernel.arg_names, args, strict=False)) | kwargs)

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield made
    finally:
        JITFunction.run = original


def bind(kernel: JITFunction, backend, args: tuple, kwargs: dict) -> Form:
    """Return the form of a launch, with its arguments specialised for the backend by Triton's binder."""
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    _, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return Form(kernel, signature, constexprs, attributes, options)


def label(kernel: JITFunction) -> str:
    """Return `module.function`, with only the last part of the module's name."""
    return f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}"


def kernels_of(package: ModuleType) -> set[str]:
    """Return the labels of a package's kernels: its jitted functions that no other jitted function of the package uses."""
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = {
        id(value): value
        for module in (package, *modules)
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__module__.startswith(package.__name__)
    }
    used = {id(other) for kernel in found.values() for other in used_by(kernel) if other is not kernel}
    return {label(kernel) for identity, kernel in found.items() if identity not in used}


def used_by(kernel: JITFunction) -> Iterator[JITFunction]:
    """Yield the jitted functions that the source of this one names, as `function` or as `module.function`."""
    scope = kernel.fn.__globals__
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))):
        found = scope.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = getattr(scope.get(node.value.id), node.attr, None)
        if isinstance(found, JITFunction):
            yield found
