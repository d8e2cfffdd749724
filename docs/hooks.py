"""Hooks of mkdocs: copy pictures from benchmarks/results, convert equations to MathML, and remove notes for tests from fences.

Pages link to `../../benchmarks/results/NAME.png` or `.svg`, which also works in a view of the repository; the site
gets a copy of each.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "benchmarks/results/"

_PICTURE = re.compile(r"(!\[[^\]]*\]\()(?:\.\./)+" + PICTURES + r"([^)\s]+\.(?:png|svg))\)")
_EQUATION = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)
_NOT_RUN = re.compile(r'^(```\w+)(.*?) not_run="[^"]*"', re.M)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of the results to the site."""
    for path in sorted((ROOT / PICTURES).rglob("*.[ps][nv]g")):
        source = path.relative_to(ROOT / PICTURES).as_posix()
        files.append(File.generated(config, f"pictures/{source}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point pictures to their copies, convert equations, and drop `not_run` from fences."""
    folder = posixpath.dirname(page.file.src_uri)

    def picture(match: re.Match[str]) -> str:
        return f"{match[1]}{posixpath.relpath('pictures/' + match[2], folder or '.')})"

    def equation(match: re.Match[str]) -> str:
        return f'<div class="equation">{convert(" ".join(match[1].split()), display="block")}</div>'

    return _NOT_RUN.sub(r"\1\2", _EQUATION.sub(equation, _PICTURE.sub(picture, markdown)))
