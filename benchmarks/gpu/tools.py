"""Paths of the CUDA toolkit's programs."""

from __future__ import annotations

import os
from pathlib import Path
from shutil import which


def nvcc() -> str | None:
    """Return the compiler that setup.py uses: that of CUDA_HOME if set, else the one on PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return which("nvcc", path=str(Path(home, "bin"))) if home else which("nvcc")


def tool_path(name: str) -> str | None:
    """Return the path of a program on PATH or in the folder of nvcc, which need not be on PATH; None if it is in neither."""
    compiler = nvcc()
    if name == "nvcc":
        return compiler
    return which(name) or (which(name, path=str(Path(compiler).resolve().parent)) if compiler else None)
