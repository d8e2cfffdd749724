"""The scalars of an objective as the kernels receive them, checked once for each set of values."""

from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch

from .._options import FUNCTION, OBJECTIVES, SCALARS, PPOArguments, Scalar
from ..launch_args import PpoScalars
from . import checks, custom_objective

_values_of = attrgetter(*(row.name for row in SCALARS))


def scalars_of(args: PPOArguments) -> PpoScalars:
    """Return the scalars of the kernels; raise ValueError for a number, a choice or a combination that does not fit."""
    if callable(args.objective) or torch.compiler.is_compiling():
        return _checked_scalars(args)
    values = _values_of(args)
    try:
        return _scalars_of(values, tuple(map(type, values)))  # the types, because True == 1
    except TypeError:  # a value that has no hash, for example a list
        return _checked_scalars(args)


@lru_cache(maxsize=256)
def _scalars_of(values: tuple[Any, ...], types: tuple[type, ...]) -> PpoScalars:
    """Return `scalars_of` for the values of `SCALARS`. Cached, because a run has the same ones in every call."""
    return _checked_scalars(PPOArguments(**dict(zip((row.name for row in SCALARS), values, strict=True))))


def _checked_scalars(args: PPOArguments) -> PpoScalars:
    for row in SCALARS:
        _check_scalar(row, getattr(args, row.name))
    for row in SCALARS:
        _check_effect(row, args)
    return PpoScalars.of(replace(args, objective="policy_gradient") if callable(args.objective) else args)


def _check_scalar(row: Scalar, value: Any) -> None:
    if row.name == "objective" and callable(value):
        return
    if row.choices:
        checks.choice(row.name, value, row.choices)
    else:
        checks.number(row.name, value, optional=row.off is not None, **(row.limits or {}))


def _check_effect(row: Scalar, args: PPOArguments) -> None:
    """Raise ValueError for an option that the objective does not read, or that needs a second option which is not set."""
    objective = FUNCTION if callable(args.objective) else args.objective
    reads = row.objectives == OBJECTIVES or objective in row.objectives
    if reads and not row.needs:
        return
    value = getattr(args, row.name)
    if value in (None, 0, row.default):
        return
    if not reads:
        got = custom_objective.name_of(args.objective) if callable(args.objective) else repr(args.objective)
        *others, last = (name if name == FUNCTION else repr(name) for name in row.objectives)
        readers, verb = (f"{', '.join(others)} and {last}", "read") if others else (last, "reads")
        raise ValueError(f"{row.name}: got {value!r} with objective={got}; only {readers} {verb} it")
    if row.needs and not getattr(args, row.needs):
        raise ValueError(f"{row.name}: got {value!r} with {row.needs}=0, where it has no effect; set {row.needs}")
