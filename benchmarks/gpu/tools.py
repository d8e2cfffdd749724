"""Where the CUDA toolkit's programs are."""

from __future__ import annotations

from pathlib import Path
from shutil import which


def tool_path(name: str) -> str | None:
    """On PATH, or beside nvcc, whose folder need not be on PATH as a whole; None: nowhere."""
    compiler = which("nvcc")
    return which(name) or (which(name, path=str(Path(compiler).resolve().parent)) if compiler else None)
