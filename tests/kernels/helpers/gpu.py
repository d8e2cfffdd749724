"""Where the tests of the GPU backends run: on the device where there is one, else through Triton's interpreter."""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Of the ops that have a kernel in both."""


def to_device(x):
    """Tensors to the device, also inside dicts, lists and tuples; everything else as it is."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, dict):
        return {k: to_device(v) for k, v in x.items()}
    return type(x)(map(to_device, x)) if isinstance(x, (list, tuple)) else x
