# pyright: reportUnnecessaryIsInstance=false
# A caller may pass what the annotations do not allow.
"""Checks of public arguments: a ValueError names the argument, the value that was given and what is expected.

They read metadata, so that none waits for a GPU or breaks a compiled graph, and values of eager CPU tensors only.
"""

import math
from typing import TypedDict, overload

import torch
from torch import Tensor

from ..launch_args import Sequences

BOOL = (torch.bool,)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


class Like(TypedDict):
    """What several tensors of a call have in common, for `tensor` and `mask`."""

    like: Tensor
    expected: tuple[int, ...]
    what: str


def tensor(
    name: str,
    x: Tensor,
    *,
    like: Tensor,
    expected: tuple[int, ...],
    what: str,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Check that `x` has the shape `expected` (described by `what`), the device of `like` and one of `dtypes`."""
    if isinstance(x, Tensor) and x.shape == expected and x.dtype in dtypes and x.device == like.device:
        return
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor of shape {what}")
    if x.shape != expected:
        raise ValueError(f"{name}: got shape {shape(x)}, expected {tuple(expected)} = {what}")
    if x.device != like.device:
        raise ValueError(f"{name}: got device {x.device}, expected {like.device}")
    raise ValueError(f"{name}: got dtype {x.dtype}, expected {' or '.join(map(str, dtypes))}")


def mask(name: str, x: Tensor, *, like: Tensor, expected: tuple[int, ...], what: str) -> None:
    tensor(name, x, like=like, expected=expected, what=what, dtypes=BOOL)


def floating(name: str, x: Tensor, *, dims: tuple[int, ...], what: str) -> None:
    """Check that `x` is a floating point tensor with one of `dims` dimensions."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor of shape {what}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: got dtype {x.dtype}, expected a floating point tensor")
    if x.dim() not in dims:
        raise ValueError(f"{name}: got shape {shape(x)}, expected {what}")


def choice(name: str, x: str, options: tuple[str, ...]) -> None:
    if x not in options:
        raise ValueError(f"{name}: got {x!r}, expected one of {options}")


SYMBOLS = (torch.SymInt, torch.SymFloat)


def number(
    name: str,
    x: float | None,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    optional: bool = False,
    integer: bool = False,
) -> None:
    """Check that `x` is a finite number within its range; a compiler's symbol passes."""
    if (x is None and optional) or (type(x) is not float and isinstance(x, SYMBOLS)):
        return
    kinds = int if integer else (int, float)  # numpy's float64 is a float
    if not isinstance(x, kinds) or isinstance(x, bool) or not math.isfinite(x):
        raise ValueError(f"{name}: got {x!r}, expected {'an integer' if integer else 'a finite number'}")
    if above is not None and not x > above:
        raise ValueError(f"{name}: got {x}, expected a number above {above}")
    if least is not None and not x >= least:
        raise ValueError(f"{name}: got {x}, expected at least {least}")
    if most is not None and not x <= most:
        raise ValueError(f"{name}: got {x}, expected at most {most}")


def denominator(name: str, x: float | Tensor | None) -> None:
    """Check a count of tokens or sequences: None, a number, or a tensor of shape (); 0 counts as 1."""
    if not isinstance(x, Tensor):
        number(name, x, least=0, optional=True)
    elif x.dim() != 0 or x.dtype is torch.bool:
        raise ValueError(f"{name}: got {x.dtype} of shape {shape(x)}, expected a number or a tensor of shape ()")
    elif values_visible(x) and not bool((x >= 0) & (x < math.inf)):
        raise ValueError(f"{name}: got {x.item()}, expected a finite number of at least 0")


_SMALLEST = torch.finfo(torch.float32).tiny


def temperature(x: float | Tensor, *, like: Tensor, expected: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        number("temperature", x, above=0, least=_SMALLEST, most=1 / _SMALLEST)
        return
    tensor("temperature", x, like=like, expected=expected, what="one temperature a token")
    if not values_visible(x):
        return
    wrong = ~((x >= _SMALLEST) & (x <= 1 / _SMALLEST))
    if bool(wrong.any()):
        raise ValueError(
            f"temperature: got {x[wrong][0].item()} among its values, expected all above 0, with an inverse in float32"
        )


def ids(x: Tensor, *, like: Tensor, expected: tuple[int, ...], vocabulary: int, where: Tensor | None = None) -> None:
    """Check that ids are in [0, V) where the mask is True."""
    tensor("ids", x, like=like, expected=expected, what="one id a token", dtypes=(torch.int64, torch.int32))
    if not values_visible(x):
        return
    outside = (x < 0) | (x >= vocabulary)
    if where is not None:
        outside = outside & where
    if bool(outside.any()):
        raise ValueError(
            f"ids: got {x[outside][0].item()}, expected ids in [0, {vocabulary}) wherever the mask is True"
        )


def sequences(x: Tensor, cu_seqlens: Tensor | None, *, name: str, needed: bool = True) -> int:
    """Return the number of sequences of a token tensor: [B, T], or [N] with cu_seqlens."""
    if cu_seqlens is None:
        if x.dim() == 2:
            return x.shape[0]
        if x.dim() == 1 and not needed:
            return 1
        raise ValueError(f"{name}: got shape {shape(x)}, expected [B, T], or [N] together with cu_seqlens")
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: got {type(cu_seqlens).__name__}, expected an int32 tensor of shape (B + 1,)")
    if x.dim() != 1:
        raise ValueError(f"{name}: got shape {shape(x)} together with cu_seqlens, expected [N]")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} of shape {shape(cu_seqlens)}, expected int32 of shape (B + 1,)"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens: got device {cu_seqlens.device}, expected {x.device}")
    if values_visible(cu_seqlens):
        Sequences.of(x, cu_seqlens).check(x.numel())
    return cu_seqlens.numel() - 1


def values_visible(x: Tensor) -> bool:
    """Return whether reading values is free: an eager CPU tensor."""
    return x.device.type == "cpu" and is_eager(x)


def is_eager(x: Tensor) -> bool:
    """Return whether `x` has data, which a tensor that a compiler traces does not have."""
    return not torch.compiler.is_compiling() and type(x) in (torch.Tensor, torch.nn.Parameter)


def constant(x: float | Tensor) -> float | Tensor:
    """Return a number, or a tensor that gets no gradient."""
    return x.detach() if isinstance(x, Tensor) else x


@overload
def wide(x: Tensor) -> Tensor: ...


@overload
def wide(x: Tensor | None) -> Tensor | None: ...


def wide(x: Tensor | None) -> Tensor | None:
    """Return a constant of an op: detached, in float32 (float64 stays)."""
    return None if x is None else widen(x.detach())


def widen(x: Tensor) -> Tensor:
    """Return a differentiable input of an op in float32, or in float64 where it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def integers(name: str, x: Tensor, *, like: Tensor, expected: tuple[int, ...], what: str) -> None:
    tensor(name, x, like=like, expected=expected, what=what, dtypes=(torch.int64, torch.int32))


def recursion(gamma: float, lam: float, bootstrap: Tensor | None, holes: str, like: Tensor, b: int) -> None:
    """Check the arguments that `gae` and `rollout_advantages` share, for `b` sequences."""
    number("gamma", gamma, least=0, most=1)
    number("lam", lam, least=0, most=1)
    choice("holes", holes, ("skip", "zero"))
    if bootstrap is not None:
        tensor("bootstrap", bootstrap, like=like, expected=(b,), what="one value a sequence")


def dense(x: Tensor) -> Tensor:
    """Return `x` in float32 and contiguous, as the kernels read it."""
    if x.dtype is torch.float32 and x.is_contiguous():
        return x
    return x.to(torch.float32).contiguous()


@overload
def flat(x: Tensor) -> Tensor: ...


@overload
def flat(x: Tensor | None) -> Tensor | None: ...


def flat(x: Tensor | None) -> Tensor | None:
    """Return a constant as the kernels read it: detached, (N,), float32, contiguous."""
    return None if x is None else x.detach().reshape(-1).float().contiguous()
