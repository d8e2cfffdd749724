"""Builds `rlhf_kernels._C` from csrc/, without torch: the extension takes pointers, so one wheel serves every torch.

Each file of csrc/cpu is compiled once per instruction set, in a namespace of its own, and the best that the machine has is
picked when the module loads. The extension is compiled for OpenMP but linked against no OpenMP runtime: torch's is used.

Each file of csrc/cuda is compiled where nvcc is found, on the PATH or in CUDA_HOME, for the chips below; no GPU is needed, here
or to import the result. Without nvcc the build says so and goes on.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON = [
    "-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized",
    "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip
X86 = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
        "-mbmi2",
        "-mprefer-vector-width=512",
    ],
}
INSTRUCTION_SETS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}

# 10 * major + minor of each chip; the letter unlocks what only this chip has. Later chips run the PTX of the newest.
CUDA_ARCHITECTURES = {80: "80", 90: "90a", 100: "100"}
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-cudart",
    "static",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Xptxas",
    "-warn-spills",
]


def find_nvcc():
    """The compiler of CUDA_HOME, or the one on the PATH; None without either."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def known_architectures(nvcc):
    """Those of CUDA_ARCHITECTURES that this nvcc compiles for; the others are named on stderr."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    known = {chip: code for chip, code in CUDA_ARCHITECTURES.items() if f"sm_{chip}" in listed}
    for chip in sorted(CUDA_ARCHITECTURES.keys() - known.keys()):
        print(f"{nvcc} does not know sm_{chip}: building without it", file=sys.stderr)
    return known


def cuda_targets(architectures):
    """nvcc's options for every chip, and for the PTX that later ones run: without the letter, which one chip alone knows."""
    codes = [f"arch=compute_{code},code=sm_{code}" for code in architectures.values()]
    newest = max(architectures)
    return [f"-gencode={x}" for x in (*codes, f"arch=compute_{newest},code=compute_{newest}")]


def cuda_libraries(nvcc):
    """The folder of the static runtime; nvcc itself knows it, and may be a wrapper that lies elsewhere."""
    said = subprocess.run(
        [nvcc, "-dryrun", "-cudart", "static", "x.cu"], capture_output=True, text=True, check=True
    ).stderr
    for line in said.splitlines():
        if line.startswith("#$ LIBRARIES="):
            folders = [x.strip('"').removeprefix("-L") for x in line.removeprefix("#$ LIBRARIES=").split()]
            for folder in folders:
                if os.path.exists(os.path.join(folder, "libcudart_static.a")):
                    return folder
    raise FileNotFoundError(f"libcudart_static.a: {nvcc} names no folder that has it")


class BuildKernels(build_ext):
    """Compiles csrc/cpu once per instruction set, csrc/cuda once, and links everything without `-fopenmp`."""

    def build_extension(self, ext):
        cpu_sources = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
        if not cpu_sources:
            raise FileNotFoundError("csrc/cpu: no .cpp file, expected the kernels' sources")
        nvcc = find_nvcc()
        architectures = known_architectures(nvcc) if nvcc else {}
        nvcc = (
            nvcc if architectures else None
        )  # one that knows none of the chips is as good as none, and has been named
        jobs = [
            lambda s=s: self._compile_cuda(nvcc, architectures, s)
            for s in sorted(Path("csrc/cuda").glob("*.cu"))
            if nvcc
        ]
        jobs += [lambda s=s, i=i: self._compile(s, *i) for s in cpu_sources for i in INSTRUCTION_SETS.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = [o for objects in pool.map(lambda job: job(), jobs) for o in objects]
        if nvcc:
            self._link_cuda(ext, nvcc, architectures)
        else:
            print("nvcc was not found on the PATH or in CUDA_HOME: building without CUDA kernels", file=sys.stderr)
        super().build_extension(ext)

    def _link_cuda(self, ext, nvcc, architectures):
        ext.sources = [*ext.sources, "csrc/cuda/bindings.cpp"]
        ext.define_macros = [*ext.define_macros, ("RLHF_CUDA", ",".join(map(str, architectures)))]
        ext.library_dirs = [cuda_libraries(nvcc)]
        ext.libraries = ["cudart_static", "pthread", "dl", "rt"]

    def _compile_cuda(self, nvcc, architectures, source):
        target = Path(self.build_temp, "cuda", f"{source.stem}.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        options = [*NVCC_FLAGS, *cuda_targets(architectures), "-Icsrc"]
        subprocess.run([nvcc, *options, "-c", str(source), "-o", str(target)], check=True)
        return [str(target)]

    def _compile(self, source, isa, flags):
        return self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, isa),
            include_dirs=["csrc"],
            macros=[("RLHF_ISA", isa), (f"RLHF_ISA_{isa.upper()}", "1")],
            extra_postargs=COMMON + flags,
        )


SOURCES = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))

extension = Extension(
    "rlhf_kernels._C",
    ["csrc/bindings.cpp"],
    include_dirs=["csrc", pybind11.get_include()],
    define_macros=[("RLHF_X86", "1")] if len(INSTRUCTION_SETS) > 1 else [],
    extra_compile_args=COMMON,
    depends=SOURCES,  # of csrc/cpu and csrc/cuda too, or an edit there would not rebuild
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildKernels})
