"""A user's Python functions, which are rewards and judges: import by name, and errors that name the file and line.

The calls are in `calls`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable
from hashlib import blake2b, sha256
from pathlib import Path
from traceback import walk_tb
from types import ModuleType, TracebackType
from typing import Any

_LIBRARIES = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(__file__).parents[1]),
)
"""Folders whose code is not the user's."""


class SampleError(ValueError):
    """An error of a user's function on sample number `row` of a call."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


class OutOfTime(BaseException):
    """The end of a call that took too long. It is no Exception, so that user code does not catch it by accident."""


class user_code_errors:
    """A context manager that converts any exception of user code into a ValueError that begins with `what`.

    With `row` it is a SampleError of that row. The message has the last line of the user's code that ran, and the number of
    `calls` if there was more than one. SystemExit and OutOfTime are converted too.
    """

    def __init__(self, what: str, row: int | None = None, *, calls: int = 1) -> None:
        self.what, self.row, self.calls = what, row, calls

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # SystemExit in user code would end the run without a message.
        if kind is None or not issubclass(kind, Exception | SystemExit | OutOfTime):
            return
        text = " ".join(str(error).split())
        reason = f"{text if kind is OutOfTime else f'it raised {kind.__name__}: {text}'}{_place(trace)}"
        if self.calls > 1:
            reason += f", in each of {self.calls} calls"
        if self.row is not None:
            raise SampleError(self.row, reason) from error
        raise ValueError(f"{self.what}: {reason}") from error


def _place(trace: TracebackType | None) -> str:
    """Return " (file:line, in function)" of the innermost frame in the user's code, or an empty text without one."""
    place = ""
    for frame, line in walk_tb(trace):
        code = frame.f_code
        if not code.co_filename.startswith(("<", *_LIBRARIES)):
            place = f" ({code.co_filename}:{line}, in {code.co_name})"
    return place


def import_function(name: str, key: str) -> Callable[..., Any]:
    """Import `module:function` or `path/to/file.py:function`.

    The folder of the file, or the working folder for a module, is put on Python's path.

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


def source_fingerprint(name: str) -> str:
    """Return the SHA-256 of the file of an imported `module:function` or `file.py:function`, and of the function's name.

    It does not depend on the file's path, so that a resumed run may import the same file from a different place.
    """
    place, _, attribute = name.rpartition(":")
    source = place if place.endswith(".py") else getattr(sys.modules[place], "__file__", None)
    content = b"" if source is None else Path(source).read_bytes()
    return sha256(attribute.encode() + b"\0" + content).hexdigest()


def _module(place: str, key: str) -> ModuleType:
    if not place.endswith(".py"):
        _add_to_path(Path.cwd(), key)
        try:
            with user_code_errors(f"{key}: {place}"):
                return importlib.import_module(place)
        except ValueError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                raise ValueError(
                    f"{key}: {error.__cause__}; expected a module in the working folder or on Python's path, or a path that "
                    "ends in .py"
                ) from None
            raise
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{key}: {path}: no such file")
    _add_to_path(path.resolve().parent, key, loaded=path.resolve())
    # Dataclasses look up their module by its name, so the name must be unique.
    name = f"_rlhf_user_code_{blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with user_code_errors(f"{key}: {path}"):
        spec.loader.exec_module(module)
    return module


_ADDED: list[Path] = []
"""Folders of user code on Python's path."""


def forget() -> None:
    """Remove the folders of user code from Python's path, and the modules that were imported from them.

    A process of the command imports the code of one run; call this before the code of an unrelated one.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).parent in _ADDED:
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry) not in _ADDED]
    _ADDED.clear()


def _add_to_path(folder: Path, key: str, loaded: Path | None = None) -> None:
    """Put a folder at the beginning of Python's path, as Python does for a script, so that its files can import each other.

    The file that is `loaded` gets a unique module name, so it may have the name of a module that is already imported.

    Raises:
        ValueError: a different file of the folder has the name of a module that was imported from such a folder before.
    """
    if folder in _ADDED:
        return
    for path in sorted(set(folder.glob("*.py")) - {loaded}):
        known = getattr(sys.modules.get(path.stem), "__file__", None)
        if known is not None and Path(known) != path and Path(known).parent in _ADDED:
            raise ValueError(f"{key}: {path} has the name of {known}, which is already imported; rename one of the two")
    _ADDED.append(folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
