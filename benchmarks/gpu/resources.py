"""What compiled kernels need of a multiprocessor: registers, shared memory, spills, stack; nothing is run."""

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
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVCC_ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100"}
"""What csrc/cuda is built for on each target of the table."""


@dataclass(frozen=True)
class Usage:
    """One kernel, compiled for one target."""

    kernel: str
    specimen: str
    target: str
    registers: int = 0
    shared: int = 0
    """Bytes; CUDA C++ kernels may ask for more when they are launched."""
    spills: int = 0
    """Bytes spilled, stores and loads, or on gfx942 the vector registers spilled."""
    stack: int = 0
    """Bytes a thread."""
    note: str = ""
    error: str = ""
    """What the compiler said when it made nothing."""

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
    """Registers, and bytes of stack and other local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output([_bundled("cuobjdump"), "-res-usage", file.name])
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _spilled(made) -> int:
    """Bytes that the assembler says it spilled."""
    architecture = re.search(r"\.target (\w+)", made.asm["ptx"])[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(made.asm["ptx"])
        for assembler in ("ptxas-blackwell", "ptxas"):  # which of the two is the newer one has changed
            flags = ["-v", f"--gpu-name={architecture}", str(source), "-o", f"{folder}/kernel.cubin"]
            if not Path(_bundled(assembler)).exists():
                continue
            done = subprocess.run([_bundled(assembler), *flags], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def _bundled(tool: str) -> str:
    """A tool that Triton's wheel brings along."""
    return str(Path(find_spec("triton").origin).parent / "backends/nvidia/bin" / tool)


def _amd_numbers(assembly: str) -> dict[str, int | str]:
    """From the metadata at the end of the assembly; scratch memory is AMD's word for the stack."""
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
    """Why the CUDA C++ sources cannot be compiled here; empty when they can."""
    if not cuda_sources():
        return "there are none in csrc/cuda"
    return "" if nvcc() else "nvcc is neither on PATH nor in CUDA_HOME; install the CUDA toolkit"


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def cuda_usage(source: Path, target: str) -> list[Usage]:
    """Compile one file of csrc/cuda for one target, flags as in setup.py; what the assembler says of each kernel."""
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
    """What `ptxas -v` reports, by kernel. Functions that were not inlined have a stack of their own, and no entry."""
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
    """The C++ name without its parameters."""
    program = tool_path("cu++filt") or which("c++filt")
    if program is None:
        return mangled
    name = re.sub(r"\((anonymous namespace|unnamed)\)::|<unnamed>::", "", _output([program, mangled]).strip())
    return re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name).removeprefix("void ").replace("rlhf::cuda::", "cuda::")


def _output(command: list[str]) -> str:
    """Both streams of a command that must succeed."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
