"""A user's Python functions, which are rewards and judges: import by name, calls, and errors that name the function."""

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
    """An error of a user's function on sample number `row` of a call."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


class user_code_errors:
    """A context manager that converts any exception of user code into a ValueError that begins with `what`.

    With `row` it is a SampleError of that row. SystemExit is converted too.
    """

    def __init__(self, what: str, row: int | None = None) -> None:
        self.what, self.row = what, row

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # SystemExit in user code would end the run without a message.
        if kind is None or not issubclass(kind, Exception | SystemExit):
            return
        reason = f"it raised {kind.__name__}: {' '.join(str(error).split())}"
        if self.row is not None:
            raise SampleError(self.row, reason) from error
        raise ValueError(f"{self.what}: {reason}") from error


def import_function(name: str, key: str) -> Callable[..., Any]:
    """Import `module:function` or `path/to/file.py:function`.

    Raises:
        ValueError: that begins with `key`, if `name` does not refer to a function.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"{key}: got {name!r}, expected module:function or file.py:function")
    function = getattr(_module(place, key), attribute, None)
    if not callable(function):
        got = "not defined" if function is None else type(function).__name__
        raise ValueError(f"{key}: {attribute!r} in {place} is {got}, expected a function")
    return function


def ask(function: Callable[..., Any], columns: Sequence[list[Any]], samples: str) -> Any:
    """Return the result of `function` on columns of samples, with tensors and arrays converted to lists and numbers.

    If the call raises, `function` is called on one sample at a time to find the sample that causes the error.

    Raises:
        SampleError: for the first sample on which `function` raises.
        ValueError: that begins with `samples`, if `function` raises only on all samples together.
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
    """Return `value` as a float: None if it is not a number (a text never is), infinity if it is too large for a float."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        return math.inf


def _plain(value: Any) -> Any:
    """Convert a user function's result to lists and numbers; tensors, arrays and table columns have a `tolist`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        return value
    return [_plain(part) for part in value]


def _module(place: str, key: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            with user_code_errors(f"{key}: {place}"):
                return importlib.import_module(place)
        except ValueError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                raise ValueError(
                    f"{key}: {error.__cause__}; expected a module on Python's path, or a path that ends in .py"
                ) from None
            raise
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{key}: {path}: no such file")
    # Dataclasses look up their module by its name, so the name must be unique.
    name = f"_rlhf_user_code_{blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with user_code_errors(f"{key}: {path}"):
        spec.loader.exec_module(module)
    return module
