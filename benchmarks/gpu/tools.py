"""Where the CUDA toolkit's programs are."""

from __future__ import annotations

import os
from pathlib import Path
from shutil import which


def nvcc() -> str | None:
    """The compiler that setup.py takes: that of CUDA_HOME, or the one on PATH; None without either."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return which("nvcc", path=str(Path(home, "bin"))) if home else which("nvcc")


def tool_path(name: str) -> str | None:
    """On PATH, or beside nvcc, whose folder need not be on PATH as a whole; None: nowhere."""
    compiler = nvcc()
    if name == "nvcc":
        return compiler
    return which(name) or (which(name, path=str(Path(compiler).resolve().parent)) if compiler else None)
