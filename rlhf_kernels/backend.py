"""Which implementation serves a call.

`"auto"` takes the fastest one that can serve the tensor's device and dtype; a backend that is asked for by name serves the
call or raises. `rlhf_kernels.info` prints what `"auto"` chooses for every op, and why.
"""

from typing import NamedTuple

import torch

from . import _native

BACKENDS = ("reference", "cpu")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    backend: str
    reason: str


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """What `"auto"` means for tensors of this device and dtype, and why."""
    if device.type != "cpu":
        return Choice("reference", f"no fused kernel is built for device type {device.type!r}")
    if dtype not in NATIVE_DTYPES:
        return Choice("reference", f"the C++ kernels take float32, bfloat16 and float16, not {dtype}")
    if not _native.AVAILABLE:
        return Choice("reference", _native.why_missing())
    return Choice("cpu", "C++ kernels")


def resolve(backend: str, tensor: torch.Tensor) -> str:
    """The backend that serves `tensor`; ValueError when the one asked for cannot."""
    if backend == "reference":
        return backend
    choice = choose(tensor.device, tensor.dtype)
    if backend == "auto":
        return choice.backend
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected 'auto' or one of {BACKENDS}")
    if choice.backend != backend:
        raise ValueError(f"backend: {backend!r} cannot serve this call: {choice.reason}")
    return backend
