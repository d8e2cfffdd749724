"""Loads the compiled extension `rlhf_kernels._C`, after torch.

The extension is linked against no OpenMP runtime: importing torch first puts torch's own into the process, and the
extension's parallel regions run on it. So there is one pool of threads, and `torch.set_num_threads` rules it.
"""

import importlib

import torch  # noqa: F401  before _C, see above

try:
    _C = importlib.import_module("rlhf_kernels._C")
    _error = ""
except ImportError as error:
    _C = None
    _error = str(error)


def available() -> bool:
    """Whether the extension was built and loads here."""
    return _C is not None


def why_missing() -> str:
    """Why `available()` is False."""
    return f"the extension rlhf_kernels._C does not load ({_error}); build it with `pip install .` or `make build`"


def isa() -> str:
    """The instruction set that the CPU kernels picked: "avx512", "avx2" or "baseline"."""
    return _C.isa()


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/math/common.h


def kernels():
    """The extension module; RuntimeError with the way to build it when it is missing."""
    if _C is None:
        raise RuntimeError(why_missing())
    return _C


def address(x: torch.Tensor | None) -> int:
    """Where the elements of a contiguous tensor begin; 0 for None."""
    if x is None:
        return 0
    assert x.is_contiguous(), "the kernels take contiguous tensors"
    return x.data_ptr()
