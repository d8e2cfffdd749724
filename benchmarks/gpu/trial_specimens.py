"""Specimens of the kernels in `rlhf_kernels.trials`, which no device has timed; see `specimens`."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.specimens import Call, Size, ones
from rlhf_kernels.backend import Kernels
from rlhf_kernels.trials import trial


def trial_specimens() -> dict[str, tuple[str, Call]]:
    """Return the specimens: name -> (name of the launcher, call)."""
    found: dict[str, tuple[str, Call]] = {}
    for skip in (True, False):
        name = f"gae of tiles, holes {'skipped' if skip else 'zeroed'}"
        found[name] = "gae", tried("gae_split", partial(split_gae, skip))
    return found


def tried(name: str, call: Call) -> Call:
    """Return the call with a trial turned on."""

    def run(kernels: Kernels, size: Size) -> None:
        with trial(name):
            call(kernels, size)

    return run


def split_gae(skip: bool, kernels: Kernels, size: Size) -> None:
    shape = (size.b, 16384 * size.t)
    bootstrap, lam = (None, size.coefficient) if skip else (torch.zeros(size.b), torch.ones(size.b))
    tokens = torch.zeros(shape), torch.zeros(shape), ones(*shape)
    kernels.gae(*tokens, 1.0, lam, bootstrap, skip, None)
