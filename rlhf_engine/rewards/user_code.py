"""A user's own Python functions, rewards and judges: found by name, asked, and told of by name where they fail."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any


class SampleError(ValueError):
    """What a user's function did wrong with one of the samples of a call, number `row` of them."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


class user_code_errors:
    """Turns whatever is raised inside into a ValueError that begins with `what`.

    A context manager, because what a stranger's code may raise cannot be listed.
    """

    def __init__(self, what: str, row: int | None = None) -> None:
        self.what, self.row = what, row

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A stranger's exit would end the run without a word.
        if kind is None or not issubclass(kind, Exception | SystemExit):
            return
        said = f"it raised {kind.__name__}: {' '.join(str(error).split())}"
        if self.row is not None:
            raise SampleError(self.row, said) from error
        raise ValueError(f"{self.what}: {said}") from error


def import_function(name: str, key: str) -> Callable[..., Any]:
    """What `module:function` or `path/to/file.py:function` names; ValueError, naming `key`, if it names nothing callable."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"{key}: got {name!r}, expected module:function or file.py:function")
    function = getattr(_module(place, key), attribute, None)
    if not callable(function):
        got = "nothing" if function is None else type(function).__name__
        raise ValueError(f"{key}: got {got} under the name {attribute!r} in {place}, expected a function")
    return function


def ask(function: Callable[..., Any], columns: Sequence[list[Any]], samples: str) -> Any:
    """What `function` gives for columns of samples, as lists and numbers where it gave tensors or arrays.

    Raises SampleError for the first sample on which it raises alone; ValueError, which begins with `samples`, if it raises
    on all of them together only.
    """
    size = len(columns[0])
    try:
        with user_code_errors(samples, 0 if size == 1 else None):
            return _plain(function(*columns))
    except SampleError:
        raise
    except ValueError:
        for row in range(size):
            with user_code_errors(samples, row):
                _plain(function(*([column[row]] for column in columns)))
        raise


def number(value: Any) -> float | None:
    """A float; None for what is no number, infinity for one that no float holds. A text is none, whatever it spells."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        return math.inf


def _plain(said: Any) -> Any:
    """Lists and numbers of what a user's function gives: tensors, arrays and columns of a table have a `tolist`."""
    if hasattr(said, "tolist"):
        return said.tolist()
    if isinstance(said, str | bytes | dict) or not isinstance(said, Iterable):
        return said
    return [_plain(part) for part in said]


def _module(place: str, key: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            with user_code_errors(f"{key}: {place}"):
                return importlib.import_module(place)
        except ValueError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                raise ValueError(
                    f"{key}: {error.__cause__}; expected a module that Python finds, or a path that ends in .py"
                ) from None
            raise
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{key}: {path}: no such file")
    # Dataclasses look their module up by its name, so it has one that no other module has.
    name = f"_rlhf_user_code_{blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with user_code_errors(f"{key}: {path}"):
        spec.loader.exec_module(module)
    return module
