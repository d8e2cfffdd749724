"""Pytest plugin that swaps a peer's functions for ours and counts the tests that call them.

    pytest -p benchmarks.peer_suites.plugin --peer verl [--originals] [--report FILE] FILES

`suites.toml` has the table of the peer: which functions are swapped, and which tests are expected to fail, with the reason.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.overrides import TorchFunctionMode

TABLE = Path(__file__).with_name("suites.toml")


@dataclass(frozen=True)
class Suite:
    """One entry of the table: the tests of one peer."""

    peer: str
    version: str
    """Release, or tag of the checkout, whose tests are run."""
    source: str
    """`sdist`: the tests are in the source distribution; `checkout`: only in the repository."""
    files: tuple[str, ...]
    """Test files, relative to the root of the source."""
    swaps: dict[str, str]
    """Function or method of the peer as `module:name` -> ours."""
    repository: str = ""
    """URL to clone the checkout from."""
    select: str = ""
    """Expression for pytest's `-k`; empty: all tests."""
    cuda_on_cpu: bool = False
    """The tests put their tensors on "cuda" only; tensors go to the CPU instead, and a device is reported as available."""
    stubs: tuple[str, ...] = ()
    """Modules that are imported and not used, and that are replaced by empty ones."""
    bare: tuple[str, ...] = ()
    """Packages of the source whose `__init__` is not run, because it imports more than the tests use."""
    conftest: bool = True
    """The tests use the fixtures of the peer's `conftest.py`."""
    expected_failures: dict[str, str] = field(default_factory=dict)
    """Regular expression for test ids -> the reason why these tests fail with our functions."""

    def __post_init__(self) -> None:
        for name in ("files", "stubs", "bare"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


def read_table() -> dict[str, Suite]:
    """Return the suites of the table by peer."""
    return {peer: Suite(peer, **entry) for peer, entry in tomllib.loads(TABLE.read_text()).items()}


def resolve(target: str) -> tuple[Any, str]:
    """Return the module or class that has the last name of `module:name` or `module:Class.method`, and that name."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), name


def counted(function: Callable[..., Any], target: str, calls: Counter[str]) -> Callable[..., Any]:
    """Return `function`, or a subclass of it if it is a class, that counts its calls or its instances."""
    if isinstance(function, type):

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            calls[target] += 1
            function.__init__(self, *args, **kwargs)

        return type(function.__name__, (function,), {"__init__": __init__})

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[target] += 1
        return function(*args, **kwargs)

    return call


def swap(target: str, ours: Callable[..., Any]) -> None:
    """Put `ours` in place of `target` wherever a loaded module of that package refers to it, also in dictionaries."""
    owner, name = resolve(target)
    original = getattr(owner, name)
    setattr(owner, name, ours)
    package = target.partition(":")[0].partition(".")[0]
    for module in [m for key, m in sys.modules.items() if key.partition(".")[0] == package and m is not None]:
        for names in [vars(module), *(value for value in vars(module).values() if type(value) is dict)]:
            for key in [key for key, value in names.items() if value is original]:
                names[key] = ours


class OnCPU(TorchFunctionMode):
    """Mode in which tensors that are requested on "cuda" are created on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def moved(value: Any) -> Any:
            is_cuda = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
            return "cpu" if is_cuda else value

        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(moved, args), **{key: moved(value) for key, value in (kwargs or {}).items()})


class Swapped:
    """The hooks of one run, and what it found."""

    def __init__(self, suite: Suite, report: str, *, originals: bool):
        self.suite = suite
        self.report = report
        self.calls: Counter[str] = Counter()
        self.calling: set[str] = set()
        """Ids of the tests that called a swapped function."""
        self.outcomes: dict[str, str] = {}
        self.reasons: Counter[str] = Counter()
        """Reasons of the tests that failed as expected."""
        self.expected = {} if originals else suite.expected_failures
        self.found: set[str] = set()
        for name in suite.stubs:
            sys.modules[name] = _empty(name)
        for name in suite.bare:
            sys.modules[name] = _empty(name, path=Path(*name.split(".")))
        if suite.cuda_on_cpu:
            torch.cuda.is_available = lambda: True
            OnCPU().__enter__()
        for target, ours in suite.swaps.items():
            function = getattr(*resolve(target if originals else ours))
            swap(target, counted(function, target, self.calls))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for pattern, reason in self.expected.items():
                if re.search(pattern, item.nodeid):
                    self.found.add(pattern)
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, None, None]:
        before = self.calls.total()
        try:
            return (yield)
        finally:
            if self.calls.total() > before:
                self.calling.add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            expected = hasattr(report, "wasxfail") and report.outcome == "skipped"
            self.outcomes[report.nodeid] = "expected failure" if expected else report.outcome
            if expected:
                self.reasons[report.wasxfail] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail if a swapped function was not called or an expected failure names no test, and write the report."""
        stale = [f"{pattern}: matches no test" for pattern in set(self.expected) - self.found]
        unused = [f"{target}: swapped and never called" for target in set(self.suite.swaps) - set(self.calls)]
        for problem in (problems := sorted(stale + unused)):
            print(f"\nsuites.toml, {self.suite.peer}: {problem}", end="")
        if problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.report:
            outcomes = Counter(self.outcomes.values())
            calling = Counter(self.outcomes[test] for test in self.calling)
            failed = sorted(test for test, outcome in self.outcomes.items() if outcome == "failed")
            found = {
                "outcomes": outcomes,
                "calling": calling,
                "expected": self.reasons,
                "calls": self.calls,
                "failed": failed,
                "problems": problems,
            }
            Path(self.report).write_text(json.dumps(found, indent=1) + "\n")


def _empty(name: str, path: Path | None = None) -> ModuleType:
    """Return a package without names and with the modules of `path`; without a path, every name is a mock."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = [] if path is None else [str(path.resolve())]
    if path is None:

        def mock(attribute: str) -> MagicMock:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return MagicMock(name=f"{name}.{attribute}")

        module.__getattr__ = mock  # type: ignore[method-assign]
    return module


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peer suites")
    group.addoption("--peer", required=True, help="the entry of suites.toml")
    group.addoption(
        "--originals", action="store_true", help="count the calls of the peer's functions, and swap nothing"
    )
    group.addoption("--report", default="", help="write what was found to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    suite = read_table()[config.getoption("--peer")]
    hooks = Swapped(suite, config.getoption("--report"), originals=config.getoption("--originals"))
    config.pluginmanager.register(hooks, "peer suites")
