"""Setup for tests without a GPU: Triton's kernels run in its interpreter, which must be chosen before Triton is imported."""

import gc
import logging
import os
import sys
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        from benchmarks.gpu.interpreter import speed_up_interpreter

        speed_up_interpreter()
# cuBLAS requires this setting in a process that uses deterministic algorithms of torch, as the kernel tests do.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


SLOWEST = (
    "test_head_forms", "test_gpu_suite", "test_killed", "test_gpu_linear_ppo_loss", "test_loops", "test_cuda_emulated",
    "test_iterate", "test_stages", "test_gpu_token_logprobs", "test_gpu_rollout_advantages", "test_gpu_sample_tokens",
    "test_phase_peaks", "test_figure", "test_linear_ppo_loss", "test_gae", "test_cuda_emulated_logits", "test_gpu_gae",
    "test_gpu_ppo_loss",
)  # fmt: skip
"""Modules that take many seconds. They run first, so that at the end no worker is busy with one while the others are idle."""


def pytest_collection_modifyitems(items):
    """Put the slowest modules first, and skip tests marked `gpu` where there is no device."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA device"))


def pytest_collection_finish(session):
    """Leave the objects of imports and tests out of garbage collection, which took 7% of the time of a part of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish(session):
    """Undo it, for libraries that look for objects that are left at exit."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_user_code_of_earlier_tests():
    """Remove the folders of user code that a test added to Python's path, and the modules imported from them.

    A process of the command imports the code of one run; the tests have many runs in one process.
    """
    yield
    user_code = sys.modules.get("rlhf_engine.rewards.user_code")
    if user_code is not None:
        user_code.forget()


@pytest.fixture(autouse=True)
def no_levels_of_earlier_tests():
    """Reset the levels of the engine's loggers, which a command sets for the rest of its process."""
    yield
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("rlhf_engine")]:
        logging.getLogger(name).setLevel(logging.NOTSET)
