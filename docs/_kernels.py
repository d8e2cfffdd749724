"""Tables of the arguments of the three losses, read from their signatures and from `rlhf_kernels/_options.py`."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from docs._tables import table
from rlhf_kernels import PPOOptions, linear_ppo_loss, logits_ppo_loss, ppo_loss
from rlhf_kernels._options import DENOMINATORS, FUNCTION, OBJECTIVES, OPTIONS, SCALARS, PPOArguments, Scalar

LOSSES: tuple[Callable[..., Any], ...] = (ppo_loss, logits_ppo_loss, linear_ppo_loss)

ARGUMENTS = {
    "logprobs": "Log-probs of the actions under the policy, differentiable.",
    "logits": "Logits, differentiable. Row t is the state before action t.",
    "hidden": "Hidden states, differentiable: the output of the model's trunk, after its last norm. Row t as for `logits`.",
    "weight": "Weight of the output layer, differentiable; or a `QuantisedWeight`, which has no gradient.",
    "ids": "Actions: the token sampled in each state.",
    "old_logprobs": "Log-probs of the actions under the policy that sampled them.",
    "advantages": "Advantages, as `rollout_advantages`, `gae` or `group_advantages` return them.",
    "mask": "Tokens that count (True). Others may have any value in the other tensors.",
    "bias": "Bias of the output layer, differentiable.",
    "low_rank": "Term of an adapter on the output layer, differentiable; see `LowRank.lora`.",
    "value_weight": "Weight of a value head on `hidden`, differentiable; excludes the option `values`.",
    "value_bias": "Bias of the value head, differentiable.",
    "temperature": "The logits are divided by it. A tensor has one temperature per token.",
    "softcap": "The logits are `softcap * tanh(x / softcap)`, as in Gemma 2.",
    "logit_scale": "The product with the weight is multiplied by it, as in Cohere and Granite.",
    "inplace": "Write the gradient over `logits`.",
    "chunk_tokens": "Rows per chunk; changes memory and time only. None: chosen from the sizes.",
    "compact": "On a GPU: leave rows without a gradient out of the products, and wait for the device once per chunk. "
    "On a CPU such rows are always left out.",
    "group": "Process group over which the rows of the weight are sharded; see [Sharded "
    "vocabulary](../guides/sharded_head.md).",
    "backend": "`auto`, `reference`, `cpu`, `triton` or `cuda`; see [Backends](../guides/backends.md).",
}
"""Meaning of each argument that is not an option of the objective."""

_SHAPE = re.compile(r"^\s*(\w+): [^#\n]*#\s*(.+)$", re.M)


def arguments() -> str:
    """Return a table of the arguments of the losses that are not options of the objective."""
    rows = []
    found = {name: None for loss in LOSSES for name in inspect.signature(loss).parameters if name != "options"}
    if found.keys() != ARGUMENTS.keys():
        raise ValueError(
            f"docs/_kernels.py: describe {sorted(found.keys() ^ ARGUMENTS.keys())} in ARGUMENTS, or remove it"
        )
    for name, meaning in ARGUMENTS.items():
        users = [loss for loss in LOSSES if name in inspect.signature(loss).parameters]
        shape = dict(_SHAPE.findall(inspect.getsource(users[-1]).partition('"""')[0])).get(name, "")
        parameter = inspect.signature(users[-1]).parameters[name]
        values = shape.removesuffix(", differentiable") or _type(parameter.annotation)
        default = "required" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        where = "all" if len(users) == len(LOSSES) else ", ".join(f"`{loss.__name__}`" for loss in users)
        rows.append((f"`{name}`", where, default, values, meaning))
    return table(("argument", "of", "default", "shape or type", "meaning"), rows)


def options() -> str:
    """Return a table of the options of the objective: default, values, meaning, and the objectives that read it."""
    scalars = {row.name: row for row in SCALARS}
    source = inspect.getsource(PPOOptions)
    meanings, shapes = _docstrings(source), dict(_SHAPE.findall(source))
    rows = []
    for name in OPTIONS:
        scalar = scalars.get(name)
        values = _values(scalar) if scalar else _tensor(name, shapes.get(name, ""))
        readers = "" if scalar is None or scalar.objectives == OBJECTIVES else _readers(scalar)
        rows.append((f"`{name}`", f"`{getattr(PPOArguments, name)!r}`", values, meanings[name] + readers))
    return table(("option", "default", "values", "meaning"), rows)


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("torch.", "")


def _values(scalar: Scalar) -> str:
    if scalar.choices:
        return ", ".join(f"`{choice!r}`" for choice in scalar.choices) + (
            ", a function" if scalar.name == "objective" else ""
        )
    words = {"least": "at least", "above": "above"}
    limits = ", ".join(f" {words[kind]} {limit:g}" for kind, limit in (scalar.limits or {}).items())
    return f"number{limits}" + (", or None" if scalar.off is not None else "")


def _tensor(name: str, shape: str) -> str:
    if name in DENOMINATORS:
        return "number or scalar tensor, or None"
    return f"tensor {shape.removesuffix(', differentiable')}, or None"


def _readers(scalar: Scalar) -> str:
    names = (name if name == FUNCTION else f"`{name}`" for name in scalar.objectives)
    return f" Read by {', '.join(names)}."


def _docstrings(source: str) -> dict[str, str]:
    """Return the docstring after each field of a class."""
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(str(doc.value.value).split())
        for field, doc in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }
