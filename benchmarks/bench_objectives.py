"""Time and memory of `linear_ppo_loss` with every objective against `clip`, and with rejected tokens, forward and backward.

Ratios are near 1 and probabilities near 0, so no objective rejects a token by itself: all compute as many rows as `clip`,
except in the cases where `importance_weights` rejects 4 of 5 tokens, by its mask (no product) or by weights of 0 (one product
of three). A function needs the log-probs of all rows first: a fourth product. Memory is peak RSS above inputs, weight and their
gradients.

N tokens as B sequences of 128, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_linear_ppo_loss import TINY, make_batch
from benchmarks.harness import Check, Session, Worker, alternate_workers, ratio, report
from rlhf_kernels import importance_weights, linear_ppo_loss
from rlhf_kernels.backend import choose

NAME = "objectives"
SHAPE = {"n": 1024, "h": 768, "v": 32_000}
QUICK = {"n": 256, "h": 128, "v": 2048}
OF_A_ROW = ("cispo", "sapo", "ipo", "dppo_tv", "dppo_kl")
OF_A_SEQUENCE = ("gspo_token", "gmpo")
FUNCTION, MASKED, WEIGHTED = "a function", "clip, 4 of 5 tokens masked", "clip, 4 of 5 tokens with weight 0"
MIXED = "clip, cross-entropy and KL tokens"
CASES = ("clip", *OF_A_ROW, *OF_A_SEQUENCE, MIXED, FUNCTION, MASKED, WEIGHTED)


def truncated(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return the loss of each token: a user's objective."""
    weight = (logprobs.detach() - old_logprobs).exp().clamp(max=2.0)
    return -weight * advantages * logprobs


def make_step(case: str, shape: dict[str, int]) -> Callable[[], None]:
    """Allocate the tensors of a case and return one forward and backward pass."""
    hidden, weight, batch = make_batch(**shape, dtype=torch.float32)
    options: dict = {"aggregation": "seq_mean_token_mean"} if case in OF_A_SEQUENCE else {}
    if case == FUNCTION:
        options["objective"] = truncated
    elif case == MIXED:
        options |= {
            "term": torch.arange(batch.mask.numel()).view_as(batch.mask) % 3,
            "ref_logprobs": batch.old_logprobs,
        }
    elif case not in (MASKED, WEIGHTED):
        options["objective"] = case
    else:
        apart = torch.where(torch.arange(batch.mask.numel()).view_as(batch.mask) % 5 == 0, 0.0, 1.0)
        found = importance_weights(
            batch.old_logprobs, batch.old_logprobs - apart, batch.mask, action="mask", low=0.5, high=2.0
        )
        if case == MASKED:
            batch = batch._replace(mask=found.mask)
        else:
            options["weights"] = found.weights

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_ppo_loss(hidden, weight, *batch, **options).loss.backward()

    return step


def worker(session: Session, *, case: str, **shape: int) -> None:
    """Run one case: one forward and backward pass per step of the session."""
    make_step(case, TINY)()
    step = make_step(case, shape)
    session.baseline(expected_bytes=(shape["n"] + shape["v"]) * shape["h"] * torch.float32.itemsize)
    session.ready()
    while session.begin():
        step()
        session.end()


def main(*, quick: bool = False) -> None:
    """Time all objectives in alternation."""
    shape = QUICK if quick else SHAPE
    note = f"backend {choose('linear_ppo_loss', torch.device('cpu'), torch.float32).backend}"
    workers = [
        Worker(
            case,
            "benchmarks.bench_objectives:worker",
            {"case": case, **shape},
            start_limit=300,
            step_limit=60,
            note=note,
        )
        for case in CASES
    ]
    rows = {row.name: row for row in alternate_workers(workers, rounds=1 if quick else 9)}
    clip = rows["clip"]
    bounds = dict.fromkeys((*OF_A_ROW, *OF_A_SEQUENCE, MIXED), 1.02) | {FUNCTION: 1.40, MASKED: 0.50, WEIGHTED: 0.50}
    checks = [Check(f"seconds, {name} / clip", ratio(rows[name], clip), bound) for name, bound in bounds.items()]
    for name in (*OF_A_ROW, *OF_A_SEQUENCE, MIXED, FUNCTION):
        known = clip.extra_mb and not rows[name].error
        checks.append(Check(f"extra MB, {name} / clip", rows[name].extra_mb / clip.extra_mb if known else None, 1.05))
    title = "linear_ppo_loss forward+backward, float32, N={n} H={h} V={v}".format(**shape)
    report(NAME, title, list(rows.values()), checks=checks)


def test_objectives(benchmark) -> None:
    benchmark(make_step("sapo", TINY))
