"""`python -m rlhf_kernels.info`: print the build, the backend that `"auto"` selects for each op, and the reason."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from . import _native, ops
from .backend import NATIVE_DTYPES, choose, why_no_triton, why_no_varlen


def openmp_runtimes() -> list[str]:
    """Return the files of the OpenMP runtimes in this process (Linux). More than one would mean two thread pools."""
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps if "/" in line}
    return sorted(f for f in files if any(name in f.rsplit("/", 1)[-1] for name in ("libgomp", "libiomp", "libomp")))


def devices() -> list[torch.device]:
    """Return one device of each available type."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def choices() -> list[tuple[str, str, str, str, str]]:
    """Return rows (op, device, dtypes, backend, reason) of what `backend="auto"` selects."""
    rows = []
    for op in ops.__all__:
        for device in devices():
            fused, wide = choose(op, device, torch.float32), choose(op, device, torch.float64)
            names = ", ".join(str(d).removeprefix("torch.") for d in NATIVE_DTYPES)
            rows.append((op, device.type, names, fused.backend, fused.reason))
            rows.append((op, device.type, "float64", wide.backend, wide.reason))
    return rows


def build() -> list[tuple[str, str]]:
    """Return rows (part, version or state) of the installation."""
    try:
        own = version("rlhf-kernels")
    except PackageNotFoundError:
        own = "not installed (run from a source tree)"
    state = f"loaded, instruction set {_native.extension().isa()}" if _native.AVAILABLE else _native.why_missing()
    rows = [("rlhf-kernels", own), ("python", sys.version.split()[0]), ("torch", torch.__version__)]
    chips = _native.extension().cuda_architectures() if _native.AVAILABLE else []
    nothing = (
        "none: the extension was built without CUDA kernels (RLHF_CUDA=1 builds them)"
        if _native.AVAILABLE
        else "none: the extension does not load"
    )
    gpu = ", ".join(f"sm_{chip}" for chip in chips) or nothing
    rows += [
        ("extension", state),
        ("CUDA C++ for", gpu),
        ("Triton", why_no_triton() or "can be imported"),
        ("varlen of torch", why_no_varlen(devices()[-1], torch.bfloat16) or "used by paged_attention"),
        ("threads", str(torch.get_num_threads())),
    ]
    if sys.platform == "linux":
        rows.append(("OpenMP runtimes", ", ".join(openmp_runtimes()) or "none"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables, or only the first with `--build`."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_kernels.info", description=__doc__)
    parser.add_argument("--build", action="store_true", help="print the versions and the build only")
    only_build = parser.parse_args(arguments).build
    for name, value in build():
        print(f"{name:16} {value}")
    if only_build:
        return
    print()
    rows = [("op", "device", "dtypes", "auto", "because"), *choices()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))


if __name__ == "__main__":
    main()
