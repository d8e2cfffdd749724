"""Limits of the calls of a user's function: a time limit, and calls that are repeated after a failure.

The time limit of a plain function is an alarm (SIGALRM) in the main thread, in which the function runs. The alarm raises an
exception inside the function, so nothing of it runs on, and a repeated call never overlaps an earlier one. This ends waiting
(sleep, sockets, locks, child processes), loops in Python and regular expressions. A thread could not be ended at all, and a
regular expression, which holds the interpreter's lock, would stop the thread that waits for it as well. A process could be
killed, but has a copy of the user's globals and models. Two cases are left: native code that neither returns nor reacts to
signals, and functions that set an alarm themselves (`signal.alarm`), which replaces this one for the rest of the call.

An async function runs in a thread with an event loop, and is cancelled at its limit (`awaiting`); it needs no alarm, and may be
called in any thread.
"""

from __future__ import annotations

import copy
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, TypeVar

from rlhf_engine.notices import notice
from rlhf_engine.rewards.user_code import OutOfTime

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before a call is repeated for the first time, and the maximum; each wait is twice the one before."""
_AGAIN = 1.0
"""Seconds between alarms, for a function that catches the first one."""
_LONGEST = 1e8
"""Seconds of the longest alarm."""

FAILURES = (Exception, SystemExit, OutOfTime)
"""Exceptions of user code; the others, such as KeyboardInterrupt, end the run."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """Limits of every call of a function."""

    timeout: float = 0.0
    """Maximum seconds of a call; 0 is no limit."""
    retries: int = 0
    """Maximum number of repeated calls after one that failed."""
    what: str = "function"
    """The function's name in notices."""
    alarm: bool = True
    """Whether an alarm ends a call; an async function is cancelled instead."""

    def of(self, function: Callable[..., Any]) -> Limits:
        """Return the limits of the calls of `function`: without the alarm if it is async.

        Raises:
            ValueError: there is a time limit, the function is not async, and this is not the main thread.
        """
        if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
            return replace(self, alarm=False)
        if self.timeout and threading.current_thread() is not threading.main_thread():
            raise ValueError(
                f"reward.timeout: got {self.timeout:g} in the thread {threading.current_thread().name!r}, expected 0; "
                "outside the main thread, only an async function can have a limit"
            )
        return self

    def waits(self) -> Iterator[float]:
        """Yield the seconds to wait before each repeated call."""
        yield from (min(FIRST_WAIT * 2.0**number, LONGEST_WAIT) for number in range(self.retries))

    def call(self, function: Callable[[], Any], finish: Callable[[Any], Any] = lambda result: result) -> Any:
        """Return `finish(function())`; `function` has at most `timeout` seconds. Repeat both if one of them raises.

        Raises:
            OutOfTime: the last call took longer.
        """
        for wait in self.waits():
            try:
                return self._once(function, finish)
            except FAILURES as error:
                self.report(error, wait)
            time.sleep(wait)
        return self._once(function, finish)

    def _once(self, function: Callable[[], Any], finish: Callable[[Any], Any]) -> Any:
        with self.time_limit():
            result = function()
        return finish(result)

    def copied(self, value: Result) -> Result:
        """Return a copy of an argument if a call may be repeated, because a failed call may have changed it."""
        return copy.deepcopy(value) if self.retries else value

    def report(self, error: BaseException, wait: float) -> None:
        """Log a failed call that will be repeated after `wait` seconds."""
        reason = str(error) if isinstance(error, OutOfTime) else f"it raised {type(error).__name__}: {error}"
        notice(f"{self.what}: {' '.join(reason.split())}; it is called again in {wait:g} s (reward.retries)")

    def out_of_time(self) -> OutOfTime:
        """Return the exception for a call that reached the time limit."""
        return OutOfTime(f"it took longer than {self.timeout:g} s (reward.timeout)")

    @contextmanager
    def time_limit(self) -> Iterator[None]:
        """Raise OutOfTime inside the block after `timeout` seconds, and again every second until it has ended, by an alarm."""
        if not self.timeout or not self.alarm:
            yield
            return
        active = False

        def end(signum: int, frame: FrameType | None) -> None:
            if active:
                raise self.out_of_time()

        before = signal.signal(signal.SIGALRM, end)
        try:
            active = True
            signal.setitimer(signal.ITIMER_REAL, min(max(self.timeout, 1e-3), _LONGEST), _AGAIN)
            yield
        finally:
            active = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            if (
                before is not None
            ):  # None is a handler of native code, which Python cannot restore; `end` stays and is idle
                signal.signal(signal.SIGALRM, before)
