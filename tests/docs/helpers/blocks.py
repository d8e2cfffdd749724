"""The fenced blocks of a page, and a class that runs them.

A fence begins with its language. `title="NAME"` and `not_run="REASON"` may follow; the title is `output` for `text` blocks and
the name of a file for others.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_engine.cli import main

ROOT = Path(__file__).parents[3]

_FENCE = re.compile(r'^```(\w*)((?: \w+="[^"]*")*)[ ]*\n(.*?)^```[ ]*$', re.M | re.S)
_NOTE = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    """Line of the page on which the text of the block begins."""
    language: str
    notes: dict[str, str]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Return the pages with blocks, as paths from the root: README and all of docs."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found]


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page in order; raise ValueError for a fence that does not begin or end a block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found, seen = [], 0
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(page, line, match[1], dict(_NOTE.findall(match[2])), match[3]))
        seen += 2
    if seen != len(re.findall(r"^```", text, re.M)):
        raise ValueError(f"{page}: the first line of a fence may have only a language and notes; correct the fence")
    return found


def commands(block: Block) -> list[list[str]]:
    """Return the command lines of a shell block, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@dataclass
class Reader:
    """Runs the blocks of a page in the current folder, as a reader of the page would."""

    overrides: list[str] = field(default_factory=list)
    """Settings that make the training commands of the page smaller."""
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    printed: str = ""
    """Output of the last block that ran."""
    whole: bool = False
    """Whether the page must show all of this output; of the command `rlhf` it may show a part."""

    def read(self, block: Block) -> None:
        """Run a block, save it to its file, or compare it with the output of the previous block."""
        if block.language == "text":
            if block.notes.get("title") == "output":
                shown, printed = block.text.strip(), self.printed.strip()
                same = shown == printed if self.whole else shown in printed
                assert same, f"{block}: got\n{printed}\nexpected\n{shown}"
        elif "title" in block.notes:
            Path(block.notes["title"]).write_text(block.text)
        elif block.language == "python":
            self._python(block)
        elif block.language == "bash":
            self._shell(block)
        else:
            assert block.language == "math", f"{block}: got language {block.language!r}"

    def _python(self, block: Block) -> None:
        code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, self.names)
        self.printed, self.whole = out.getvalue(), True

    def _shell(self, block: Block) -> None:
        self.printed, self.whole = "", False
        for words in commands(block):
            if words[0] == "torchrun":
                self.printed += _torchrun(block, words[1:])
                continue
            assert words[0] == "rlhf", f"{block}: got {words[0]!r}; expected rlhf, torchrun, or not_run with a reason"
            trains = words[1] in ("sft", "rm", "ppo", "eval", "iterate", "generate")
            more = [part for override in self.overrides for part in ("--set", override)] if trains else []
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                code = _exit_code([*words[1:], *more])
            self.printed += out.getvalue()
            assert not code, f"{block}: {' '.join(words)}: exit code {code}: {err.getvalue()}"


def _torchrun(block: Block, arguments: list[str]) -> str:
    """Run the command torchrun and return what its processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert not ran.returncode, f"{block}: {ran.stderr}"
    return ran.stdout


def _exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    raise AssertionError("the command line always ends in SystemExit")
