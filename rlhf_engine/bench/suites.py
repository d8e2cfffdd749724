"""The suites of `rlhf bench`, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_engine.bench.kernels import kernel_cases
from rlhf_engine.bench.loss import loss_cases
from rlhf_engine.bench.run import Run, Suite, measure
from rlhf_engine.bench.scaling import scaling
from rlhf_engine.bench.updates import memory, rollout, step


def kernels(run: Run) -> Iterator[list[dict[str, Any]]]:
    """Measure the ops that memory traffic bounds."""
    shape, long = run.settings.shapes()
    yield from measure(run, kernel_cases(shape, long, run.settings.dtype, run.settings.device))


def loss(run: Run) -> Iterator[list[dict[str, Any]]]:
    """Measure log-probs and losses from hidden states and logits."""
    yield from measure(run, loss_cases(run.settings.shapes()[0], run.settings.dtype))


SUITES: dict[str, Suite] = {
    "kernels": kernels,
    "loss": loss,
    "rollout": rollout,
    "step": step,
    "memory": memory,
    "scaling": scaling,
}
