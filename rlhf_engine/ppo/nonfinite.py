"""Numbers that are not finite: which sequences cause them, in which operation they appear first, and `ppo.on_nonfinite`.

B sequences, T response width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.experience import Experience, Scored
from rlhf_engine.rollout import Rollout

SCORED = ("old_logprobs", "ref_logprobs", "old_values")
"""Tensors of `Scored` per action."""
LOWER_RATE = "try a lower learning rate"
"""Advice about numbers that large weights cause."""


@dataclass
class NonFinite:
    """Numbers that are not finite, found before an optimizer step."""

    what: str
    """What was got and what was expected, as a sentence."""
    sequences: tuple[int, ...]
    """Numbers in the run of the sequences that cause it; empty if only all of the minibatch together do."""
    op: str | None
    """The operation in which they appear first; None if it is the sum over the minibatch."""
    update: int
    """Number of the update, the first being 1."""
    data: Experience | Scored
    """The minibatch, or the scored sequences."""
    changing: Mapping[str, float]
    """Loss options that replace those of the config."""
    advice: str = LOWER_RATE
    """What to do, as a clause."""
    pretraining: bool = False
    """Whether only the gradient of the pretraining sequences of PPO-ptx is not finite."""
    file: Path | None = None
    """File that `rlhf repro` reads; a callback sets it."""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.sequences[:5])) + (", ..." if len(self.sequences) > 5 else "")
        where = f"sample {shown} of the run" if self.sequences else "all samples of the minibatch together"
        replayed = "" if self.file is None else f"; `rlhf repro {self.file}` repeats it"
        if self.pretraining:
            where = "the pretraining sequences of PPO-ptx"
            replayed = "" if self.file is None else f"; {self.file} has the weights"
        op = self.op or "the sum over the minibatch"
        return f"{self.what} ({where}, first in {op}); {self.advice}{replayed}"


def all_finite(*tensors: Tensor) -> bool:
    """Return whether all numbers of scalars are finite, with one host sync."""
    return bool(torch.stack([tensor.detach().float() for tensor in tensors]).isfinite().all())


def bad_sequences(finite: Callable[[Tensor], bool], sequences: Tensor) -> list[int]:  # (B,)
    """Return those of `sequences` for which `finite` is False, by halving; it is False for all of them together.

    The result is empty if every half is finite.
    """
    if len(sequences) == 1:
        return sequences.tolist()
    halves = sequences.tensor_split(2)
    return [bad for half in halves if not finite(half) for bad in bad_sequences(finite, half)]


def numbers_of(rollout: Rollout, rows: list[int]) -> tuple[int, ...]:
    """Return the numbers in the run of rows of a rollout."""
    return tuple(sorted(rows if rollout.numbers is None else rollout.numbers[rows].tolist()))


def bad_scored(scored: Scored) -> tuple[list[int], str, str] | None:
    """Return the rows of a scored rollout with a number that is not finite, the first such tensor's name, and a sentence.

    The result is None if all numbers are finite.
    """
    mask = scored.rollout.mask
    found = {name: ~getattr(scored, name).isfinite() & mask for name in SCORED}
    found["sampling_logprobs"] = ~scored.rollout.sampling_logprobs.isfinite() & mask
    rows = torch.stack([bad.any(1) for bad in found.values()]).any(0).nonzero()[:, 0].tolist()
    if not rows:
        return None
    name, bad = next((name, bad) for name, bad in found.items() if bool(bad.any()))
    row, token = bad.nonzero()[0].tolist()
    source = scored.rollout if name == "sampling_logprobs" else scored
    value = float(getattr(source, name)[row, token])
    return rows, name, f"{name} is {value} at action {token}, expected finite numbers"


# ---- the operation ----


def first_nonfinite(
    model: ActorCritic, data: Mapping[str, Tensor | None], run: Callable[[], Tensor | None]
) -> str | None:
    """Return where a number that is not finite appears first: in the data, a weight, a module's output, the loss or a gradient.

    `run()` runs the forward and backward passes and returns the loss, or None if it has none. Gradients are dropped. The result
    is None if all numbers are finite.
    """
    for name, tensor in (*data.items(), *((f"the weight {name}", weight) for name, weight in model.named_parameters())):
        if tensor is not None and not _finite(tensor):
            return name
    model.zero_grad(set_to_none=True)
    trace = _Trace()
    with trace.watching(model):
        loss = run()
    try:
        if trace.forward is not None:
            return trace.forward
        if loss is not None and not _finite(loss):
            return "the loss (rlhf_kernels.linear_ppo_loss)"
        if trace.backward is not None:
            return trace.backward
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        for name, gradient in gradients.items():
            if not _finite(gradient):
                return f"the gradient of {name}"
        norm = nn.utils.get_total_norm(list(gradients.values()))
        return None if _finite(norm) else "the norm of all gradients, whose squares overflow"
    finally:
        model.zero_grad(set_to_none=True)


class _Trace:
    """The first module whose output is not finite, and the first output whose gradient is not."""

    def __init__(self) -> None:
        self.forward: str | None = None
        self.backward: str | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        named = [(name, module) for name, module in model.named_modules() if name]
        hooks = [module.register_forward_hook(partial(self._output, name)) for name, module in named]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _output(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        what = f"the output of {name} ({type(module).__name__})"
        for tensor in _tensors(output):
            if self.forward is None and not _finite(tensor):
                self.forward = what
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, what))

    def _gradient(self, what: str, gradient: Tensor) -> None:
        if self.backward is None and not _finite(gradient):
            self.backward = f"the gradient of {what}"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


# ---- parts of an update ----


def take_experience(experience: Experience, sequences: Tensor) -> Experience:
    """Return the experience of some sequences."""
    rows: dict[str, Any] = {
        item.name: None if getattr(experience, item.name) is None else getattr(experience, item.name)[sequences]
        for item in fields(experience)
        if item.name != "rollout"
    }
    return Experience(experience.rollout.take(sequences), **rows)


def take_scored(scored: Scored, sequences: Tensor) -> Scored:
    """Return some sequences of a scored rollout."""
    rows = {item.name: getattr(scored, item.name)[sequences] for item in fields(scored) if item.name != "rollout"}
    return Scored(scored.rollout.take(sequences), **rows)


def tensors_of(data: Experience | Scored) -> dict[str, Tensor]:
    """Return the tensors of an experience or a scored rollout by name, without stored states."""
    found = {f"rollout.{item.name}": getattr(data.rollout, item.name) for item in fields(data.rollout)}
    found |= {item.name: getattr(data, item.name) for item in fields(data) if item.name != "rollout"}
    found.pop("rollout.states")
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def data_of(tensors: Mapping[str, Tensor]) -> Experience | Scored:
    """Return the experience or the scored rollout whose tensors `tensors_of` returned."""
    rollout = Rollout(**{name.partition(".")[2]: tensor for name, tensor in tensors.items() if "." in name})
    rows: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    if "scores" in rows:
        return Scored(rollout, **rows)
    rows.setdefault("weights", None)
    return Experience(rollout, **rows)
