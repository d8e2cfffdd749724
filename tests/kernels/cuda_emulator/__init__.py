"""An emulator of the CUDA kernels on the host: csrc/cuda compiled as C++, which replaces the extension in a context."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

from rlhf_kernels import _cuda, _native

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-psabi", "-Wno-clobbered",
    "-Wno-unknown-pragmas", "-Wno-unused-function", "-DRLHF_CUDA_EMULATOR",
    "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",
]  # fmt: skip


def build() -> Path:
    """Return the path of the compiled module; compile it only if a source has changed."""
    read = sorted(
        p for folder in (ROOT / "csrc", HERE) for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"
    )
    contents = b"".join(p.read_bytes() for p in read) + f"{FLAGS}{pybind11.__version__}".encode()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = ROOT / "build/cuda_emulator" / hashlib.sha256(contents).hexdigest()[:16]
    module = folder / f"_cuda_emulated{suffix}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a test run builds, the others wait for it
        if not module.exists():
            compile_into(module)
    return module


def compile_into(module: Path) -> None:
    """Compile the sources and link them as `module`; its folder must exist."""
    folder = module.parent
    cuda = ROOT / "csrc/cuda"
    sources = sorted([*cuda.glob("*.cu"), cuda / "bindings.cpp", HERE / "emulator.cpp"])
    include = [pybind11.get_include(), sysconfig.get_path("include"), ROOT / "csrc", HERE]
    options = [*FLAGS, *(f"-I{x}" for x in include)]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *options, "-x", "c++", "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    whole = module.with_suffix(".part")
    subprocess.run(["g++", "-shared", *objects, "-o", whole], check=True)
    whole.rename(module)


@functools.cache
def load():
    """Return the compiled module, which has the bindings of csrc/cuda; skip the test if there is no g++."""
    if not shutil.which("g++"):
        pytest.skip("the CUDA emulator needs g++")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Replace the extension by the emulator: in the context, the launchers of `rlhf_kernels._cuda` take CPU tensors."""
    module = load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "_C", module)
        patch.setattr(_cuda, "on_stream", lambda x: contextlib.nullcontext(0))
        yield
