"""`python -m benchmarks.compile_check`: compile every GPU kernel for every target without a GPU, and report its resources.

Triton kernels are compiled with the arguments that their launchers pass (see `gpu/specimens.py`), CUDA C++ kernels by nvcc.
The check fails if a kernel spills or has a stack frame, if no specimen launches it, or if a different N, T, B, coefficient
or seed would compile it again. It checks neither the speed of a kernel nor its results.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_kernels.backend import why_no_triton

if TYPE_CHECKING:  # these import Triton; _parse checks first that it is installed
    from benchmarks.gpu.compilation import Findings
    from benchmarks.gpu.resources import Usage

PACKAGE = "rlhf_kernels._triton"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
ON_REQUEST = ("sm_120",)
"""Targets that are compiled only if `--arch` names them: three forms have a stack frame of at most 16 bytes there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and return the exit code: 0, or 1 if there are problems; exit with 2 if it cannot start."""
    options = _parse(arguments)
    compilation = importlib.import_module("benchmarks.gpu.compilation")
    why_no_nvcc = importlib.import_module("benchmarks.gpu.resources").why_no_nvcc
    findings = compilation.check(importlib.import_module(PACKAGE), options.arch)
    print("\n".join(table(findings.usages)))
    for line in findings.notes:
        print(f"note: {line}")
    for line in findings.problems:
        print(f"FAIL: {line}")
    unchecked = f" ({why_no_nvcc()}: CUDA C++ was not checked)" if why_no_nvcc() else ""
    print(
        f"{len(findings.usages)} forms compiled for {', '.join(options.arch)}; {len(findings.problems)} problems{unchecked}"
    )
    if options.json:
        options.json.write_text(json.dumps(_as_json(findings, options.arch), indent=1) + "\n")
    return 1 if findings.problems else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = (*ARCHITECTURES, *ON_REQUEST)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_check", description=__doc__)
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        help=f"some of {', '.join(known)}; all but {', '.join(ON_REQUEST)} by default",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the resources of every form to FILE")
    options = parser.parse_args(arguments)
    options.arch = options.arch or list(ARCHITECTURES)
    unknown = [name for name in options.arch if name not in known]
    if unknown:
        parser.error(f"--arch: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is not a folder")
    if why_no_triton():
        parser.error(why_no_triton())
    if importlib.import_module("triton").knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels would be interpreted instead of compiled; unset it")
    return options


def table(usages: Sequence[Usage]) -> list[str]:
    """Return one line per kernel and target, with the maximum of each figure over the forms of the kernel."""
    groups: dict[tuple[str, str], list[Usage]] = {}
    for usage in usages:
        groups.setdefault((usage.kernel, usage.target), []).append(usage)
    width = max([len(kernel) for kernel, _ in groups], default=6)
    lines = [f"{'kernel':{width}}  target  forms  registers  shared  spills  stack"]
    for (kernel, target), forms in sorted(groups.items()):
        figures = [max(getattr(usage, name) for usage in forms) for name in ("registers", "shared", "spills", "stack")]
        cells = "{:>9}  {:>6}  {:>6}  {:>5}".format(*figures)
        failed = "" if all(usage.clean for usage in forms) else "  FAIL"
        lines.append(f"{kernel:{width}}  {target:6}  {len(forms):>5}  {cells}{failed}")
    return lines


def _as_json(findings: Findings, architectures: Sequence[str]) -> dict:
    return {
        "architectures": list(architectures),
        "triton": importlib.import_module("triton").__version__,
        "python": sys.version.split()[0],
        "forms": [usage.record() for usage in findings.usages],
        "notes": findings.notes,
        "problems": findings.problems,
    }


if __name__ == "__main__":
    raise SystemExit(main())
