"""Cases of the suite `loss`: log-probs and the PPO loss from hidden states or logits, each with its gradients.

Legend: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_engine.bench.cases import Case, Inputs, generator
from rlhf_engine.bench.shapes import Shape
from rlhf_kernels import linear_ppo_loss, linear_token_logprobs, logits_ppo_loss


def loss_cases(shape: Shape, dtype: torch.dtype) -> list[Case]:
    """Return the cases."""
    return [
        linear_logprobs_case(shape, dtype),
        linear_loss_case(shape, dtype, value=False),
        linear_loss_case(shape, dtype, value=True),
        logits_loss_case(shape, dtype),
    ]


def head_tensors(n: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return hidden states (N, H), the weight of a head (V, H), and the value head's weight (H,)."""
    g = generator(device)
    hidden = torch.randn(n, shape.hidden, generator=g, device=device).to(dtype)
    weight = torch.empty(shape.vocab, shape.hidden, dtype=dtype, device=device)
    weight.normal_(std=shape.hidden**-0.5, generator=g)
    value = torch.randn(shape.hidden, generator=g, device=device).to(dtype) * 0.02
    return {"hidden": hidden, "weight": weight, "value_weight": value}


def batch_tensors(n: int, vocab: int, device: torch.device) -> Inputs:
    """Return ids, old log-probs, advantages and a mask, each (N,).

    Old log-probs of 0 are above every new one, so with positive advantages no row is clipped and each has a gradient.
    """
    g = generator(device, 1)
    return {
        "ids": torch.randint(vocab, (n,), generator=g, device=device),
        "old_logprobs": torch.zeros(n, device=device),
        "advantages": torch.rand(n, generator=g, device=device) + 0.1,
        "mask": torch.ones(n, dtype=torch.bool, device=device),
        "old_values": torch.zeros(n, device=device),
        "returns": torch.randn(n, generator=g, device=device),
    }


OBJECTIVE = ("ids", "old_logprobs", "advantages", "mask")


def _objective(x: Inputs) -> list[Any]:
    return [x[name] for name in OBJECTIVE]


def _linear(shape: Shape, dtype: torch.dtype, name: str, op: str, call, *, products: int, **more: Any) -> Case:
    n, h, v, size = shape.tokens, shape.hidden, shape.vocab, dtype.itemsize

    def make(tokens: int, device: torch.device) -> Inputs:
        return head_tensors(tokens, shape, dtype, device) | batch_tensors(tokens, v, device)

    return Case(
        name,
        op,
        f"N={n} H={h} V={v}",
        n,
        make,
        call,
        # Inputs are read once, and gradients written once.
        moved=(n + v) * h * size * (2 if products == 3 else 1),
        flops=2 * products * n * v * h,
        # Eager PyTorch holds logits, their log-softmax and their gradient.
        need=3 * (n + v) * h * max(size, 4) + n * v * (2 * size + 12),
        **more,
    )


def linear_logprobs_case(shape: Shape, dtype: torch.dtype) -> Case:
    """Return log-probs from hidden states, forward: one matrix product."""

    def call(x: Inputs, backend: str) -> tuple[Tensor, ...]:
        return (linear_token_logprobs(x["hidden"], x["weight"], x["ids"], backend=backend).logprobs,)

    return _linear(shape, dtype, "linear_token_logprobs, forward", "linear_token_logprobs", call, products=1)


def linear_loss_case(shape: Shape, dtype: torch.dtype, *, value: bool) -> Case:
    """Return the PPO loss from hidden states with its gradients: three matrix products; `value` adds a value head."""

    def call(x: Inputs, backend: str) -> tuple[Tensor, ...]:
        names = ("value_weight", "old_values", "returns") if value else ()
        rest = {name: x[name] for name in names}
        return (linear_ppo_loss(x["hidden"], x["weight"], *_objective(x), **rest, backend=backend).loss,)

    leaves = ("hidden", "weight", *(("value_weight",) if value else ()))
    name = f"linear_ppo_loss{' with values' * value}, forward+backward"
    return _linear(shape, dtype, name, "linear_ppo_loss", call, products=3, leaves=leaves)


def logits_loss_case(shape: Shape, dtype: torch.dtype) -> Case:
    """Return the PPO loss from logits with its gradient, which reads the logits twice and writes their gradient once."""
    n, v, size = shape.tokens, shape.vocab, dtype.itemsize

    def make(tokens: int, device: torch.device) -> Inputs:
        logits = (3 * torch.randn(tokens, v, generator=generator(device), device=device)).to(dtype)
        return {"logits": logits} | batch_tensors(tokens, v, device)

    return Case(
        "logits_ppo_loss, forward+backward",
        "logits_ppo_loss",
        f"N={n} V={v}",
        n,
        make,
        lambda x, backend: (logits_ppo_loss(x["logits"], *_objective(x), backend=backend).loss,),
        moved=3 * n * v * size,
        flops=0,
        need=n * v * (2 * size + 12),
        leaves=("logits",),
    )
