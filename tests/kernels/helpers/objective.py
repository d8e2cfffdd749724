"""Batches and options for the tests of `ppo_loss`; each option of the objective has a case here."""

import torch


def case(seed: int, b: int = 5, t: int = 40):
    g = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(b, t, generator=g)

    logprobs = -normal().abs() - 1
    mask = torch.rand(b, t, generator=g) > 0.3
    mask[0] = False
    constants = {
        "old_logprobs": logprobs + normal(0.3),
        "advantages": normal() * (torch.rand(b, t, generator=g) > 0.2),
        "mask": mask,
        "old_values": normal(),
        "returns": normal(),
        "ref_logprobs": logprobs + normal(0.2),
        "weights": torch.rand(b, t, generator=g),
    }
    return {"logprobs": logprobs, "values": normal(), "entropy": normal().abs()}, constants


def run(function, inputs, constants, options, dtype=torch.float32):
    def cast(x):
        return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x

    leaves = {k: cast(v).clone().requires_grad_() for k, v in inputs.items()}
    result = function(**leaves, **{k: cast(v) for k, v in constants.items()}, **options)
    (0.37 * result.loss).backward()
    return result, {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}


OPTIONS = [
    {},
    {"dual_clip": 1.3, "cliprange_high": 0.3, "log_ratio_clamp": 0.5, "entropy_coef": 0.01, "kl_coef": 0.1},
    {"ratio_level": "sequence", "aggregation": "seq_mean_token_mean", "kl_coef": 0.1, "kl_estimator": "k1"},
    {"ratio_level": "sequence", "objective": "kl_penalty", "old_kl_coef": 0.4, "aggregation": "token_sum"},
    {
        "objective": "ratio",
        "aggregation": "seq_mean_token_sum",
        "kl_coef": 0.1,
        "kl_estimator": "k2",
        "entropy_coef": 0.1,
    },
    {"objective": "policy_gradient", "kl_coef": 0.1, "kl_estimator": "abs", "cliprange_value": None},
    {"num_tokens": 1000, "num_value_tokens": 500.0, "vf_coef": 0.5},
    {"aggregation": "seq_mean_token_mean", "num_sequences": torch.tensor(64)},
    {"kl_coef": 0.1, "kl_weighting": "ratio", "log_ratio_clamp": 0.5, "entropy_coef": 0.01},
    {"kl_coef": 0.1, "kl_weighting": "ratio", "ratio_level": "sequence", "aggregation": "seq_mean_token_mean"},
    {"objective": "cispo", "cliprange": 0.1, "cliprange_high": 0.3, "entropy_coef": 0.01},
    {"objective": "cispo", "ratio_level": "sequence", "cliprange": 0.01, "kl_coef": 0.1, "kl_weighting": "ratio"},
    {"objective": "sapo", "tau_neg": 2.0, "kl_coef": 0.1, "kl_weighting": "ratio"},
    {"objective": "sapo", "ratio_level": "sequence", "log_ratio_clamp": 0.05, "aggregation": "seq_mean_token_mean"},
    {"objective": "ipo", "divergence": 0.03},
    {"objective": "ipo", "log_ratio_coef": 0.2, "log_ratio_clamp": 0.3, "aggregation": "token_sum"},
    {"objective": "dppo_tv", "divergence": 0.02, "divergence_high": 0.04, "ratio_limit": 1.1, "log_ratio_coef": 0.1},
    {"objective": "gspo_token", "cliprange": 0.01, "cliprange_high": 0.03, "dual_clip": 1.02, "entropy_coef": 0.01},
    {"objective": "gspo_token", "aggregation": "seq_mean_token_mean", "kl_coef": 0.1, "kl_weighting": "ratio"},
    {"objective": "gmpo", "aggregation": "seq_mean_token_mean", "cliprange": 0.1, "cliprange_high": 0.3},
    {"objective": "gmpo", "kl_coef": 0.1, "kl_weighting": "ratio", "log_ratio_clamp": 0.1, "num_tokens": 900},
    {"objective": "dppo_kl", "divergence": 0.002, "log_ratio_clamp": 0.4, "aggregation": "seq_mean_token_sum"},
]
