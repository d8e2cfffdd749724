"""`python -m docs.generate`: write the generated parts of README.md and of the pages; `--check` reports those that are stale.

A generated part is the text between `<!-- begin NAME -->` and `<!-- end -->`. NAME is one of `PARTS`, or `$ COMMAND` for the
output of that `rlhf` command. With `$ COMMAND | from TEXT`, the output starts at the first line that begins with TEXT.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from docs import _architecture, _kernels, _objectives, _plans, _reference, _results, _scaling
from rlhf_engine.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

PARTS: dict[str, Callable[[], str]] = {
    "results at a glance": _results.at_a_glance,
    "results on a CPU": _results.cpu_page,
    "integrations": _results.integrations,
    "peer suites": _results.peer_suites,
    "bounds on an H200": _results.h200_bounds,
    "measured on an H200": _results.h200_measured,
    "machine with an H200": _results.h200_machine,
    "demo seeds": _results.seeds,
    "ptx coefficients": _results.ptx,
    "figure": _results.figure,
    "reliability": _results.reliability,
    "what fits at a glance": _plans.glance,
    "what fits": _plans.settings,
    "scaling": _scaling.scaling,
    "scaling assumptions": _scaling.assumptions,
    "arguments of the losses": _kernels.arguments,
    "options of the objective": _kernels.options,
    "objectives": _objectives.objectives,
    "configuration": _reference.configuration,
    "command line": _reference.command_line,
    "layers": _architecture.layers,
    "one update": _architecture.update,
}

FILES: dict[str, Callable[[], str]] = {"benchmarks/results/scaling/scaling.svg": _scaling.plot}
"""Generated files other than pages, as paths from the root."""

_PART = re.compile(r"(<!-- begin (.+?) -->\n)(.*?)(<!-- end -->)", re.S)


def generated(page: str) -> str:
    """Return the text of a page with its generated parts brought up to date."""
    return _PART.sub(lambda match: f"{match[1]}\n{_part(match[2])}\n{match[4]}", page)


def made_by(file: Callable[[], str]) -> Callable[[str], str]:
    """Return a function of a file's old text that returns its new text."""
    return lambda _: file()


def _part(name: str) -> str:
    if name.startswith("$ rlhf "):
        command, _, start = name.partition(" | from ")
        result = CliRunner().invoke(app, shlex.split(command)[2:])
        if result.exit_code:
            raise ValueError(f"{name}: exit code {result.exit_code}: {result.output}") from result.exception
        lines = result.output.strip().splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith(start))
        return "\n".join(['```text title="output"', *lines[first:], "```", ""])
    return PARTS[name]()


def main() -> int:
    """Write the pages, or report which ones are stale."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is stale")
    check = parser.parse_args().check
    stale = []
    texts = {path: generated for path in PAGES} | {ROOT / name: made_by(file) for name, file in FILES.items()}
    for path, new_text in texts.items():
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        new = new_text(text)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(new, encoding="utf-8")
    print("\n".join(f"{'stale' if check else 'written'}: {name}" for name in stale) or "every page is current")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
