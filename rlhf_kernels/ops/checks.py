# pyright: reportUnnecessaryIsInstance=false
# A caller may pass types that the annotations do not allow.
"""Checks of public arguments. A ValueError names the argument, its value and what is expected.

The checks read the metadata of tensors. They read values of eager CPU tensors only, so that no check synchronizes with
a GPU or breaks a compiled graph.
"""

import math
from difflib import get_close_matches
from typing import Any, TypedDict, overload

import torch
from torch import Tensor

from ..launch_args import Sequences

BOOL = (torch.bool,)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape(x: Tensor) -> str:
    """Return the shape of `x` as text, such as "(2, 3)"."""
    return f"({', '.join(map(str, x.shape))})"


class Like(TypedDict):
    """Keyword arguments of `tensor` and `mask` that are the same for several tensors of a call."""

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
    """Check that `x` is a bool tensor with the shape `expected`, on the device of `like`."""
    tensor(name, x, like=like, expected=expected, what=what, dtypes=BOOL)


def floating(
    name: str, x: Tensor, *, dims: tuple[int, ...], what: str, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Check that `x` is a floating point tensor, or has one of `dtypes`, with one of `dims` dimensions."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor of shape {what}")
    if x.dtype not in dtypes:
        expected = "a floating point tensor" if dtypes is FLOATS else " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: got dtype {x.dtype}, expected {expected}")
    if x.dim() not in dims:
        raise ValueError(f"{name}: got shape {shape(x)}, expected {what}")


def choice(name: str, x: str, options: tuple[str, ...]) -> None:
    """Check that `x` is one of `options`; the message names the nearest one."""
    if x not in options:
        near = get_close_matches(x, options, 1) if isinstance(x, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: got {x!r}, expected one of {options}{hint}")


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
    """Check that `x` is a finite number within its range. The symbolic numbers of torch.compile are not checked."""
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
    """Check a number of tokens or sequences: None, a number of at least 0, or a tensor of shape ()."""
    if not isinstance(x, Tensor):
        number(name, x, least=0, optional=True)
    elif x.dim() != 0 or x.dtype is torch.bool:
        raise ValueError(f"{name}: got {x.dtype} of shape {shape(x)}, expected a number or a tensor of shape ()")
    elif values_visible(x) and not bool((x >= 0) & (x < math.inf)):
        raise ValueError(f"{name}: got {x.item()}, expected a finite number of at least 0")


_SMALLEST = torch.finfo(torch.float32).tiny


def temperature(x: float | Tensor, *, like: Tensor, expected: tuple[int, ...]) -> None:
    """Check that temperatures and their inverses are positive normal float32 numbers: one number, or one per token."""
    if not isinstance(x, Tensor):
        number("temperature", x, above=0, least=_SMALLEST, most=1 / _SMALLEST)
        return
    tensor("temperature", x, like=like, expected=expected, what="one temperature per token")
    if not values_visible(x):
        return
    wrong = ~((x >= _SMALLEST) & (x <= 1 / _SMALLEST))
    if bool(wrong.any()):
        raise ValueError(
            f"temperature: got {x[wrong][0].item()} among its values, expected positive numbers whose inverse fits in float32"
        )


def ids(x: Tensor, *, like: Tensor, expected: tuple[int, ...], vocabulary: int, where: Tensor | None = None) -> None:
    """Check that `x` has one id per token, and that the ids are in [0, V) where the mask `where` is True."""
    tensor("ids", x, like=like, expected=expected, what="one id per token", dtypes=(torch.int64, torch.int32))
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
    """Return the number of sequences of a token tensor, [B, T] or [N] with cu_seqlens.

    [N] without cu_seqlens is one sequence if `needed` is False, and raises ValueError otherwise.
    """
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
    """Return whether the values of `x` can be read without a synchronization: it is an eager CPU tensor."""
    return x.device.type == "cpu" and is_eager(x)


def is_eager(x: Tensor) -> bool:
    """Return whether `x` has data. A tensor that a compiler traces has none."""
    return not torch.compiler.is_compiling() and type(x) in (torch.Tensor, torch.nn.Parameter)


def first_backward(ctx: Any, name: str) -> None:
    """Raise RuntimeError if backward of the op `name` ran before: the first one scales the stored gradients in place."""
    if getattr(ctx, "ran", False):
        raise RuntimeError(
            f"{name}: backward was called twice for one loss; it scales the stored gradients in place, "
            f"so request all gradients in one call, or call {name} again"
        )
    ctx.ran = True


def constant(x: float | Tensor) -> float | Tensor:
    """Return `x`, detached if it is a tensor."""
    return x.detach() if isinstance(x, Tensor) else x


@overload
def wide(x: Tensor) -> Tensor: ...


@overload
def wide(x: Tensor | None) -> Tensor | None: ...


def wide(x: Tensor | None) -> Tensor | None:
    """Return a constant input of an op: detached and in float32, or in float64 if it was float64."""
    return None if x is None else widen(x.detach())


def widen(x: Tensor) -> Tensor:
    """Return a differentiable input of an op in float32, or in float64 if it was float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def integers(name: str, x: Tensor, *, like: Tensor, expected: tuple[int, ...], what: str) -> None:
    """Check that `x` is an int64 or int32 tensor with the shape `expected`, on the device of `like`."""
    tensor(name, x, like=like, expected=expected, what=what, dtypes=(torch.int64, torch.int32))


def recursion(
    gamma: float,
    lam: float | Tensor,
    value_gamma: float | None,
    value_lam: float | Tensor | None,
    bootstrap: Tensor | None,
    holes: str,
    like: Tensor,
    b: int,
) -> None:
    """Check the arguments that `gae` and `rollout_advantages` share, for `b` sequences."""
    number("gamma", gamma, least=0, most=1)
    number("value_gamma", value_gamma, least=0, most=1, optional=True)
    for name, x in (("lam", lam), ("value_lam", value_lam)):
        if not isinstance(x, Tensor):
            number(name, x, least=0, most=1, optional=name == "value_lam")
            continue
        tensor(name, x, like=like, expected=(b,), what="one value per sequence")
        # `~` instead of the opposite comparison, which NaN would pass.
        if values_visible(x) and bool((outside := ~((x >= 0) & (x <= 1))).any()):
            raise ValueError(f"{name}: got {x[outside][0].item()} for a sequence, expected numbers from 0 to 1")
    choice("holes", holes, ("skip", "zero"))
    if bootstrap is not None:
        tensor("bootstrap", bootstrap, like=like, expected=(b,), what="one value per sequence")


@overload
def wide_lam(lam: float | Tensor) -> float | Tensor: ...


@overload
def wide_lam(lam: float | Tensor | None) -> float | Tensor | None: ...


def wide_lam(lam: float | Tensor | None) -> float | Tensor | None:
    """Return the λ of GAE as its eager definition expects it."""
    return wide(lam) if isinstance(lam, Tensor) else lam


def split_lam(lam: float | Tensor) -> tuple[float, Tensor | None]:
    """Return the λ of GAE as the two arguments of a registered op: a number, and the tensor that replaces it."""
    return (0.0, lam) if isinstance(lam, Tensor) else (lam, None)


def dense(x: Tensor) -> Tensor:
    """Return `x` in float32 and contiguous, as the kernels expect it."""
    if x.dtype is torch.float32 and x.is_contiguous():
        return x
    return x.to(torch.float32).contiguous()


@overload
def flat(x: Tensor) -> Tensor: ...


@overload
def flat(x: Tensor | None) -> Tensor | None: ...


def flat(x: Tensor | None) -> Tensor | None:
    """Return a constant as the kernels expect it: detached, (N,), float32, contiguous."""
    return None if x is None else x.detach().reshape(-1).float().contiguous()
