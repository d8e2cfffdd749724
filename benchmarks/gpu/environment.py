"""Facts about the machine (device, driver, clocks, versions, tools), which are only read, and the build of the extension."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch

from benchmarks.gpu.entries import Entry
from benchmarks.gpu.tools import nvcc, tool_path
from benchmarks.harness import machine

ROOT = Path(__file__).parents[2]
QUERY = (
    "name", "driver_version", "vbios_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu", "memory.total", "memory.used", "ecc.mode.current", "mig.mode.current",
    "utilization.gpu",
)  # fmt: skip


def environment(*, dry_run: bool) -> Iterator[Entry]:
    """Record the machine; clocks and power are not set or reset."""
    facts = machine()
    for name, version in facts.pop("versions").items():
        yield Entry(name, version)
    for name, value in facts.items():
        yield Entry(name, str(value))
    yield Entry("triton", _version("triton"))
    yield Entry("CUDA of torch", str(torch.version.cuda))
    for tool in ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi"):
        yield Entry(tool, tool_path(tool) or "not found")
    if dry_run:
        yield Entry("device", skipped="a dry run uses none")
        return
    yield Entry("device", torch.cuda.get_device_name())
    properties = torch.cuda.get_device_properties(0)
    yield Entry("multiprocessors", str(properties.multi_processor_count))
    yield Entry("memory", f"{properties.total_memory / 2**30:.1f} GiB")
    yield from clocks("before")


def clocks(when: str) -> Iterator[Entry]:
    """Record the state of the device that nvidia-smi reports."""
    if not which("nvidia-smi"):
        yield Entry(f"nvidia-smi {when}", skipped="not on PATH")
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        yield Entry(f"nvidia-smi {when}", error=done.stdout.strip() or done.stderr.strip())
        return
    for name, value in zip(QUERY, done.stdout.strip().splitlines()[0].split(", "), strict=True):
        yield Entry(f"{name} {when}", value)


def _version(package: str) -> str:
    spec = find_spec(package)
    return "not installed" if spec is None else __import__(package).__version__


# ---- build ----


def build(out: Path, *, dry_run: bool, seconds: float) -> Iterator[Entry]:
    """Run `setup.py build_ext --inplace`; if pybind11 is not installed, use its headers that torch ships."""
    if nvcc() is None:
        yield Entry("nvcc", error="not found: the extension is built without CUDA C++ kernels")
    headers, where = pybind11_headers(out)
    yield Entry("pybind11", where)
    if find_spec("setuptools") is None or not where:
        missing = "setuptools" if where else "pybind11"
        yield Entry("extension", error=f"{missing} is not installed: no C++ and no CUDA C++ backend")
        return
    if dry_run:
        yield Entry("extension", skipped="a dry run builds nothing and uses an existing extension")
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    paths = [str(headers)] * bool(headers) + [os.environ.get("PYTHONPATH", "")]
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (out / "build.log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=surroundings, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            yield Entry("extension", error=f"the build took more than {seconds:.0f} s; see build.log")
            return
    if done.returncode:
        yield Entry("extension", error=f"the build failed with {done.returncode}; see build.log")
        return
    yield Entry("extension", passed=True, note="built in place")


def pybind11_headers(out: Path) -> tuple[Path | None, str]:
    """Return a folder to prepend to PYTHONPATH if pybind11 is not installed, and the source of its headers; '' if none."""
    if find_spec("pybind11") is not None:
        return None, "installed"
    shipped = Path(torch.__file__).parent / "include"
    if not (shipped / "pybind11" / "pybind11.h").exists():
        return None, ""
    # setup.py uses only the folder of headers that pybind11 returns.
    package = out / "headers" / "pybind11"
    package.mkdir(parents=True, exist_ok=True)
    links = package / "include"
    links.mkdir(exist_ok=True)
    if not (links / "pybind11").exists():
        (links / "pybind11").symlink_to(shipped / "pybind11")
    source = f'''
        """Substitute for pybind11 with the headers that torch ships."""


        def get_include():
            return {str(links)!r}
    '''
    (package / "__init__.py").write_text(textwrap.dedent(source).lstrip())
    return package.parent, "not installed; the headers that torch ships are used"


def extension_facts() -> Iterator[Entry]:
    """Record the extension's architectures from a new process: this one may have looked for it before it was built."""
    question = "n.extension().cuda_architectures() if n.AVAILABLE else n.why_missing()"
    command = [sys.executable, "-c", f"from rlhf_kernels import _native as n; print({question})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    failed = {"error": lines[-1] if lines else "no output"} if done.returncode else {}
    yield Entry("CUDA C++ kernels built for", None if failed else lines[-1], **failed)
