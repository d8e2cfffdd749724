"""The error bound of every kernel test."""

import torch
from torch import Tensor


def check_error(name: str, got: Tensor, eager: Tensor, exact: Tensor, scale: float = 0.0) -> None:
    """The largest error is at most twice that of eager PyTorch in the same dtype, plus 2 eps of the output's scale.

    `exact` is the float64 reference; the output's scale is its largest value, or `scale` where that is more (a sum of terms
    that cancel has the scale of its terms). A failure says where the values lie and what they are.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    wide, truth = got.detach().double(), exact.detach().double()
    error, allowed = (wide - truth).abs(), (eager.detach().double() - truth).abs().max()
    bound = 2 * allowed + 2 * torch.finfo(got.dtype).eps * truth.abs().max().clamp(min=scale)
    if not bool((error <= bound).all()):
        worst = int(torch.nan_to_num(error, nan=torch.inf).argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)) if error.dim() else ()
        raise AssertionError(
            f"{name}: error {error.flatten()[worst]:.3e} at {place}, bound {bound:.3e}; "
            f"got {wide.flatten()[worst]!r}, exact {truth.flatten()[worst]!r}, eager {eager.flatten()[worst]!r}"
        )
