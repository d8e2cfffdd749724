"""Cases of `linear_ppo_loss`, its eager and float64 reference, and the error bound for all its results."""

import torch

from rlhf_kernels import reference

from .bounds import check_error
from .heads import differentiate, widen

FLAGS = {
    "plain": (),
    "values": ("returns", "old_values"),
    "everything": ("returns", "old_values", "ref_logprobs", "weights", "temperature"),
}
OPTIONS = {
    "clip": {},
    "clip_higher_dual": {"cliprange_high": 0.4, "dual_clip": 1.3, "log_ratio_clamp": 0.5},
    "entropy_kl": {"entropy_coef": 0.02, "kl_coef": 0.1},
    "kl_penalty": {"objective": "kl_penalty", "old_kl_coef": 0.5, "aggregation": "seq_mean_token_sum"},
    "policy_gradient": {"objective": "policy_gradient", "aggregation": "token_sum"},
    "ratio": {"objective": "ratio", "kl_coef": 0.1, "kl_estimator": "k1", "log_ratio_clamp": 0.3},
    "k2": {"kl_coef": 0.1, "kl_estimator": "k2", "aggregation": "seq_mean_token_mean", "entropy_coef": 0.02},
    "abs": {"kl_coef": 0.1, "kl_estimator": "abs", "num_tokens": 77, "dual_clip": 1.3},
    "sequence": {
        "ratio_level": "sequence",
        "aggregation": "seq_mean_token_mean",
        "entropy_coef": 0.02,
        "kl_coef": 0.05,
    },
    "weighted_kl": {"kl_coef": 0.1, "kl_weighting": "ratio", "log_ratio_clamp": 0.5},
    "cispo": {"objective": "cispo", "cliprange_high": 0.5, "kl_coef": 0.1, "kl_weighting": "ratio"},
    "sapo": {"objective": "sapo", "aggregation": "seq_mean_token_mean", "entropy_coef": 0.02},
    "ipo": {"objective": "ipo", "divergence": 0.001},
    "dppo_tv": {"objective": "dppo_tv", "divergence": 0.001, "ratio_limit": 1.2},
    "dppo_kl": {"objective": "dppo_kl", "divergence": 0.0001, "divergence_high": 0.001, "log_ratio_clamp": 0.4},
    "gspo_token": {"objective": "gspo_token", "kl_coef": 0.05, "aggregation": "seq_mean_token_mean"},
    "gmpo": {"objective": "gmpo", "aggregation": "seq_mean_token_mean", "cliprange": 0.1},
    "softcap": {"softcap": 3.0, "logit_scale": 0.7, "entropy_coef": 0.02, "temperature": 0.8},
}
_TRANSFORM = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}


def chosen_of(flags: str, options: str, extra: dict) -> dict:
    """Return the arguments for a key of FLAGS and a key of OPTIONS."""
    chosen = {k: extra[k] for k in FLAGS[flags]} | OPTIONS[options]
    if "kl_coef" in chosen:
        chosen["ref_logprobs"] = extra["ref_logprobs"]
    if chosen.get("objective") == "policy_gradient":
        chosen.pop("weights", None)
    return chosen


def run(function, leaves, constants, options, dtype, upstream=0.37):
    """Return the result and the gradients of the leaves. Only the leaves have a half `dtype`, other tensors are float32."""
    x = {k: v.to(dtype).clone().requires_grad_() for k, v in leaves.items()}
    if "returns" not in options:
        x = {k: v for k, v in x.items() if not k.startswith("value")}
    wide = torch.promote_types(dtype, torch.float32)
    constants, options = ({k: widen(v, wide) for k, v in tensors.items()} for tensors in (constants, options))
    result = function(**x, **constants, **options)
    return result, differentiate(result.loss, x, upstream)


def reference_loss(**arguments):
    arguments["ids"] = arguments["ids"].long()
    first = [arguments.pop(k) for k in ("hidden", "weight", "ids", "old_logprobs", "advantages", "mask")]
    return reference.linear_ppo_loss(*first, **(_TRANSFORM | arguments))


def in_order(seed: int, leaves, constants, options, dtype):
    """Return the eager result for a permutation of the vocabulary and the hidden units, which does not change the formula."""
    g = torch.Generator().manual_seed(seed)
    v, h = (torch.randperm(n, generator=g).to(leaves["weight"].device) for n in leaves["weight"].shape)
    places = {"hidden": (..., h), "weight": (v[:, None], h), "bias": (v,), "value_weight": (h,), "value_bias": (...,)}
    moved = {k: x[places[k]] for k, x in leaves.items()}
    result, gradients = run(reference_loss, moved, constants | {"ids": v.argsort()[constants["ids"]]}, options, dtype)
    for k, x in gradients.items():
        gradients[k] = torch.empty_like(x)
        gradients[k][places[k]] = x
    return result, gradients


def eager_results(leaves, constants, options, dtype):
    """Yield eager results for several orders of the sums.

    Where a single token dominates the result, the roundings of one order often cancel, and its error is smaller than the error
    of the matrix product.
    """
    yield run(reference_loss, leaves, constants, options, dtype)
    yield from (in_order(seed, leaves, constants, options, dtype) for seed in range(7))


def check_loss(function, leaves, constants, options, dtype, how=None):
    """Assert that the loss, every metric and every gradient of `function` are within the error bound."""
    check_results(*run(function, leaves, constants, options | (how or {}), dtype), leaves, constants, options, dtype)


def check_results(got, gradients, leaves, constants, options, dtype):
    """Assert that the loss, every metric and every gradient that an op returned are within the error bound."""
    exact, exact_gradients = run(reference_loss, leaves, constants, options, torch.float64)
    eager, eager_gradients = zip(*eager_results(leaves, constants, options, dtype), strict=True)
    terms = {
        "seq_mean_token_sum": constants["mask"].shape[1],
        "token_sum": constants["mask"].numel(),
    }  # the number of terms, each of order 1
    check_error("loss", got.loss, [x.loss for x in eager], exact.loss, terms.get(options.get("aggregation"), 1))
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        # The gradient of the value head's bias is one number, which gives no scale. The gradient of its weight has the same
        # terms, times hidden states of order 1.
        scale = float(exact_gradients["value_weight"].abs().max()) if name == "value_bias" else 0.0
        check_error(f"gradient of {name}", gradient, [x[name] for x in eager_gradients], exact_gradients[name], scale)
    for name in exact.metrics:
        allowed = 2 * (eager[0].metrics[name] - exact.metrics[name]).abs() + 2e-5 * (1 + exact.metrics[name].abs())
        assert (got.metrics[name] - exact.metrics[name]).abs() <= allowed, name
