"""The definition of `linear_topk_kl` in eager PyTorch."""

import math

import torch
from torch import Tensor

from ..token_args import TAIL_FLOOR, TopkKL
from .token_logprobs import linear_logits, transform_logits


def linear_topk_kl(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    teacher_ids: Tensor,  # (..., K)
    teacher_logprobs: Tensor,  # (..., K)
    mask: Tensor,  # (...), bool
    *,
    direction: str = "forward",
    tail: str = "drop",
    beta: float = 0.5,
    weights: Tensor | None = None,  # (...)
    num_tokens: float | Tensor | None = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TopkKL:
    """Return the mean divergence of the softmax of `linear_logits(...)` from the teacher's probabilities."""
    logits = linear_logits(hidden, weight, bias, low_rank, mask)
    if isinstance(temperature, Tensor):
        temperature = torch.where(mask, temperature, 1)
    z = transform_logits(logits, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    used = mask[..., None] & (teacher_logprobs != -torch.inf)
    ids = torch.where(used, teacher_ids, 0)
    student, teacher = (
        torch.where(used, x, 0) for x in (torch.log_softmax(z, -1).gather(-1, ids), teacher_logprobs.to(z.dtype))
    )
    masses = [torch.where(used, x.exp(), 0).sum(-1) for x in (student, teacher)]
    kl = torch.where(used, _term(student, teacher, direction, beta), 0).sum(-1)
    if tail == "lump":
        s, t = (torch.log((1 - mass).clamp(min=TAIL_FLOOR)) for mass in masses)
        kl = kl + torch.where(mask, _term(s, t, direction, beta), 0)
    factor = torch.ones_like(kl) if weights is None else torch.where(mask, weights, 0)
    count = torch.as_tensor(mask.sum() if num_tokens is None else num_tokens, device=kl.device)
    loss = (factor * kl).sum() / torch.where(count > 0, count, 1)
    return TopkKL(loss, kl.detach(), *(mass.detach() for mass in masses))


def _term(s: Tensor, t: Tensor, direction: str, beta: float) -> Tensor:
    """Return the term of a token with the student's log-prob `s` and the teacher's `t`."""
    q, p = s.exp(), t.exp()
    if direction == "forward":
        return torch.where(p == 0, 0, p * (t - s))
    if direction == "reverse":
        return q * (s - t)
    mixture = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    return beta * p * (t - mixture) + (1 - beta) * q * (s - mixture)
