"""Fixtures of the kernel tests."""

import pytest
import torch

from rlhf_kernels import _native


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialised tensors with NaN, so that a test detects an element that a kernel does not write."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    """Each instruction set that this machine supports."""
    kernels = _native.extension()
    best = kernels.isa()
    try:
        kernels.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    kernels.set_isa(best)
