"""Ops of plain tensors and scalars, known to torch.library by schema.

`torch.library.Library` and not `custom_op`: a call costs 2 us here and 9 us there, and the smallest rollouts take 10 us.
One implementation serves CPU and CUDA tensors: it is told the backend, whose launchers do the work.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("rlhf_kernels", "FRAGMENT")


def define(
    schema: str, *, run: Callable, fake: Callable, save: Callable | None = None, backward: Callable | None = None
):
    """Registers `rlhf_kernels::<schema>` and returns it.

    `save(ctx, inputs, output)` and `backward(ctx, *gradients)` make it differentiable; without them its results never
    require gradients. `backward=refuse` is for the gradients themselves.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"rlhf_kernels::{name}", fake, lib=_LIBRARY)
    if backward is None:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(f"rlhf_kernels::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.rlhf_kernels, name).default


def refuse(ctx, *gradients: Tensor):
    """The derivative of a derivative: said to be missing, not left out of a gradient penalty in silence."""
    raise RuntimeError("rlhf_kernels differentiates once; use backend='reference' for a second derivative")


def schema_of(name: str, function: Callable) -> str:
    """The schema of an implementation whose arguments are annotated; it mutates none of them."""
    return torch.library.infer_schema(function, op_name=name, mutates_args=())


def dense(x: Tensor) -> Tensor:
    """Float32 and contiguous, as the kernels read it."""
    if x.dtype is torch.float32 and x.is_contiguous():
        return x
    return x.to(torch.float32).contiguous()
