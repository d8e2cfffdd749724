"""Build `rlhf_kernels._C` from csrc/ without torch: its functions take pointers, so one wheel serves every torch version.

Each file of csrc/cpu is compiled once per instruction set, each in a separate namespace; the best set that the CPU supports is
chosen when the module is imported. The extension is compiled for OpenMP but not linked to an OpenMP runtime: it uses torch's.

Each file of csrc/cuda is compiled for the chips in CUDA_ARCHITECTURES with the nvcc of CUDA_HOME or the PATH. That takes longer
than the rest of the build, so it happens only if the environment has a CUDA build of torch or an NVIDIA device. RLHF_CUDA=1
compiles them anyway, RLHF_CUDA=0 never. Neither the build nor an import of the result needs a GPU.

RLHF_SANITIZE=1 compiles csrc/cpu and the bindings with AddressSanitizer and UndefinedBehaviorSanitizer, and a second extension
with planted errors, for `make sanitize`. Python must then be started with the sanitizers' libraries preloaded.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON = [
    "-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized",
    "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip
SANITIZE = os.environ.get("RLHF_SANITIZE", "0") == "1"
CHECKS = "-fsanitize=address,undefined,float-cast-overflow"
# Later options win: -O1 compiles in a third of the time, -g names the line of an error, and with the -fwrapv of Python's own
# options an overflow of a signed integer would be defined.
SANITIZER = (
    [CHECKS, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-fno-wrapv", "-O1", "-g", "-Wno-uninitialized"]
    if SANITIZE
    else []
)
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

# 10 * major + minor of each chip -> its name for nvcc; "a" enables instructions that only this chip has. Later chips run the
# PTX of the newest.
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


DEVICE = Path("/dev/nvidiactl")


def why_cuda():
    """Return why the CUDA kernels are built, or None if they are not; ValueError for an unknown value of RLHF_CUDA."""
    asked = os.environ.get("RLHF_CUDA", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"RLHF_CUDA: got {asked!r}, expected 0 or 1")
    if asked:
        return "RLHF_CUDA=1" if asked == "1" else None
    if torch_has_cuda():
        return "torch is a CUDA build"
    return "an NVIDIA device was found" if DEVICE.exists() else None


def torch_has_cuda():
    """Return whether the environment's torch is a CUDA build; False without torch.

    An isolated build cannot import the environment's torch, so this reads the file in which torch records its versions.
    """
    versions = Path(sysconfig.get_path("purelib"), "torch", "version.py")
    return versions.is_file() and bool(
        re.search(r"^cuda[^=]*= ['\"]", versions.read_text(encoding="utf-8"), re.MULTILINE)
    )


def find_nvcc():
    """Return the nvcc of CUDA_HOME, or the one on the PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def known_architectures(nvcc):
    """Return the CUDA_ARCHITECTURES that this nvcc supports; print the others to stderr."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    known = {chip: code for chip, code in CUDA_ARCHITECTURES.items() if f"sm_{chip}" in listed}
    for chip in sorted(CUDA_ARCHITECTURES.keys() - known.keys()):
        print(f"{nvcc} does not support sm_{chip}: building without it", file=sys.stderr)
    return known


def cuda_targets(architectures):
    """Return nvcc's options for every chip, and for the PTX that later chips run, which is without the "a"."""
    codes = [f"arch=compute_{code},code=sm_{code}" for code in architectures.values()]
    newest = max(architectures)
    return [f"-gencode={x}" for x in (*codes, f"arch=compute_{newest},code=compute_{newest}")]


def cuda_libraries(nvcc):
    """Return the folder of the static runtime, from nvcc's dry run: nvcc may be a wrapper in a different folder."""
    output = subprocess.run(
        [nvcc, "-dryrun", "-cudart", "static", "x.cu"], capture_output=True, text=True, check=True
    ).stderr
    for line in output.splitlines():
        if line.startswith("#$ LIBRARIES="):
            folders = [x.strip('"').removeprefix("-L") for x in line.removeprefix("#$ LIBRARIES=").split()]
            for folder in folders:
                if os.path.exists(os.path.join(folder, "libcudart_static.a")):
                    return folder
    raise FileNotFoundError(
        f"libcudart_static.a was not found in the library folders of {nvcc}; install the CUDA toolkit"
    )


class BuildKernels(build_ext):
    """Compile csrc/cpu once per instruction set and csrc/cuda once; link everything without `-fopenmp`."""

    def build_extension(self, ext):
        if ext.name != KERNELS:
            super().build_extension(ext)
            return
        cpu_sources = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
        if not cpu_sources:
            raise FileNotFoundError("csrc/cpu has no .cpp files; build from a complete checkout or sdist")
        nvcc, architectures = self._cuda_compiler()
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
        super().build_extension(ext)

    def _cuda_compiler(self):
        """Return nvcc and its architectures, or (None, {}) for a build without CUDA kernels; print which, and why."""
        why, nvcc = why_cuda(), find_nvcc()
        architectures = known_architectures(nvcc) if why and nvcc else {}
        if architectures:
            print(f"building CUDA kernels with {nvcc}: {why}", file=sys.stderr)
            return nvcc, architectures
        if why is None:
            reason = "no CUDA build of torch and no NVIDIA device; set RLHF_CUDA=1 to build them"
            reason = "RLHF_CUDA=0" if os.environ.get("RLHF_CUDA") else reason
        elif nvcc:
            reason = f"{nvcc} supports none of the chips"
        else:
            reason = "nvcc was not found in CUDA_HOME or on the PATH"
        if why == "RLHF_CUDA=1":
            raise FileNotFoundError(f"RLHF_CUDA=1, but {reason}; install the CUDA toolkit or unset RLHF_CUDA")
        print(f"building without CUDA kernels: {reason}", file=sys.stderr)
        return None, {}

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
            extra_postargs=COMMON + SANITIZER + flags,
        )


KERNELS = "rlhf_kernels._C"
SOURCES = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))

extensions = [
    Extension(
        KERNELS,
        ["csrc/bindings.cpp"],
        include_dirs=["csrc", pybind11.get_include()],
        define_macros=[("RLHF_X86", "1")] if len(INSTRUCTION_SETS) > 1 else [],
        extra_compile_args=COMMON + SANITIZER,
        extra_link_args=SANITIZER,
        depends=SOURCES,  # csrc/cpu and csrc/cuda too, or a change there would not trigger a rebuild
    )
]
if SANITIZE:
    extensions.append(
        Extension(
            "sanitizer_control",
            ["tests/sanitizers/control.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMMON + SANITIZER,
            extra_link_args=SANITIZER,
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
