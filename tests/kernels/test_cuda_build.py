"""Tests of the build of csrc/cuda, with and without nvcc, and of the libraries that the extension needs to load."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from rlhf_kernels import _native, backend

ROOT = Path(__file__).parents[2]


def test_extension_reports_its_architectures():
    built = _native.extension().cuda_architectures()
    assert built in ([], [80, 90, 100])
    assert bool(built) == hasattr(_native.extension(), "cuda_gae")


def test_extension_loads_without_a_driver():
    """It links no library of the driver or the toolkit, so one file works on machines with and without a GPU."""
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    dynamic = subprocess.run(
        ["readelf", "-d", _native.extension().__file__], capture_output=True, text=True, check=True
    )
    needed = [line for line in dynamic.stdout.splitlines() if "NEEDED" in line]
    assert needed and not any("cuda" in line or "nvidia" in line for line in needed), needed


def test_extension_has_code_for_every_chip():
    if not _native.extension().cuda_architectures():
        pytest.skip("built without nvcc")
    code = Path(_native.extension().__file__).read_bytes()
    for chip in (b"sm_80", b"sm_90a", b"sm_100"):
        assert chip in code, chip


@pytest.fixture
def build():
    """Return setup.py as a module, without its last statement, which would start a build."""
    text = (ROOT / "setup.py").read_text().rpartition("\nsetup(")[0]
    spec = importlib.util.spec_from_loader("build", loader=None)
    module = importlib.util.module_from_spec(spec)
    before = os.getcwd()
    os.chdir(ROOT)
    exec(compile(text, "setup.py", "exec"), module.__dict__)
    yield module
    os.chdir(before)


def test_nvcc_is_searched_in_cuda_home_and_on_the_path(build, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_nvcc() is None
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == str(nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert build.find_nvcc() == str(nvcc)


def test_nvcc_targets(build):
    assert build.cuda_targets(build.CUDA_ARCHITECTURES) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_a_chip_that_nvcc_does_not_support_is_skipped_and_reported(build, tmp_path, capsys):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_90\\n'\n")
    nvcc.chmod(0o755)
    assert build.known_architectures(str(nvcc)) == {80: "80", 90: "90a"}
    assert capsys.readouterr().err.splitlines() == [f"{nvcc} does not support sm_100: building without it"]
    assert build.cuda_targets({80: "80", 90: "90a"})[-1] == "-gencode=arch=compute_90,code=compute_90"


def scene(build, monkeypatch, site, asked, torch_version, device, nvcc):
    """Set what decides about CUDA kernels: RLHF_CUDA, the version file of torch in `site`, a device, nvcc."""
    monkeypatch.delenv("RLHF_CUDA", raising=False)
    if asked is not None:
        monkeypatch.setenv("RLHF_CUDA", asked)
    (site / "torch").mkdir()
    if torch_version:
        (site / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{torch_version}\n")
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(site))
    monkeypatch.setattr(build, "DEVICE", Path("/dev/null") if device else site / "absent")
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)


@pytest.fixture
def command(build, monkeypatch):
    """Return a function that runs the build command with fake compilers and returns the extension that it would link."""
    made = []
    monkeypatch.setattr(build.build_ext, "build_extension", lambda self, ext: made.append(ext))
    monkeypatch.setattr(build.BuildKernels, "_compile", lambda self, source, isa, flags: [f"{isa}/{source}"])
    monkeypatch.setattr(build.BuildKernels, "_compile_cuda", lambda self, nvcc, chips, source: [str(source)])
    monkeypatch.setattr(build, "cuda_libraries", lambda nvcc: "/toolkit/lib64")
    monkeypatch.setattr(build, "known_architectures", lambda nvcc: build.CUDA_ARCHITECTURES)
    run = build.BuildKernels(Distribution())
    return lambda: run.build_extension(build.extensions[0]) or made[-1]


NO_CUDA = "no CUDA build of torch and no NVIDIA device; set RLHF_CUDA=1 to build them"


@pytest.mark.parametrize(
    ("asked", "torch_version", "device", "nvcc", "reason"),
    [
        (None, "cuda = '13.0'", False, None, "nvcc was not found in CUDA_HOME or on the PATH"),
        (None, "cuda: Optional[str] = None", False, "nvcc", NO_CUDA),
        (None, "", False, "nvcc", NO_CUDA),
        ("0", "cuda: Optional[str] = '13.0'", True, "nvcc", "RLHF_CUDA=0"),
    ],
)
def test_a_build_without_cuda_kernels_reports_why(
    build, command, monkeypatch, capsys, asked, torch_version, device, nvcc, reason, tmp_path
):
    scene(build, monkeypatch, tmp_path, asked, torch_version, device, nvcc)
    made = command()
    assert capsys.readouterr().err.splitlines() == [f"building without CUDA kernels: {reason}"]
    assert made.sources == ["csrc/bindings.cpp"] and not made.libraries
    assert "RLHF_CUDA" not in dict(made.define_macros)
    assert made.extra_objects and not any(x.endswith(".cu") for x in made.extra_objects)


@pytest.mark.parametrize(
    ("asked", "torch_version", "device", "reason"),
    [
        ("1", "", False, "RLHF_CUDA=1"),
        (None, "cuda: Optional[str] = '13.0'", False, "torch is a CUDA build"),
        (None, "cuda: Optional[str] = None", True, "an NVIDIA device was found"),
    ],
)
def test_a_build_with_nvcc_has_every_kernel(
    build, command, monkeypatch, capsys, asked, torch_version, device, reason, tmp_path
):
    scene(build, monkeypatch, tmp_path, asked, torch_version, device, "nvcc")
    made = command()
    assert capsys.readouterr().err.splitlines() == [f"building CUDA kernels with nvcc: {reason}"]
    assert dict(made.define_macros)["RLHF_CUDA"] == "80,90,100"
    assert {Path(x).stem for x in made.extra_objects if x.endswith(".cu")} == set(backend.CUDA_OPS)
    assert "csrc/cuda/bindings.cpp" in made.sources and made.library_dirs == ["/toolkit/lib64"]


def test_cuda_kernels_that_are_asked_for_are_required(build, command, monkeypatch, tmp_path):
    scene(build, monkeypatch, tmp_path, "1", "", False, None)
    with pytest.raises(
        FileNotFoundError, match=r"RLHF_CUDA=1, but nvcc was not found .*; install the CUDA toolkit or unset"
    ):
        command()
    monkeypatch.setenv("RLHF_CUDA", "yes")
    with pytest.raises(ValueError, match="RLHF_CUDA: got 'yes', expected 0 or 1"):
        command()


def test_an_extension_without_cuda_kernels_is_explained(monkeypatch):
    class Bare:
        cuda_architectures = staticmethod(list)

    monkeypatch.setattr(_native, "_C", Bare)
    backend.why_no_cuda.cache_clear()
    assert "built without CUDA kernels; install the CUDA toolkit" in backend.why_no_cuda("gae", torch.device("cuda"))
    backend.why_no_cuda.cache_clear()
