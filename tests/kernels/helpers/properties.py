"""Strategies of the property tests: shapes, layouts in memory, masks, ranges of values; and the comparison with float64.

Tensors are drawn from a seed, so that an example is small and shrinks in its shape and its options, not in its numbers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "0"))
"""Random examples per property; 0 is the fixed, short set of `make test`."""

settings.register_profile(
    "kernels",
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # fixtures have no state of an example
)
PROFILE = settings.get_profile("kernels")

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(0, 9)
"""Sizes of a batch or a sequence; 0 is an empty tensor."""
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["dense", "dense", "transposed", "strided", "offset", "expanded"])
masks = st.sampled_from(["random", "random", "all", "none", "first row", "last column", "empty row"])
ranges = st.sampled_from(["normal", "normal", "zero", "equal", "large", "tiny", "offset", "mixed"])
scales = st.sampled_from([0.37, -1.0, 1e-4, 65_536.0, -3e6])
"""Upstream gradients; the last two are above the range of float16, as loss scales are."""


class Numbers:
    """Seeded random tensors of given shapes, ranges and layouts."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def drawn(self, shape: Sequence[int], kind: str) -> Tensor:
        """Return float32 numbers of one of `ranges`; all are below 30,000, so that float16 holds them."""
        x = self.normal(*shape)
        return {
            "normal": lambda: x,
            "zero": lambda: torch.zeros_like(x),
            "equal": lambda: torch.full_like(x, 1.25),
            "large": lambda: x.clamp(-3, 3) * 9e3,
            "tiny": lambda: x * 1e-6,
            "offset": lambda: x + 2e3,
            "mixed": lambda: x * 10.0 ** torch.randint(-6, 4, x.shape, generator=self.generator),
        }[kind]()

    def mask(self, shape: tuple[int, int], kind: str) -> Tensor:
        mask = torch.rand(shape, generator=self.generator) < 0.6
        if kind in ("all", "none"):
            return torch.full(shape, kind == "all")
        if kind == "first row":
            mask[1:] = False
        elif kind == "last column":
            mask[:, :-1] = False
        elif kind == "empty row":
            mask[shape[0] // 2 : shape[0] // 2 + 1] = False
        return mask


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the values of `x` in a different layout; "expanded" repeats its first row with stride 0."""
    if x.dim() == 0 or layout == "dense":
        return x.clone()
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan if x.is_floating_point() else 0, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":  # the first element is not aligned to a vector
        flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    return x[:1].clone().expand(x.shape)


def check(name: str, got: Tensor, eager: Tensor | Sequence[Tensor], exact: Tensor, scale: float = 0.0) -> None:
    """Assert the error bound of `check_error` where the exact number is in the range of the dtype.

    Beyond the range `got` must be infinite or the largest number, with the same sign. Where the exact result is NaN or
    infinite, `got` must not be finite. Where eager PyTorch overflows, its error does not count.
    """
    eagers = (eager,) if isinstance(eager, Tensor) else eager
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    info = torch.finfo(got.dtype)
    wide, truth = got.detach().double(), exact.detach().double()
    undefined = ~truth.isfinite()
    assert not wide[undefined].isfinite().any(), f"{name}: finite where the exact result is {truth[undefined].tolist()}"
    inside = truth.abs() < info.max * (1 - 2 * info.eps)
    beyond = ~inside & ~undefined
    assert (wide[beyond].abs() >= info.max * (1 - 4 * info.eps)).all(), f"{name}: {wide[beyond]} for {truth[beyond]}"
    assert (wide[beyond].sign() == truth[beyond].sign()).all(), name
    if not inside.any():
        return
    allowed = truth.new_zeros(())
    for one in eagers:
        error = (one.detach().double() - truth)[inside].abs()
        allowed = torch.maximum(allowed, error[error.isfinite()].max()) if error.isfinite().any() else allowed
    error, size = (wide - truth)[inside].abs(), truth[inside].abs().max().clamp(min=scale)
    # A number below the smallest normal one is rounded to a multiple of the smallest of all.
    bound = 2 * allowed + 2 * info.eps * size + 2 * info.tiny * info.eps
    assert bool((error <= bound).all()), f"{name}: error {error.max():.3e}, bound {bound:.3e}; scale {size:.3e}"


def double(x: object) -> object:
    """Return a floating point tensor in float64, and any other value unchanged."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
