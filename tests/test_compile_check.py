"""The compile check finds spills, kernels that were not compiled, and arguments that cause recompilation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compile_check
from benchmarks.gpu import resources

ROOT = Path(__file__).parent.parent

KERNELS = """
import torch
import triton
import triton.language as tl


@triton.jit
def helper(x):
    return x * 2


@triton.jit(do_not_specialize=["n"])
def good_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, helper(tl.load(x + i, mask=i < n)), mask=i < n)


@triton.jit(do_not_specialize=["n"])
def spilling_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    block = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(x + i, block / tl.sum(block), mask=i < n)


@triton.jit
def specialised_kernel(x, n):
    tl.store(x, n)


@triton.jit(do_not_specialize=["n"])
def constant_kernel(x, n, COUNT: tl.constexpr):
    tl.store(x, n + COUNT)


@triton.jit
def flagged_kernel(x, ONE: tl.constexpr):
    tl.store(x, ONE)


@triton.jit
def forgotten_kernel(x):
    tl.store(x, helper(1.0))


def good(size):
    good_kernel[(1,)](torch.empty(64), size.n, BLOCK=64)


def spilling(size):
    spilling_kernel[lambda meta: (meta["BLOCK"],)](torch.empty(64), size.n, BLOCK=8192, num_warps=1)


def specialised(size):
    specialised_kernel[(1,)](torch.empty(64), size.n)


def constant(size):
    constant_kernel[(1,)](torch.empty(64), size.n, size.n)


def flagged(size):
    flagged_kernel[(1,)](torch.empty(64), size.n == 1)


def optioned(size):
    good_kernel[(1,)](torch.empty(64), size.n, BLOCK=32, waves_per_eu=2)


def capped(size):
    good_kernel[(1,)](torch.empty(64), size.n, BLOCK=16, maxnreg=64)


def refusing(size):
    assert size.n > 1, "one token is too few"
"""
CALLS = ("good", "spilling", "specialised", "constant", "flagged", "optioned", "capped", "refusing", "absent")
PROGRAM = f"""
import json, tiny
from benchmarks.gpu import compilation
calls = {{n: (n, lambda package, size, n=n: getattr(package, n)(size)) for n in {CALLS}}}
found = compilation.check(tiny, ["sm_90", "gfx942"], calls)
print(json.dumps([[u.record() for u in found.usages], found.problems, found.notes]))
"""


def run_compiled(*arguments: str, path: Path, **extra: str) -> subprocess.CompletedProcess:
    """Run Python in a process that compiles Triton kernels instead of interpreting them and can import the tiny package."""
    package = path / "tiny"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("from .kernels import *\n")
    (package / "kernels.py").write_text(KERNELS)
    surroundings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    surroundings |= {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"} | extra
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=300, check=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Check the tiny package without nvcc; return the resources by kernel and target, the problems, and the notes."""
    done = run_compiled("-c", PROGRAM, path=tmp_path_factory.mktemp("tiny"), PATH="", CUDA_HOME="", CUDA_PATH="")
    assert done.returncode == 0, done.stderr
    usages, problems, notes = json.loads(done.stdout.splitlines()[-1])
    found = {}
    for usage in usages:
        found.setdefault((usage["kernel"], usage["target"]), []).append(usage)
    return found, problems, notes


def about(problems: list[str], *words: str) -> list[str]:
    return [problem for problem in problems if all(word in problem for word in words)]


def test_a_good_kernel_is_clean(tiny):
    usages, problems, _ = tiny
    for target in ("sm_90", "gfx942"):
        usage = usages["kernels.good_kernel", target][0]
        assert usage["clean"] and usage["registers"] > 0, usage
    assert not about(problems, "good_kernel on") and not about(problems, "good_kernel would")


def test_a_spill_is_a_problem(tiny):
    usages, problems, _ = tiny
    (usage,) = usages["kernels.spilling_kernel", "sm_90"]
    assert usage["spills"] > 0 and usage["stack"] > 0 and not usage["clean"], usage
    assert about(problems, "spilling_kernel on sm_90", "spilled", "stack frame")


def test_amd_figures_come_from_the_assembly():
    """Scalar registers that are kept in vector registers are noted; only registers that go to memory are spills."""
    lines = {"group_segment_fixed_size": 64, "private_segment_fixed_size": 16, "sgpr_count": 100, "sgpr_spill_count": 5}
    lines |= {"vgpr_count": 128, "vgpr_spill_count": 3}
    numbers = resources._amd_numbers("".join(f"    .{name}:     {value}\n" for name, value in lines.items()))
    assert (numbers["registers"], numbers["shared"], numbers["spills"], numbers["stack"]) == (128, 64, 3, 16)
    assert numbers["note"].startswith("5 scalar registers")


def test_an_argument_that_causes_recompilation_is_named(tiny):
    _, problems, _ = tiny
    assert about(problems, "specialised_kernel would be compiled again", "n: i32", "constexpr 1")
    assert about(problems, "constant_kernel would be compiled again", "COUNT: constexpr 24 -> constexpr 32")


def test_an_option_of_one_kind_of_device_is_a_problem_on_the_other(tiny):
    usages, problems, _ = tiny
    assert about(problems, "good_kernel cannot be launched on a cuda device", "waves_per_eu")
    assert len(usages["kernels.good_kernel", "sm_90"]) == 2 and len(usages["kernels.good_kernel", "gfx942"]) == 3


def test_an_option_that_launchers_omit_on_amd_is_omitted(tiny):
    assert not about(tiny[1], "maxnreg")


def test_both_values_of_a_launchers_flag_are_compiled(tiny):
    usages, problems, _ = tiny
    assert not about(problems, "flagged_kernel")
    assert len(usages["kernels.flagged_kernel", "sm_90"]) == 2


def test_a_kernel_without_a_specimen_is_named_and_a_helper_is_not(tiny):
    _, problems, _ = tiny
    assert about(problems, "forgotten_kernel is launched by no specimen")
    assert not about(problems, "helper")


def test_without_nvcc_a_note_reports_that_cuda_was_not_checked(tiny):
    *_, notes = tiny
    assert about(notes, "CUDA C++ sources were not checked: "), notes


def test_refusing_and_missing_launchers_are_named(tiny):
    _, problems, _ = tiny
    assert about(problems, "refusing: refused at", "AssertionError: one token is too few")
    assert about(problems, "tiny has no launcher absent")


def test_every_kernel_is_reached_and_none_is_compiled_twice(tmp_path):
    """Records the launchers of rlhf_kernels without compiling them; `python -m benchmarks.compile_check` compiles them."""
    program = (
        "import importlib, json\n"
        "from benchmarks.gpu.compilation import Findings, all_specimens, record\n"
        "found = Findings()\n"
        f"record(importlib.import_module({compile_check.PACKAGE!r}), all_specimens(), found)\n"
        "print(json.dumps([found.problems, [name for _, name in found.forms['cuda'].values()]]))\n"
    )
    done = run_compiled("-c", program, path=tmp_path)
    assert done.returncode == 0, done.stderr
    problems, forms = json.loads(done.stdout.splitlines()[-1])
    assert not problems, "\n".join(problems)
    assert len(forms) > 40
    # The logits of a vocabulary that is sharded over ranks need their own forms.
    assert len({name for name in forms if "backward of a shard" in name}) == 2


def test_problems_give_exit_code_one_and_a_report(tmp_path):
    """The tiny package has none of the launchers."""
    report = tmp_path / "report.json"
    program = "import benchmarks.compile_check as c, sys; c.PACKAGE = 'tiny'; sys.exit(c.main(sys.argv[1:]))"
    done = run_compiled("-c", program, "--arch", "gfx942", "--json", str(report), path=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "FAIL: tiny has no launcher gae" in done.stdout
    written = json.loads(report.read_text())
    assert written["architectures"] == ["gfx942"] and "tiny has no launcher gae" in written["problems"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "sm_12"], "expected some of sm_80"),
        (["--json", "/nowhere/at/all.json"], "is not a folder"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_usage_errors_are_exit_code_two(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        compile_check.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_it_refuses_to_check_interpreted_kernels(tmp_path):
    surroundings = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.compile_check"]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


def test_a_missing_nvcc_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(resources, "cuda_sources", lambda: [Path("gae.cu")])
    assert "nvcc" in resources.why_no_nvcc()


PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    48 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""


def test_ptxas_output_is_read_by_kernel():
    assert resources.ptxas_numbers(PTXAS) == {
        "first": {"registers": 40, "shared": 1024, "spills": 0, "stack": 0},
        "second": {"registers": 255, "shared": 0, "spills": 32, "stack": 48},
    }
