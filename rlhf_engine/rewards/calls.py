"""Calls of a user's functions: on lists or on one sample at a time, plain or async, with columns of the records."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf_engine.rewards.user_code import SampleError, user_code_errors

_NONE: Mapping[str, list[Any]] = {}
_RESPONSES = ("responses", "completions", "response", "completion")


@dataclass(frozen=True)
class Parameters:
    """The parameters of a reward function."""

    data: tuple[str, ...]
    """What it receives by position: "prompts" and "responses", in its order."""
    required: tuple[str, ...]
    """Columns that it needs, which are its further parameters without a default."""
    optional: tuple[str, ...]
    """Columns that it receives if the records have them, which are its further parameters with a default."""
    every: bool
    """Whether it takes all columns, as `**columns`."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Parameters:
        """Return the parameters of `function`: `(prompts, responses, ...)`.

        The names `responses` and `completions` also describe a function whose first parameter is the responses.
        """
        try:
            found = list(inspect.signature(function).parameters.values())
        except (ValueError, TypeError):  # a function that is not written in Python
            return cls(("prompts", "responses"), (), (), False)
        by_name = [one for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        by_place = [one for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        data = ("prompts", "responses")
        if by_place and by_place[0].name in _RESPONSES:
            swapped = len(by_place) > 1 and by_place[1].name in ("prompts", "prompt")
            data = ("responses", "prompts") if swapped else ("responses",)
        taken = by_place[: len(data)]
        further = [one for one in by_name if one not in taken]
        return cls(
            data,
            tuple(one.name for one in further if one.default is one.empty),
            tuple(one.name for one in further if one.default is not one.empty),
            any(one.kind is one.VAR_KEYWORD for one in found),
        )

    def columns(self, available: Collection[str]) -> tuple[str, ...]:
        """Return the columns among `available` that the function receives.

        Raises:
            ValueError: a required column is not available; the message has no name of the function.
        """
        for name in self.required:
            if name not in available:
                others = (
                    f"the further columns are {', '.join(available)}" if available else "there are no further columns"
                )
                raise ValueError(f"it has the parameter {name!r}, but the prompts have no such column; {others}")
        if self.every:
            return tuple(available)
        return tuple(name for name in (*self.required, *self.optional) if name in available)


def ask(
    function: Callable[..., Any],
    columns: Sequence[list[Any]],
    samples: str,
    named: Mapping[str, list[Any]] = _NONE,
    *,
    batched: bool = True,
    concurrency: int = 1,
) -> Any:
    """Return the result of `function` on columns of samples, with tensors and arrays converted to lists and numbers.

    `named` are columns that are passed by name. An async function is awaited. If `batched`, the function receives lists; if the
    call raises, it is called on one sample at a time to find the sample that causes the error. Otherwise it receives single
    values, and the list of its results is returned; at most `concurrency` calls of an async function run at once.

    Raises:
        SampleError: for the first sample on which `function` raises.
        ValueError: that begins with `samples`, if `function` raises only on all samples together.
    """
    size = len(columns[0])
    if not batched:
        return _each(function, columns, named, samples, concurrency)
    try:
        with user_code_errors(samples, 0 if size == 1 else None):
            return _plain(_awaited(function(*columns, **named)))
    except SampleError:
        raise
    except ValueError:
        for row in range(size):
            one = {name: [column[row]] for name, column in named.items()}
            with user_code_errors(samples, row):
                _plain(_awaited(function(*([column[row]] for column in columns), **one)))
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


def shown_prompt(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """Return a prompt for an error message: its text, or that of its last message, quoted and shortened."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _plain(value: Any) -> Any:
    """Convert a user function's result to lists and numbers; tensors, arrays and table columns have a `tolist`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        return value
    return [_plain(part) for part in value]


def _each(
    function: Callable[..., Any],
    columns: Sequence[list[Any]],
    named: Mapping[str, list[Any]],
    samples: str,
    concurrency: int,
) -> list[Any]:
    """Call `function` on each sample; await the calls of an async function together."""
    results: list[Any] = []
    for row in range(len(columns[0])):
        one = {name: column[row] for name, column in named.items()}
        with user_code_errors(samples, row):
            results.append(function(*(column[row] for column in columns), **one))
    waiting = [row for row, result in enumerate(results) if inspect.isawaitable(result)]
    for row, outcome in zip(waiting, _outcomes([results[row] for row in waiting], concurrency), strict=True):
        results[row] = outcome
    for row, result in enumerate(results):
        with user_code_errors(samples, row):
            results[row] = _plain(result.value() if isinstance(result, _Outcome) else result)
    return results


# ---- async functions ----


@dataclass(frozen=True)
class _Outcome:
    """The result of an awaitable, or the exception that it raised."""

    result: Any = None
    error: BaseException | None = None

    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


def _awaited(value: Any) -> Any:
    """Return `value`, or its result if it is awaitable."""
    return _outcomes([value], 1)[0].value() if inspect.isawaitable(value) else value


def _outcomes(awaitables: Sequence[Awaitable[Any]], concurrency: int) -> list[_Outcome]:
    """Await all, at most `concurrency` at a time."""

    async def gathered() -> list[_Outcome]:
        free = asyncio.Semaphore(concurrency)

        async def outcome(awaitable: Awaitable[Any]) -> _Outcome:
            async with free:
                try:
                    return _Outcome(await awaitable)
                except (Exception, SystemExit) as error:  # user code may raise anything; the caller raises it again
                    return _Outcome(error=error)

        return await asyncio.gather(*map(outcome, awaitables))

    if not awaitables:
        return []
    future = asyncio.run_coroutine_threadsafe(gathered(), _event_loop())
    try:
        return future.result()
    finally:
        future.cancel()  # after a signal


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs in a thread until the process ends.

    All calls share it, so that a user's client sessions stay valid, and a notebook's running loop does not matter.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rlhf user code", daemon=True).start()
    return loop
