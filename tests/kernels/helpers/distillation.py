"""Batches for the tests of `linear_topk_kl`, and the comparison of its results with float64."""

import torch

from rlhf_kernels import TopkKL, linear_topk_kl, reference

from .bounds import check_error
from .gpu import to_device
from .heads import differentiate, widen

OPTIONS = {
    "forward": {},
    "forward, lump": {"tail": "lump"},
    "reverse": {"direction": "reverse"},
    "reverse, lump": {"direction": "reverse", "tail": "lump", "num_tokens": 77},
    "jsd": {"direction": "jsd"},
    "jsd, lump": {"direction": "jsd", "tail": "lump", "beta": 0.1},
    "softcap": {"direction": "jsd", "tail": "lump", "softcap": 3.0, "logit_scale": 0.7, "temperature": 0.8},
}


def make(seed: int, dtype=torch.float32, *, b=4, t=40, k=6, vocabulary=203, hidden=24, drift=1.0):
    """Return differentiable tensors, the constants, and optional tensors; some rows of the teacher are short."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g)

    leaves = {
        "hidden": normal(b, t, hidden),
        "weight": normal(vocabulary, hidden, scale=0.3),
        "bias": normal(vocabulary, scale=0.3),
    }
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    logits = torch.nn.functional.linear(*(x.double() for x in leaves.values())) + normal(b, t, vocabulary, scale=drift)
    logprobs, ids = torch.log_softmax(logits, -1).topk(k)
    logprobs = logprobs.float()
    logprobs[:, ::5, k // 2 :] = -torch.inf
    ids[:, ::5, k // 2 :] = -100
    constants = {"teacher_ids": ids, "teacher_logprobs": logprobs, "mask": torch.rand(b, t, generator=g) < 0.7}
    weights = torch.rand(b, t, generator=g) * (torch.rand(b, t, generator=g) < 0.8)
    extra = {"weights": weights, "temperature": torch.rand(b, t, generator=g) + 0.5}
    return leaves, constants, extra


def run(function, leaves, constants, options, dtype, upstream=0.37):
    """Return the result and the gradients of the leaves. Only the leaves have a half `dtype`, other tensors are float32."""
    x = {name: leaf.to(dtype).clone().requires_grad_() for name, leaf in leaves.items()}
    wide = torch.promote_types(dtype, torch.float32)
    constants, options = ({k: widen(v, wide) for k, v in given.items()} for given in (constants, options))
    result = function(**x, **constants, **options)
    return result, differentiate(result.loss, x, upstream)


def in_order(seed: int, leaves, constants, options, dtype):
    """Return the eager result for a permutation of the vocabulary, which changes only the order of its sums."""
    order = torch.randperm(len(leaves["weight"]), generator=torch.Generator().manual_seed(seed))
    moved = leaves | {name: leaves[name][order] for name in ("weight", "bias")}
    ids = constants["teacher_ids"]
    ids = torch.where(ids < 0, ids, order.argsort()[ids.clamp(min=0)])
    result, gradients = run(reference.linear_topk_kl, moved, constants | {"teacher_ids": ids}, options, dtype)
    return result, gradients | {name: gradients[name][order.argsort()] for name in ("weight", "bias")}


def check(leaves, constants, options, dtype, **how):
    """Assert that the loss, the numbers per token and every gradient are within the error bound."""
    given = to_device((leaves, constants, options))
    got, gradients = run(linear_topk_kl, *given[:2], given[2] | how, dtype)
    eager, eager_gradients = run(reference.linear_topk_kl, leaves, constants, options, dtype)
    exact, exact_gradients = run(reference.linear_topk_kl, leaves, constants, options, torch.float64)
    for name in TopkKL._fields:
        check_error(name, getattr(got, name).cpu(), getattr(eager, name), getattr(exact, name), scale=1.0)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        check_error(f"gradient of {name}", gradient.cpu(), eager_gradients[name], exact_gradients[name])
    return got, gradients
