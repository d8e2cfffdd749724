"""Cases of the suite `kernels`: the ops that are bound by memory traffic.

Legend: B sequences, T positions, N tokens, V vocabulary, C columns of a KV cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.bench.cases import Case, Inputs, generator
from rlhf_engine.bench.shapes import Shape
from rlhf_kernels import (
    decode_attention,
    gae,
    group_advantages,
    importance_weights,
    kl_penalty,
    masked_whiten,
    paged_attention,
    ppo_loss,
    rollout_advantages,
    sample_tokens,
    token_logprobs,
)

MOST_SAMPLED = 64
"""Rows of a sampling step."""
COLUMNS = 512
"""Longest sequence of a decode step."""
PAGE = 64
"""Tokens of a page of keys and values."""


def kernel_cases(shape: Shape, long: Shape, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Return the cases: those on logits and attention for `shape`, those on numbers per token for `long`, a rollout."""
    attention = paged_case if device.type == "cuda" else decode_case
    return [
        gae_case(long),
        rollout_case(long),
        whiten_case(long),
        kl_case(long),
        importance_case(long),
        group_case(long),
        token_loss_case(long),
        logprobs_case(shape, dtype, backward=False),
        logprobs_case(shape, dtype, backward=True),
        sampler_case(shape, dtype, top_p=None),
        sampler_case(shape, dtype, top_p=0.9),
        attention(shape, dtype),
    ]


def rollout_tensors(b: int, t: int, device: torch.device) -> dict[str, Tensor]:
    """Return log-probs, values, scores and a mask of B responses with different lengths of at most T."""
    g = generator(device)
    lengths = torch.randint((t + 1) // 2, t + 1, (b, 1), generator=g, device=device)
    logprobs = -torch.rand(b, t, generator=g, device=device)
    return {
        "scores": torch.randn(b, generator=g, device=device),
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.1 * torch.randn(b, t, generator=g, device=device),
        "values": torch.randn(b, t, generator=g, device=device),
        "mask": torch.arange(t, device=device) < lengths,
    }


def _tokens(shape: Shape):
    def make(tokens: int, device: torch.device) -> Inputs:
        t = min(shape.positions, tokens)
        return dict(rollout_tensors(max(1, tokens // t), t, device))

    return make


def _token_case(name: str, op: str, shape: Shape, per_token: int, call, **more) -> Case:
    text = f"B={shape.sequences} T={shape.positions}"
    n = shape.tokens
    return Case(name, op, text, n, _tokens(shape), call, moved=per_token * n, flops=0, need=40 * n + 96 * n, **more)


def gae_case(shape: Shape) -> Case:
    """Return GAE, which moves 17 bytes per token: two float32 and a mask in, two float32 out."""
    return _token_case(
        "gae", "gae", shape, 17, lambda x, backend: gae(x["logprobs"], x["values"], x["mask"], backend=backend)
    )


def rollout_case(shape: Shape) -> Case:
    """Return the advantages of a rollout with whitening, which moves 37 bytes per token."""
    return _token_case(
        "rollout_advantages",
        "rollout_advantages",
        shape,
        37,
        lambda x, backend: tuple(rollout_advantages(**x, kl_coef=0.05, backend=backend)),
    )


def whiten_case(shape: Shape) -> Case:
    """Return whitening, which reads 5 bytes per token twice and writes 4."""
    return _token_case(
        "masked_whiten",
        "masked_whiten",
        shape,
        14,
        lambda x, backend: (masked_whiten(x["values"], x["mask"], backend=backend),),
    )


def kl_case(shape: Shape) -> Case:
    """Return the k3 estimate of the KL divergence with its gradient: 12 bytes per token forward, 16 backward."""
    return _token_case(
        "kl_penalty k3, forward+backward",
        "kl_penalty",
        shape,
        28,
        lambda x, backend: (kl_penalty(x["logprobs"], x["ref_logprobs"], estimator="k3", backend=backend),),
        leaves=("logprobs",),
    )


def importance_case(shape: Shape) -> Case:
    """Return truncated importance weights, which move 14 bytes per token."""
    return _token_case(
        "importance_weights",
        "importance_weights",
        shape,
        14,
        lambda x, backend: (
            importance_weights(x["logprobs"], x["ref_logprobs"], x["mask"], high=2.0, backend=backend).weights,
        ),
    )


def group_case(shape: Shape) -> Case:
    """Return the advantages of groups of 4 responses, with one score per response."""

    def make(tokens: int, device: torch.device) -> Inputs:
        b = max(4, tokens // 4 * 4)
        scores = torch.randn(b, generator=generator(device), device=device)
        return {"scores": scores, "groups": torch.arange(b, device=device) // 4}

    n = shape.tokens
    return Case(
        "group_advantages rloo",
        "group_advantages",
        f"B={n // 4 * 4} in groups of 4",
        n,
        make,
        lambda x, backend: (group_advantages(x["scores"], x["groups"], kind="rloo", backend=backend),),
        moved=16 * n,
        flops=0,
        need=96 * n,
    )


def token_loss_case(shape: Shape) -> Case:
    """Return the PPO loss on log-probs and values with its gradients: 25 bytes per token forward, 8 backward."""

    def call(x: Inputs, backend: str) -> tuple[Tensor, ...]:
        loss = ppo_loss(
            x["logprobs"],
            x["ref_logprobs"],
            x["values"].detach(),
            x["mask"],
            values=x["values"],
            old_values=x["values"].detach() + 0.3 * x["logprobs"].detach(),
            returns=x["ref_logprobs"],
            backend=backend,
        )
        return (loss.loss,)

    return _token_case("ppo_loss, forward+backward", "ppo_loss", shape, 33, call, leaves=("logprobs", "values"))


def logprobs_case(shape: Shape, dtype: torch.dtype, *, backward: bool) -> Case:
    """Return log-probs of logits: one read of the logits forward, two reads and one write with the gradient."""
    n, v, passes = shape.tokens, shape.vocab, 3 if backward else 1

    def make(tokens: int, device: torch.device) -> Inputs:
        g = generator(device)
        logits = (3 * torch.randn(tokens, v, generator=g, device=device)).to(dtype)
        return {"logits": logits, "ids": torch.randint(v, (tokens,), generator=g, device=device)}

    def call(x: Inputs, backend: str) -> tuple[Tensor, ...]:
        return (token_logprobs(x["logits"], x["ids"], backend=backend).logprobs,)

    return Case(
        f"token_logprobs, forward{'+backward' * backward}",
        "token_logprobs",
        f"N={n} V={v}",
        n,
        make,
        call,
        moved=passes * n * v * dtype.itemsize,
        flops=0,
        need=n * v * (2 * dtype.itemsize + 12),
        leaves=("logits",) if backward else (),
    )


def sampler_case(shape: Shape, dtype: torch.dtype, *, top_p: float | None) -> Case:
    """Return one sampling step of at most `MOST_SAMPLED` rows, which reads the logits once.

    The gate compares the log-prob of the sampled token with that of the same token in float64: two tokens whose probabilities
    differ by less than rounding may be exchanged.
    """
    rows, v = min(shape.tokens, MOST_SAMPLED), shape.vocab

    def make(tokens: int, device: torch.device) -> Inputs:
        logits = (3 * torch.randn(tokens, v, generator=generator(device), device=device)).to(dtype)
        return {"logits": logits, "numbers": torch.arange(tokens, device=device)}

    def call(x: Inputs, backend: str) -> tuple[Tensor, ...]:
        found = sample_tokens(
            x["logits"], top_p=top_p, seed=1, sequence=x["numbers"], position=x["numbers"], backend=backend
        )
        return found.ids, found.logprobs

    def judge(x: Inputs, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        exact = token_logprobs(x["logits"].double(), outputs[0], backend="reference").logprobs
        # Relative, so that the difference has a scale.
        return (outputs[1] / exact.to(outputs[1].dtype),)

    return Case(
        f"sample_tokens, {'no filter' if top_p is None else f'top-p {top_p:g}'}",
        "sample_tokens",
        f"B={rows} V={v}",
        rows,
        make,
        call,
        moved=rows * v * dtype.itemsize,
        flops=0,
        need=rows * v * (dtype.itemsize + 40),
        judge=judge,
    )


def decode_case(shape: Shape, dtype: torch.dtype) -> Case:
    """Return the attention of a decode step over contiguous keys and values, which are read once."""
    c, heads, groups, size = min(COLUMNS, shape.tokens), shape.heads, shape.groups, shape.head_dim
    rows = min(MOST_SAMPLED, shape.tokens)

    def make(tokens: int, device: torch.device) -> Inputs:
        g = generator(device)
        lengths = torch.randint((c + 1) // 2, c + 1, (tokens, 1), generator=g, device=device)
        cached = torch.randn(2, tokens, groups, c, size, generator=g, device=device).to(dtype)
        query = torch.randn(tokens, heads, size, generator=g, device=device).to(dtype)
        mask = torch.arange(c, device=device) < lengths
        return {"query": query, "keys": cached[0], "values": cached[1], "mask": mask}

    return Case(
        "decode_attention",
        "decode_attention",
        f"B={rows} C={c}, {heads} heads, {groups} groups of {size}",
        rows,
        make,
        lambda x, backend: (decode_attention(**x, backend=backend),),
        moved=round(1.5 * rows * c * groups * size * dtype.itemsize),
        flops=0,
        need=rows * c * (2 * groups * size * (dtype.itemsize + 4) + 12 * heads),
    )


def paged_case(shape: Shape, dtype: torch.dtype) -> Case:
    """Return the attention of a decode step over keys and values in pages, which are read once."""
    c, heads, groups, size = max(min(COLUMNS, shape.tokens), PAGE), shape.heads, shape.groups, shape.head_dim
    rows = min(MOST_SAMPLED, shape.tokens)
    places = -(-c // PAGE)

    def make(tokens: int, device: torch.device) -> Inputs:
        g = generator(device)
        lengths = torch.randint((c + 1) // 2, c + 1, (tokens,), generator=g, device=device, dtype=torch.int32)
        table = torch.randperm(tokens * places, generator=g, device=device).int().reshape(tokens, places)
        pages = torch.randn(2, tokens * places, PAGE, groups, size, generator=g, device=device).to(dtype)
        query = torch.randn(tokens, heads, size, generator=g, device=device).to(dtype)
        return {"q": query, "k_pages": pages[0], "v_pages": pages[1], "block_table": table, "lengths": lengths}

    return Case(
        "paged_attention",
        "paged_attention",
        f"B={rows} C={c}, {heads} heads, {groups} groups of {size}",
        rows,
        make,
        lambda x, backend: (paged_attention(**x, backend=backend),),
        moved=round(1.5 * rows * c * groups * size * dtype.itemsize),
        flops=0,
        need=rows * c * (2 * groups * size * (dtype.itemsize + 4) + 12 * heads),
    )
