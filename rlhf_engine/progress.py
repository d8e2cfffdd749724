"""Progress of a stage on stderr: a line that is redrawn on a terminal, and log lines otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from tqdm import tqdm

LINE_SECONDS = 20.0
"""Seconds between two progress lines where stderr is not a terminal."""


class Bar(Protocol):
    """A display of progress."""

    def advance(self, tokens: int = 0) -> None:
        """Count one unit, with the number of tokens that were processed in it."""

    def show(self, **values: str) -> None:
        """Set the values that are displayed, such as the last loss."""

    def close(self) -> None:
        """End the display."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class _Rate:
    """Tokens per second since the start, as text; empty before the first token."""

    def __init__(self) -> None:
        self.tokens, self.start = 0, time.monotonic()

    def add(self, tokens: int) -> str:
        self.tokens += tokens
        seconds = time.monotonic() - self.start
        return f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens and seconds > 0 else ""


class _Values(ProgressColumn):
    """The values at the end of the line, which are cut first if the terminal is narrow."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["values"], no_wrap=True, overflow="ellipsis")


class TerminalBar:
    """Stage, bar, count, tokens per second, remaining time and values in one line of a terminal; long values are cut."""

    def __init__(self, total: int, what: str, unit: str, done: int, console: Console | None = None) -> None:
        plain = Column(no_wrap=True)
        self.display = Progress(
            TextColumn("{task.description}", table_column=plain),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}s", table_column=plain),
            TextColumn("{task.fields[rate]}", table_column=plain),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=plain),
            _Values(),
            console=console or Console(stderr=True),
            expand=True,
            refresh_per_second=2,
        )
        self.rate = _Rate()
        self.task = self.display.add_task(what, total=total, completed=done, unit=unit, rate="", values="")
        self.display.start()

    def advance(self, tokens: int = 0) -> None:
        """Count one unit, with its number of tokens."""
        self.display.update(self.task, advance=1, rate=self.rate.add(tokens))

    def show(self, **values: str) -> None:
        """Set the values at the end of the line."""
        self.display.update(self.task, values=" ".join(f"{name}={value}" for name, value in values.items()))

    def close(self) -> None:
        """Draw the line a last time and leave it on the terminal."""
        self.display.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ProgressLines(tqdm):
    """Progress as log lines, one every `LINE_SECONDS`. A task that takes less time writes none."""

    def __init__(self, **options: Any) -> None:
        form = "{desc}: {n_fmt} of {total_fmt} {unit}s{tokens}, {elapsed} elapsed, {remaining} left{postfix}"
        seconds = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "delay": LINE_SECONDS}
        self._tokens, self._counted = "", _Rate()
        super().__init__(bar_format=form, leave=False, **seconds, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of a line."""
        return {**super().format_dict, "tokens": self._tokens}

    def advance(self, tokens: int = 0) -> None:
        """Count one unit, with its number of tokens; write a line if one is due."""
        rate = self._counted.add(tokens)
        self._tokens = f", {rate}" if rate else ""
        self.update()

    def show(self, **values: str) -> None:
        """Set the values that the next line has, without writing a line now."""
        self.set_postfix(values, refresh=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the progress line; ignore the empty `msg` with which tqdm clears a bar."""
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False


def progress(total: int, what: str, *, unit: str = "it", done: int = 0, hidden: bool = False) -> Bar:
    """Return a progress display on stderr with tokens per second and the remaining time, or one that shows nothing."""
    if sys.stderr.isatty() and not hidden:
        return TerminalBar(total, what, unit, done)
    return ProgressLines(total=total, initial=done, desc=what, unit=unit, disable=hidden)
