"""Weights and masks of tokens, and distillation from top-k tokens, as cases: our functions against those of verl and TRL."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.agreement import originals
from benchmarks.agreement.case import Batch, Case
from rlhf_kernels import importance_weights, linear_topk_kl, off_policy_sequence_mask, top_entropy_mask

LOGITS = {"b": 8, "t": 64, "v": 8192}
LEVELS = {"token": "token", "seq_sum": "sequence", "seq_mean": "geometric"}
BOUND = 0.02


def verl_cases() -> Iterator[Case]:
    """Yield the cases of verl's rollout correction and of its top-k distillation."""

    def case(function: str, ours: Callable[..., Any], theirs: Callable[..., Any], note: str, **more: Any) -> Case:
        call = lambda f, b: f(b.logprobs, b.rollout_logprobs, b.mask)  # noqa: E731
        return Case("verl", "0.9.1", function, ours, theirs, call, note=note, **more)

    for level in ("token", "sequence"):
        for threshold, rule in ((1.2, {"high": 1.2}), ("0.5_2.0", {"action": "mask", "low": 0.5, "high": 2.0})):
            sides = _weights(level, **rule), _verl_weights(level, threshold)
            # verl divides by zero if it rejects everything, as it does on the other batches.
            batches = ("holes", "lengths", "full", "one", "extreme") if threshold == 1.2 else ("holes", "lengths")
            yield case("compute_rollout_correction_weights", *sides, f"{level}, {threshold}", batches=batches)
    for prefix, level in LEVELS.items():
        for metric in ("k1", "k2", "k3"):
            bounds = {"low": math.log(0.9), "high": math.log(1.1)} if metric == "k1" else {"high": BOUND}
            theirs = _verl_mask(f"{prefix}_{metric}", "0.9_1.1" if metric == "k1" else str(BOUND))
            yield case("compute_rollout_rejection_mask", _mask(level, metric, **bounds), theirs, f"{prefix}_{metric}")
    divergence = _functions("verl", "trainer/distillation/fsdp/losses.py", ("kl_divergence",))["kl_divergence"]

    def eager(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        return divergence(student.log_softmax(-1).gather(-1, ids), teacher)

    yield _distillation("verl", "0.9.1", "compute_forward_kl_topk", eager, "forward", {})


def trl_cases() -> Iterator[Case]:
    """Yield the cases of TRL's masks and of its distillation from a server's top-k tokens."""
    path = "trainer/grpo_trainer.py"
    found = _functions("trl", path, ("get_off_policy_mask", "get_high_entropy_mask"))

    def off_policy(logprobs: Tensor, sampler: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return found["get_off_policy_mask"](advantages[:, :1], logprobs, sampler, mask, BOUND).long() * mask

    def ours(logprobs: Tensor, sampler: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        same = advantages[:, :1].expand_as(logprobs)
        return off_policy_sequence_mask(logprobs, sampler, same, mask.bool(), max_kl=BOUND).mask.long()

    call = lambda f, b: f(b.logprobs, b.rollout_logprobs, b.advantages, b.mask)  # noqa: E731
    yield Case("TRL", "1.12.0", "get_off_policy_mask", ours, off_policy, call)
    alone = SimpleNamespace(pad_across_processes=lambda x, dim, pad_index: x, gather=lambda x: x)
    for share in (0.2, 0.7):
        yield Case(
            "TRL",
            "1.12.0",
            "get_high_entropy_mask",
            lambda entropy, mask, s=share: top_entropy_mask(entropy, mask.bool(), entropy_quantile=s).mask.long(),
            lambda entropy, mask, s=share: found["get_high_entropy_mask"](
                SimpleNamespace(accelerator=alone), entropy, mask, 1 - s
            ).long(),
            lambda f, b: f(b.values.abs(), b.mask),
            note=f"quantile {share}",
        )
    yield from _trl_distillation()


def _trl_distillation() -> Iterator[Case]:
    path = "experimental/server_distillation/server_distillation_trainer.py"
    found = _functions("trl", path, ("_add_tail_bucket", "_jsd_divergence"))
    for direction, beta in (("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3)):

        def eager(student: Tensor, teacher: Tensor, ids: Tensor, beta: float = beta) -> Tensor:
            student = student.log_softmax(-1).gather(-1, ids)
            valid = torch.ones_like(ids, dtype=torch.bool)
            (student, _), (teacher, _) = (found["_add_tail_bucket"](x, valid) for x in (student, teacher))
            return found["_jsd_divergence"](student, teacher, beta).sum(-1)

        more = {"beta": beta} if direction == "jsd" else {}
        yield _distillation("TRL", "1.12.0", "ServerDistillationTrainer", eager, direction, {"tail": "lump"} | more)


def _distillation(
    peer: str, release: str, function: str, eager: Callable[..., Tensor], direction: str, options: dict
) -> Case:
    """Return the comparison of the mean over unmasked tokens, with the gradient of the student's logits."""

    def ours(logits: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        head = torch.eye(logits.shape[-1], dtype=logits.dtype)
        return linear_topk_kl(logits, head, ids, teacher, mask, direction=direction, **options).loss

    def theirs(logits: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return (eager(logits, teacher, ids) * mask).sum() / mask.sum()

    def call(f: Callable[..., Tensor], b: Batch) -> Tensor:
        student = 0.3 * b.logits  # flat, because 1 minus the mass of the listed tokens has no digits left near 0
        teacher, ids = student.detach().roll(1, 0).log_softmax(-1).topk(5)
        return f(student, teacher, ids, b.mask.bool())

    return Case(peer, release, function, ours, theirs, call, ("logits",), note=direction, sizes=LOGITS)


def _weights(level: str, **rule: Any) -> Callable[..., Tensor]:
    return lambda logprobs, sampler, mask: (
        importance_weights(logprobs, sampler, mask.bool(), **{"level": level, "high": None} | rule).weights
    )


def _mask(level: str, metric: str, **bounds: float) -> Callable[..., Tensor]:
    return lambda logprobs, sampler, mask: importance_weights(
        logprobs, sampler, mask.bool(), level=level, action="mask", metric=metric, **bounds
    ).mask.long()


def _verl_weights(level: str, threshold: str | float) -> Callable[..., Tensor]:
    function = _verl()["compute_rollout_correction_weights"]
    return lambda logprobs, sampler, mask: function(logprobs - sampler, mask, level, threshold)[0]


def _verl_mask(option: str, threshold: str) -> Callable[..., Tensor]:
    function = _verl()["compute_rollout_rejection_mask"]
    return lambda logprobs, sampler, mask: function(logprobs - sampler, mask, option, threshold)[0]


@cache
def _verl() -> dict[str, Any]:
    """Return the functions of verl's rollout correction, whose module requires Ray."""
    path = "trainer/ppo/rollout_corr_helper.py"
    text = (originals.package_folder("verl") / path).read_text()
    names = {
        "SAFETY_BOUND": 20.0,
        "SUPPORTED_ROLLOUT_RS_OPTIONS": {f"{prefix}_{kind}" for prefix in LEVELS for kind in ("k1", "k2", "k3")},
        "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS": {"token_k1", "token_k2", "token_k3"},
        "verl_F": SimpleNamespace(**_functions("verl", "utils/torch_functional.py", ("masked_sum", "masked_mean"))),
    }
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return _functions("verl", path, functions, {"torch": torch, "math": math} | names)


def _functions(package: str, path: str, names: Any, namespace: dict | None = None) -> dict[str, Any]:
    namespace = {"torch": torch, "F": F} if namespace is None else namespace
    return originals.definitions(originals.package_folder(package) / path, names, namespace)
