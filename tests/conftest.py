"""What tests do without a GPU: Triton's kernels run through its interpreter, which is chosen before anything imports Triton."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        from benchmarks.gpu.interpreter import patch_language_once_per_launch

        patch_language_once_per_launch()
# What cuBLAS wants of a process that asks torch for deterministic algorithms, as the kernel tests do.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` have nothing to run on without a device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA device"))
