"""Builds `rlhf_kernels._C` from csrc/, without torch: the extension takes pointers, so one wheel serves every torch.

Each file of csrc/cpu is compiled once per instruction set, in a namespace of its own, and the best that the machine has is
picked when the module loads. The extension is compiled for OpenMP but linked against no OpenMP runtime: torch's is used.
"""

import os
import platform
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


class BuildPerInstructionSet(build_ext):
    """Compiles csrc/cpu once per instruction set and links everything without `-fopenmp`."""

    def build_extension(self, ext):
        cpu_sources = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
        if not cpu_sources:
            raise FileNotFoundError("csrc/cpu: no .cpp file, expected the kernels' sources")
        jobs = [(s, isa, flags) for s in cpu_sources for isa, flags in INSTRUCTION_SETS.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = [o for objects in pool.map(lambda job: self._compile(*job), jobs) for o in objects]
        super().build_extension(ext)

    def _compile(self, source, isa, flags):
        return self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, isa),
            include_dirs=["csrc"],
            macros=[("RLHF_ISA", isa), (f"RLHF_ISA_{isa.upper()}", "1")],
            extra_postargs=COMMON + flags,
        )


SOURCES = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".cpp", ".h"))

extension = Extension(
    "rlhf_kernels._C",
    ["csrc/bindings.cpp"],
    include_dirs=["csrc", pybind11.get_include()],
    define_macros=[("RLHF_X86", "1")] if len(INSTRUCTION_SETS) > 1 else [],
    extra_compile_args=COMMON,
    depends=SOURCES,  # of csrc/cpu too, or an edit there would not rebuild
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildPerInstructionSet})
