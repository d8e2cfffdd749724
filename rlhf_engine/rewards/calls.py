"""Calls of a user's functions: on lists or on one sample at a time, plain or async, with columns of the records."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rlhf_engine.rewards.awaiting import Outcome, awaited, outcomes
from rlhf_engine.rewards.limits import Limits
from rlhf_engine.rewards.user_code import OutOfTime, SampleError, user_code_errors

_NONE: Mapping[str, list[Any]] = {}
_NO_LIMITS = Limits()
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
    limits: Limits = _NO_LIMITS,
) -> Any:
    """Return the result of `function` on columns of samples, with tensors and arrays converted to lists and numbers.

    `named` are columns that are passed by name. An async function is awaited. If `batched`, the function receives lists; if the
    call fails, it is called on one sample at a time to find the sample that causes it. After a call that reached the time
    limit, these calls together have that time as well, and the sample on which it ends is named if its own call had more than
    half of it. Otherwise the function receives single values, and the list of its results is returned; at most `concurrency`
    calls of an async function run at once.

    Raises:
        SampleError: for the first sample on which `function` raises or takes too long.
        ValueError: that begins with `samples`, if `function` fails only on all samples together; or as `Limits.of`.
    """
    size, calls, limits = len(columns[0]), limits.retries + 1, limits.of(function)
    if not batched:
        return _each(function, columns, named, samples, concurrency, limits)

    def call(rows: slice) -> Any:
        one = {name: limits.copied(column[rows]) for name, column in named.items()}
        result = function(*(limits.copied(column[rows]) for column in columns), **one)
        return result if inspect.isawaitable(result) else _plain(result)  # reading a generator runs user code

    try:
        with user_code_errors(samples, 0 if size == 1 else None, calls=calls):
            return limits.call(partial(call, slice(None)), partial(_awaited, limits=limits))
    except SampleError:
        raise
    except ValueError as error:
        _find(call, size, samples, limits, slow=isinstance(error.__cause__, OutOfTime))
        raise


def _find(call: Callable[[slice], Any], size: int, samples: str, limits: Limits, *, slow: bool) -> None:
    """Call a function on one sample at a time; raise SampleError for the first one on which it fails.

    If it is `slow`, all calls together have the time limit of one. A call that ends at it has caused that if it had more than
    half of the limit; otherwise raise ValueError for all samples together.
    """
    end = time.monotonic() + limits.timeout
    for row in range(size):
        left = max(end - time.monotonic(), 1e-3) if slow else limits.timeout
        once = replace(limits, retries=0, timeout=left)
        try:
            with user_code_errors(samples, row):
                once.call(partial(call, slice(row, row + 1)), partial(_awaited, limits=once))
        except SampleError as error:
            if not isinstance(error.__cause__, OutOfTime):
                raise
            if left <= limits.timeout / 2:
                raise ValueError(
                    f"{samples} together took longer than {limits.timeout:g} s; raise reward.timeout"
                ) from error.__cause__
            with user_code_errors(samples, row, calls=limits.retries + 1):
                raise limits.out_of_time().with_traceback(error.__cause__.__traceback__) from None


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


def _awaited(value: Any, limits: Limits) -> Any:
    return _plain(awaited(value, limits)) if inspect.isawaitable(value) else value


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
    limits: Limits,
) -> list[Any]:
    """Call `function` on each sample; await the calls of an async function together."""

    def call(row: int) -> Any:
        one = {name: limits.copied(column[row]) for name, column in named.items()}
        return function(*(limits.copied(column[row]) for column in columns), **one)

    results: list[Any] = []
    for row in range(len(columns[0])):
        with user_code_errors(samples, row, calls=limits.retries + 1):
            results.append(limits.call(partial(call, row)))
    waiting = [row for row, result in enumerate(results) if inspect.isawaitable(result)]
    found = outcomes([results[row] for row in waiting], concurrency, limits, lambda index: call(waiting[index]))
    for row, outcome in zip(waiting, found, strict=True):
        results[row] = outcome
    for row, result in enumerate(results):
        with user_code_errors(samples, row, calls=limits.retries + 1):
            results[row] = _plain(result.value() if isinstance(result, Outcome) else result)
    return results
