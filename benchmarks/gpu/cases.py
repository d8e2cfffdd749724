"""Calls of every public op on small tensors, with outputs and gradients, for checks of determinism, CUDA graphs and memory.

Legend: B sequences, T positions, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels as ops

Case = Callable[[], tuple[Tensor, ...]]


def cases(device: torch.device, backends: Callable[[str], Iterator[str]]) -> dict[str, Case]:
    """Return one call per op and backend that has it; a call returns all outputs and gradients."""
    b, t, v, h = 3, 21, 203, 16
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    tokens = {name: normal(b, t) for name in ("logprobs", "old_logprobs", "advantages", "values", "returns", "ref")}
    mask = (torch.rand(b, t, generator=g) < 0.7).to(device)
    ids = torch.randint(v, (b, t), generator=g).to(device)
    hidden, weight, logits, scores = normal(b, t, h), normal(v, h), normal(b, t, v), normal(b)
    objective = tokens["old_logprobs"] - 5, tokens["advantages"], mask
    groups = torch.zeros(b, dtype=torch.int64, device=device)
    counters = {"sequence": torch.arange(b, device=device), "position": torch.arange(b, device=device)}
    flags = {"entropy_coef": 0.01, "ref_logprobs": tokens["ref"], "kl_coef": 0.1, "dual_clip": 3.0}
    returns = {name: tokens[name] for name in ("values", "returns")}
    found: dict[str, Case] = {}

    def add(op: str, leaves: tuple[Tensor, ...], *rest: Tensor, **options: object) -> None:
        for backend in backends(op):
            found[f"{op}, {backend}"] = partial(_run, getattr(ops, op), leaves, rest, options | {"backend": backend})

    add("gae", (), tokens["logprobs"], tokens["values"], mask)
    rollout = (scores, tokens["logprobs"], tokens["ref"], tokens["values"], mask)
    add("rollout_advantages", (), *rollout, kl_coef=0.1, whiten_rewards=True)
    add("group_advantages", (), scores, groups, kind="grpo")
    add("masked_mean", (), tokens["values"], mask)
    add("masked_whiten", (), tokens["values"], mask)
    sampled = tokens["logprobs"], tokens["ref"]
    add("importance_weights", (), *sampled, mask, level="geometric", action="mask", low=0.5, high=2.0)
    add("off_policy_sequence_mask", (), *sampled, tokens["advantages"], mask, max_kl=0.1)
    add("top_entropy_mask", (), tokens["values"], mask, entropy_quantile=0.2)
    listed = logits.log_softmax(-1).topk(7)
    teacher = listed.indices, listed.values
    add("linear_topk_kl", (hidden, weight), *teacher, mask, direction="reverse", tail="lump", softcap=20.0)
    add("sample_tokens", (), logits[:, 0], seed=3, top_k=40, top_p=0.9, min_p=0.01, **counters)
    pages = normal(2, 7, 4, 2, h)
    table = torch.randperm(7, generator=g)[:6].int().reshape(b, 2).to(device)
    lengths = torch.tensor([8, 1, 5], dtype=torch.int32, device=device)
    add("paged_attention", (), normal(b, 4, h), *pages, table, lengths, window=6, softcap=20.0)
    add("kl_penalty", (tokens["logprobs"],), tokens["ref"], estimator="k3")
    add("token_logprobs", (logits,), ids, mask=mask, entropy=True)
    add("linear_token_logprobs", (hidden, weight), ids, mask=mask, entropy=True)
    add("ppo_loss", (tokens["logprobs"],), *objective, **returns)
    add("logits_ppo_loss", (logits,), ids, *objective, softcap=20.0, **flags, **returns)
    add("linear_ppo_loss", (hidden, weight), ids, *objective, **flags, **returns)
    return found


def _run(call: Callable[..., object], leaves: tuple[Tensor, ...], rest: tuple, options: dict) -> tuple[Tensor, ...]:
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    made = list(_tensors(call(*inputs, *rest, **options)))
    if inputs:
        loss = sum(x.float().sum() for x in made if x.requires_grad)
        made += torch.autograd.grad(loss, inputs)
    return tuple(x.detach() for x in made)


def _tensors(made: object) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, dict):
        yield from made.values()
    elif isinstance(made, tuple):
        for part in made:
            yield from _tensors(part)


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Return whether all tensors have the same bits; NaN equals NaN with the same bits."""
    return all(torch.equal(_bytes(x), _bytes(y)) for x, y in zip(a, b, strict=True))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)
