"""Awaiting the results of async functions in one event loop, with the limits of a call."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf_engine.rewards.limits import Limits

_NO_LIMITS = Limits()
_BLOCKED = 2.0
"""Seconds after its time limit at which an async call that was not cancelled is blocking the event loop."""
_LOOK = 0.5
"""Seconds between looks at the calls that run."""


@dataclass(frozen=True)
class Outcome:
    """The result of an awaitable, or the exception that it raised."""

    result: Any = None
    error: BaseException | None = None

    def value(self) -> Any:
        """Return the result, or raise the exception."""
        if self.error is not None:
            raise self.error
        return self.result


def awaited(value: Any, limits: Limits = _NO_LIMITS) -> Any:
    """Return `value`, or its result within the time limit if it is awaitable."""
    return outcomes([value], 1, limits)[0].value() if inspect.isawaitable(value) else value


def outcomes(
    awaitables: Sequence[Any],
    concurrency: int,
    limits: Limits = _NO_LIMITS,
    again: Callable[[int], Any] | None = None,
) -> list[Outcome]:
    """Await all, at most `concurrency` at a time, each within the time limit.

    `again(index)` calls the function of an awaitable that failed once more, for `limits.retries`.
    """
    if not awaitables:
        return []
    calls = _Calls(awaitables, concurrency, limits, again)
    future = asyncio.run_coroutine_threadsafe(calls.gathered(), calls.loop)
    try:
        while True:
            try:
                return future.result(_LOOK)
            except NotYet:
                blocked = calls.blocked()
                if blocked is not None:
                    _event_loop.cache_clear()  # this one is occupied
                    return blocked
    finally:
        future.cancel()  # after a signal


class _Calls:
    """The calls of an async function for several samples."""

    def __init__(
        self, awaitables: Sequence[Any], concurrency: int, limits: Limits, again: Callable[[int], Any] | None
    ) -> None:
        self.awaitables, self.concurrency, self.limits, self.again = awaitables, concurrency, limits, again
        self.loop = _event_loop()
        self.begun: dict[int, tuple[float, asyncio.Task[Any] | None]] = {}
        self.reported = False

    async def gathered(self) -> list[Outcome]:
        free = asyncio.Semaphore(self.concurrency)

        async def one(index: int) -> Outcome:
            async with free:
                return await self._outcome(index)

        return await asyncio.gather(*map(one, range(len(self.awaitables))))

    def blocked(self) -> list[Outcome] | None:
        """Return the outcomes if a call was not ended at its time limit: that call ran out of time. Otherwise None.

        It blocks the loop, so that all calls are late and it is the one that runs, or it ignores that it was cancelled.
        """
        if not self.limits.timeout:
            return None
        latest = time.monotonic() - self.limits.timeout - _BLOCKED
        begun = list(self.begun.items())
        late = [index for index, (when, _) in begun if when < latest]
        running = asyncio.current_task(self.loop)
        causes = [index for index, (_, task) in begun if index in late and task is running] or late
        if not causes:
            return None
        ended = Outcome(error=self.limits.out_of_time())
        return [ended if index in causes else Outcome() for index in range(len(self.awaitables))]

    async def _outcome(self, index: int) -> Outcome:
        """Await one call, and repeat it if it fails."""
        waits = self.limits.waits() if self.again is not None else iter(())
        outcome = await self._attempt(index, self.awaitables[index])
        for wait in waits:
            if outcome.error is None:
                break
            if not self.reported:  # one line per rollout
                self.reported = True
                self.limits.report(outcome.error, wait)
            await asyncio.sleep(wait)
            outcome = await self._attempt(index, None)
        return outcome

    async def _attempt(self, index: int, awaitable: Any) -> Outcome:
        """Await `awaitable`, or the result of a new call if it is None."""
        self.begun[index] = (time.monotonic(), asyncio.current_task())
        try:
            async with asyncio.timeout(self.limits.timeout or None) as limit:
                if awaitable is None:
                    assert self.again is not None
                    awaitable = self.again(index)
                return Outcome(await awaitable if inspect.isawaitable(awaitable) else awaitable)
        except TimeoutError as error:
            if limit.expired():
                inside = error.__cause__ or error  # the cancelled call, whose traceback has the user's line
                return Outcome(error=self.limits.out_of_time().with_traceback(inside.__traceback__))
            return Outcome(error=error)
        except (Exception, SystemExit) as error:  # user code may raise anything; the caller raises it again
            return Outcome(error=error)
        finally:
            del self.begun[index]


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs in a thread until the process ends.

    All calls share it, so that a user's client sessions stay valid, and a notebook's running loop does not matter.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rlhf user code", daemon=True).start()
    return loop
