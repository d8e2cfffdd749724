"""The error bounds of the kernel tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kernels import reference


def check_error(name: str, got: Tensor, eager: Tensor | Sequence[Tensor], exact: Tensor, scale: float = 0.0) -> None:
    """Assert that the largest error is at most twice that of eager PyTorch in the same dtype, plus 2 eps of the output's scale.

    `exact` is the float64 reference. With several eager results the largest error counts. The output's scale is its largest
    value, or `scale` if that is larger (a sum of terms that cancel has the scale of its terms). A failure prints the index and
    the values.
    """
    eagers = (eager,) if isinstance(eager, Tensor) else eager
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    wide, truth = got.detach().double(), exact.detach().double()
    error = (wide - truth).abs()
    allowed = max((x.detach().double() - truth).abs().max() for x in eagers)
    bound = 2 * allowed + 2 * torch.finfo(got.dtype).eps * truth.abs().max().clamp(min=scale)
    if not bool((error <= bound).all()):
        worst = int(torch.nan_to_num(error, nan=torch.inf).argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)) if error.dim() else ()
        got, exact, *eagers = (x.flatten()[worst].item() for x in (wide, truth, *eagers))
        raise AssertionError(
            f"{name}: error {error.max():.3e} at {place}, bound {bound:.3e}; got {got!r}, exact {exact!r}, eager {eagers}"
        )


def check_rounded_once(name: str, got: Tensor, exact: Tensor) -> None:
    """Assert that `got` differs from `exact` by its float32 rounding (half a unit in the last place) and at most 2 eps more."""
    rounded = exact.float().abs()
    half_unit = (rounded.nextafter(torch.tensor(torch.inf, device=rounded.device)) - rounded).double() / 2
    excess = ((got.double() - exact).abs() - half_unit).max() / torch.finfo(torch.float32).eps
    assert excess <= 2, f"{name}: {excess:.2f} eps beyond the rounding"


TEMPERATURES = {"row": None, "row, scaled": None, "0.3": 0.3, "0.9": 0.9}


def temperature_scene(kind: str) -> tuple[Tensor, Tensor, dict]:
    """Return logits (120, 2027), ids and options for which the rounding of 1 / T would shift a whole log-prob.

    One logit is far above all others. Unlikely tokens, and the mean, are therefore far from the largest logit.
    """
    torch.manual_seed(0)
    logits, ids = 0.5 * torch.randn(120, 2027), torch.randint(0, 2027, (120,))
    logits[:, 0] += 7 * (TEMPERATURES[kind] or 1)
    options = {"temperature": TEMPERATURES[kind] or torch.rand(120) * 0.2 + 0.9}
    return logits, ids, options | ({"logit_scale": 0.7} if "scaled" in kind else {})


def check_temperature_costs_nothing(logprobs: Tensor, logits: Tensor, ids: Tensor, options: dict) -> None:
    """Assert that the log-probs have no error except their rounding."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    check_rounded_once("logprobs", logprobs, reference.token_logprobs(logits.double(), ids, **wide).logprobs)


def check_softcap_slope(token_logprobs, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Check the slope far beyond the cap, where tanh is 1 in float32: it is 4 e^-2x / (1 + e^-2x)^2 and not 0."""
    x = torch.linspace(-7, 7, 141, device=device).repeat(2, 1).to(dtype).requires_grad_()
    taken, wide = torch.tensor([70, 0], device=device), x.detach().double()
    token_logprobs(x, taken, softcap=1.0).logprobs.sum().backward()
    decay = torch.exp(-2 * wide.abs())
    exact = torch.nn.functional.one_hot(taken, 141) - torch.tanh(wide).softmax(-1)
    exact = exact * 4 * decay / (1 + decay).square()
    info = torch.finfo(dtype)
    assert ((x.grad.double() - exact).abs() <= 8 * info.eps * exact.abs() + info.tiny * info.eps).all()
