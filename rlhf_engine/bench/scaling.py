"""The suite `scaling`: how the time of an op or an update grows with one of its sizes, as a fitted exponent.

    seconds = c x^a

The exponent a is the slope of a line through the logarithms. An exponent below 1 means that small sizes do not use the
device well; N, V, T, the batch and the model's weights should approach 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_engine.bench import cases
from rlhf_engine.bench.cases import Case
from rlhf_engine.bench.kernels import gae_case, sampler_case
from rlhf_engine.bench.loss import linear_loss_case
from rlhf_engine.bench.room import available_bytes
from rlhf_engine.bench.run import Run, gated
from rlhf_engine.bench.samples import spread
from rlhf_engine.bench.shapes import SMALL
from rlhf_engine.bench.trainer import make_trainer, make_workload
from rlhf_engine.bench.updates import settings_of
from rlhf_engine.config import RunConfig
from rlhf_engine.planner.report import size

SHARES = (0.25, 0.5, 1.0)
"""Sizes as shares of the effort's."""
WIDTHS = (64, 128, 256)
"""Hidden sizes of the models whose updates are timed."""


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the exponent of a power law through at least two points (x, seconds), and its standard error (0 for two)."""
    x, y = (np.log(np.asarray(values, dtype=np.float64)) for values in zip(*points, strict=True))
    slope, intercept = np.polyfit(x, y, 1)
    free = len(points) - 2
    if free < 1:
        return float(slope), 0.0
    variance = float(((y - slope * x - intercept) ** 2).sum()) / free
    return float(slope), float(np.sqrt(variance / ((x - x.mean()) ** 2).sum()))


def scaling(run: Run) -> Iterator[list[dict[str, Any]]]:
    """Measure growth over N, V, T, sequences of an update, and weights of a model."""
    shape, long = run.settings.shapes()
    dtype = run.settings.dtype

    def part(total: int, share: float) -> int:
        return max(2, round(total * share))

    sweeps: dict[str, tuple[str, list[tuple[float, Case]]]] = {
        "linear_ppo_loss over N": (
            f"H={shape.hidden} V={shape.vocab}",
            [(n, linear_loss_case(replace(shape, tokens=n), dtype, value=False)) for n in _sizes(shape.tokens, part)],
        ),
        "linear_ppo_loss over V": (
            f"N={shape.tokens} H={shape.hidden}",
            [(v, linear_loss_case(replace(shape, vocab=v), dtype, value=False)) for v in _sizes(shape.vocab, part)],
        ),
        "gae over T": (
            f"B={long.sequences}",
            [
                (t, gae_case(replace(long, tokens=long.sequences * t, positions=t)))
                for t in _sizes(long.positions, part)
            ],
        ),
        "sample_tokens over V": (
            f"B={min(shape.tokens, 64)}",
            [(v, sampler_case(replace(shape, vocab=v), dtype, top_p=None)) for v in _sizes(shape.vocab, part)],
        ),
    }
    records: list[dict[str, Any]] = []
    for name, (words, points) in sweeps.items():
        records.append({"name": name, "shape": words})
        _sweep(run, records[-1], [(x, _call(run, case)) for x, case in points])
        yield records
    for name, points in (("PPO update over sequences", _batches(run)), ("PPO update over weights", _models(run))):
        records.append({"name": name, "shape": "hidden 64 to 256" if "weights" in name else "hidden 64"})
        _sweep(run, records[-1], points)
        yield records


def _sizes(total: int, part: Callable[[int, float], int]) -> list[int]:
    return sorted({part(total, share) for share in SHARES})


def _call(run: Run, case: Case) -> Callable[[], Callable[[], object]] | str:
    """Return a function that allocates the case and returns its call, or why it does not fit."""
    free = available_bytes(run.settings.device)
    if case.need > free:
        return f"needs {size(case.need)} of memory, {size(free)} are free"

    def start() -> Callable[[], object]:
        gated(case, run.settings.device, cases.backends(run.settings.device)[case.op])
        return case.step(case.make(case.tokens, run.settings.device), "auto")

    return start


def _sweep(
    run: Run, record: dict[str, Any], points: list[tuple[float, Callable[[], Callable[[], object]] | str]]
) -> None:
    """Add the floor of each point and the exponent to a record."""
    found: list[tuple[float, float]] = []
    samples: list[float] = []
    for x, start in points:
        if isinstance(start, str):
            record["skipped"] = f"at {x:g}: {start}"
            break
        call = start()
        count = run.timer.batch_of(call)
        samples = [run.timer.fastest(call, run.settings.effort.seconds, count) for _ in range(3)]
        found.append((x, min(samples)))
    record["points"] = found
    if len(found) > 1:
        record["exponent"], record["exponent_error"] = fit(found)
        record |= {"samples": samples, "seconds": spread(samples)._asdict()}  # of the largest size


def _update(run: Run, hidden: int, sequences: int) -> tuple[float, Callable[[], Callable[[], object]]]:
    """Return the weights of a model and a function that returns its update."""
    fields = SMALL["llama-7m"] | {"hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": 1024}
    batch = run.settings.effort.batch._replace(prompts=sequences, epochs=1)
    settings = settings_of(run.settings.device.type, str(run.settings.dtype).removeprefix("torch."), batch)
    shape = make_workload(fields, RunConfig.from_dict(settings)).policy
    return shape.layer_matrices + shape.vocab * shape.hidden, lambda: make_trainer(fields, settings).step


def _batches(run: Run) -> list[tuple[float, Any]]:
    most = run.settings.effort.batch.prompts
    return [(n, _update(run, WIDTHS[0], n)[1]) for n in sorted({max(1, most // 4), max(1, most // 2), most})]


def _models(run: Run) -> list[tuple[float, Any]]:
    return [_update(run, hidden, run.settings.effort.batch.prompts) for hidden in WIDTHS]
