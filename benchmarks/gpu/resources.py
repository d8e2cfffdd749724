"""Resources of compiled kernels: registers, shared memory, spills and stack. No kernel is run."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from benchmarks.gpu.recorder import Form
from benchmarks.gpu.tools import nvcc, tool_path

ROOT = Path(__file__).parents[2]
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVCC_ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100", "sm_120": "sm_120"}
"""Target -> the architecture that csrc/cuda is built for."""


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel, compiled for one target."""

    kernel: str
    specimen: str
    target: str
    registers: int = 0
    shared: int = 0
    """Bytes; CUDA C++ kernels may request more at launch."""
    spills: int = 0
    """Bytes of spill stores and loads; on gfx942, the number of spilled vector registers."""
    stack: int = 0
    """Bytes per thread."""
    note: str = ""
    error: str = ""
    """Message of the compiler if it failed."""

    @property
    def clean(self) -> bool:
        return not (self.spills or self.stack or self.error)

    def record(self) -> dict:
        return asdict(self) | {"clean": self.clean}


def triton_usage(form: Form, specimen: str, target: str) -> Usage:
    """Compile one form of a Triton kernel for one target."""
    source = ASTSource(form.kernel, form.signature, form.constexprs, form.attributes)
    try:
        made = compile(source, target=TARGETS[target], options=form.options)
    except (TritonError, RuntimeError) as error:
        return Usage(form.name, specimen, target, error=f"{type(error).__name__}: {last_line(str(error))}")
    if target.startswith("gfx"):
        return Usage(form.name, specimen, target, **_amd_numbers(made.asm["amdgcn"]))
    registers, stack = _cubin_numbers(made.asm["cubin"])
    shared = made.metadata.shared
    return Usage(form.name, specimen, target, registers, shared, _spilled(made) if stack else 0, stack)


def _cubin_numbers(cubin: bytes) -> tuple[int, int]:
    """Return registers, and bytes of stack and other local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output([_bundled("cuobjdump"), "-res-usage", file.name])
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _spilled(made) -> int:
    """Return the bytes of spills that the assembler reports."""
    architecture = re.search(r"\.target (\w+)", made.asm["ptx"])[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(made.asm["ptx"])
        for assembler in ("ptxas-blackwell", "ptxas"):  # the newer one of the two depends on Triton's release
            flags = ["-v", f"--gpu-name={architecture}", str(source), "-o", f"{folder}/kernel.cubin"]
            if not Path(_bundled(assembler)).exists():
                continue
            done = subprocess.run([_bundled(assembler), *flags], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def _bundled(tool: str) -> str:
    """Return the path of a tool that Triton's wheel contains."""
    return str(Path(find_spec("triton").origin).parent / "backends/nvidia/bin" / tool)


def _amd_numbers(assembly: str) -> dict[str, int | str]:
    """Return the resources in the metadata at the end of the assembly; AMD calls the stack scratch memory."""
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    scalars = found["sgpr_spill_count"]
    return {
        "registers": found["vgpr_count"],
        "shared": found["group_segment_fixed_size"],
        "spills": found["vgpr_spill_count"],
        "stack": found["private_segment_fixed_size"],
        "note": f"{scalars} scalar registers are kept in vector registers, not in memory" if scalars else "",
    }


def why_no_nvcc() -> str:
    """Return why the CUDA C++ sources cannot be compiled here; empty if they can."""
    if not cuda_sources():
        return "csrc/cuda has no CUDA C++ sources"
    return "" if nvcc() else "nvcc is neither on PATH nor in CUDA_HOME; install the CUDA toolkit"


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def cuda_usage(source: Path, target: str) -> list[Usage]:
    """Compile one file of csrc/cuda for one target with the flags of setup.py; return the resources of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc(), "-std=c++17", "-O3", f"-arch={NVCC_ARCHITECTURES[target]}", "--cubin", "-Xptxas", "-v",
            f"-I{ROOT / 'csrc'}", "-o", f"{folder}/out.cubin", str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    name = str(source.relative_to(ROOT))
    if done.returncode:
        return [Usage(name, name, target, error=last_line(done.stderr))]
    return [Usage(kernel, name, target, **numbers) for kernel, numbers in ptxas_numbers(done.stderr).items()]


def ptxas_numbers(text: str) -> dict[str, dict[str, int]]:
    """Return what `ptxas -v` reports, by kernel; the stack of a function that is not inlined is added to its kernel's."""
    found: dict[str, dict[str, int]] = {}
    for part in re.split(r"Compiling entry function ", text)[1:]:
        mangled = re.match(r"'(\S+)'", part)[1]
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        stacks = map(int, re.findall(r"(\d+) bytes stack frame", part))
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[_readable(mangled)] = {
            "registers": int(registers[1]) if registers else 0,
            "shared": int(shared[1]) if shared else 0,
            "spills": spills,
            "stack": sum(stacks),
        }
    return found


def _readable(mangled: str) -> str:
    """Return the C++ name without its parameters."""
    program = tool_path("cu++filt") or which("c++filt")
    if program is None:
        return mangled
    name = re.sub(r"\((anonymous namespace|unnamed)\)::|<unnamed>::", "", _output([program, mangled]).strip())
    return re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name).removeprefix("void ").replace("rlhf::cuda::", "cuda::")


def _output(command: list[str]) -> str:
    """Run a command that must succeed and return both of its output streams."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
