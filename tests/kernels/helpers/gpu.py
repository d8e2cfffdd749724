"""The device for the tests of the GPU backends: the GPU if there is one, else the CPU with Triton's interpreter."""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Backends of the ops that have a Triton and a CUDA C++ kernel."""


def to_device(x):
    """Return `x` with tensors moved to the device, also inside dicts, lists and tuples; other values are unchanged."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, dict):
        return {k: to_device(v) for k, v in x.items()}
    return type(x)(map(to_device, x)) if isinstance(x, (list, tuple)) else x
