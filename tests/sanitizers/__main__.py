"""Run the CPU tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

Further arguments are those of pytest. Before the tests, each planted error of `control.cpp` must end its process with a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitize" / "lib"
CONTROLS = {
    "read_past_end(x.data_ptr(), 6)": "heap-buffer-overflow",
    "write_before_start(x.data_ptr())": "heap-buffer-overflow",
    "write_past_end_in_parallel(x.data_ptr(), 6)": "heap-buffer-overflow",
    "use_after_free()": "heap-use-after-free",
    "signed_overflow(2)": "signed integer overflow",
    "shift_too_far(64)": "shift exponent 64 is too large",
    "float_to_int(1e20)": "outside the range of representable values",
    "misaligned(x.data_ptr())": "load of misaligned address",
}
"""Call of a planted error, with a tensor x of 6 floats -> a part of its report."""
TESTS = ("tests/kernels", "--ignore-glob=*test_gpu_*", "--ignore-glob=*test_cuda_*", "--ignore-glob=*test_native.py")


def environment() -> dict[str, str]:
    """Return the environment of a process with the sanitizers' libraries, which an ordinary Python must preload."""

    def library(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        return str(Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).resolve())

    options = "halt_on_error=1:print_stacktrace=1"
    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:allocator_may_return_null=1",  # the interpreter leaks by design
        "UBSAN_OPTIONS": options,
        "PYTHONPATH": str(BUILD),
        "OMP_NUM_THREADS": "2",
    }


def missed() -> list[str]:
    """Return the planted errors without a report."""
    found = []
    for call, report in CONTROLS.items():
        code = f"import torch, sanitizer_control as c; x = torch.zeros(6); print('began', flush=True); c.{call}"
        ran = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=BUILD, capture_output=True, text=True)
        caught = ran.returncode != 0 and "began" in ran.stdout and report in ran.stderr
        print(f"{call}: {'caught' if caught else 'MISSED'}", flush=True)
        if not caught:
            found.append(call)
            print(ran.stderr[-2_000:], file=sys.stderr)
    return found


def main() -> int:
    if missed():
        return 1
    # With -P and append, the sanitized package in PYTHONPATH comes before that of the checkout.
    command = [sys.executable, "-P", "-m", "pytest", "--import-mode=append", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = "import rlhf_kernels._C as c; assert 'sanitize' in c.__file__, c.__file__"
    subprocess.run([sys.executable, "-P", "-c", code], env=environment(), cwd=ROOT, check=True)
    return subprocess.run([*command, *TESTS, *sys.argv[1:]], env=environment(), cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
