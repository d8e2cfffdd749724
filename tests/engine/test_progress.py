"""Progress on a terminal and in a log."""

import io
import re
import time

import pytest
from rich.console import Console

from rlhf_engine import progress
from rlhf_engine.progress import TerminalBar


def lines_of(shown):
    return [line for line in shown.splitlines() if line]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with progress.progress(40, "ppo", unit="update", done=10) as bar:
        for _ in range(30):
            time.sleep(0.01)
            bar.advance(tokens=100)
            bar.show(score="1.50")
    lines = lines_of(capsys.readouterr().err)
    assert 2 <= len(lines) <= 10, lines
    form = r"ppo: \d+ of 40 updates, [\d,]+ tokens/s, [\d:]+ elapsed, [\d:]+ left, score=1.50"
    assert all(re.fullmatch(form, line) for line in lines[1:]), lines
    counts = [int(line.split()[1]) for line in lines]
    assert counts == sorted(counts) and counts[0] > 10


def test_a_short_stage_prints_no_progress_line(capsys):
    with progress.progress(3, "sft") as bar:
        for _ in range(3):
            bar.advance()
            bar.show(loss="1")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 160])
def test_progress_on_a_terminal_is_one_line_of_its_width(width):
    shown = io.StringIO()
    console = Console(file=shown, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with TerminalBar(256, "ppo", "update", 10, console) as bar:
        time.sleep(0.01)
        bar.advance(tokens=1000)
        bar.show(score="1.50", kl="0.25", validation="0.123456", more="0.123456")
    line = lines_of(re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "\n", shown.getvalue()))[-1]
    assert len(line) <= width
    assert re.match(r"ppo [━╸╺ ]+ 11/256 updates [\d,]+ tokens/s .*score=1.50 ", line), line
    assert ("more=0.123456" in line) == (width == 160)
