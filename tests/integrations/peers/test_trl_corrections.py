"""The options of GRPOConfig that weight or mask tokens, with and without our mixin: loss, gradients and metrics.

Each option also changes the loss of this batch, so that no comparison is one of the default with itself.
"""

import pytest
import torch

from .grpo import check_step

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
KL = {"beta": 0.1}
OPTIONS = {
    "importance_sampling_level": {"importance_sampling_level": "sequence"},
    "top_entropy_quantile": {"top_entropy_quantile": 0.5},
    "off_policy_mask_threshold": {"off_policy_mask_threshold": 0.05},
    "off_policy_mask_threshold, sequences": {
        "off_policy_mask_threshold": 0.05,
        "importance_sampling_level": "sequence",
    },
    "use_bias_correction_kl": KL | {"use_bias_correction_kl": True},
    "use_bias_correction_kl, sequences": KL | {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
    "without use_bias_correction_kl": KL | {"use_bias_correction_kl": False},
    "entropy_coef": {"entropy_coef": 0.3},
    "entropy_coef, top_entropy_quantile": {"entropy_coef": 0.3, "top_entropy_quantile": 0.5},
    "use_adaptive_entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.3, "entropy_target": 9.0},
}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BOUNDS = {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.1}
"""Bounds of the weights, which some sequences and tokens of the batch are outside of."""


@pytest.mark.parametrize("name", OPTIONS)
def test_options(tmp_path, name):
    def setup(made):
        made._last_world_entropy = 0.0  # of an earlier step; use_adaptive_entropy has no bonus in the first

    loss = check_step(tmp_path, setup=setup, **OPTIONS[name])
    assert abs(loss - check_step(tmp_path)) > 1e-4


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(tmp_path, loss_type, level):
    check_step(tmp_path, loss_type=loss_type, importance_sampling_level=level, beta=0.1, epsilon_high=0.4)


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_a_sampler(tmp_path, mode):
    """The weights are computed from our log-probs and those that a sampler reports, as TRL's are for vLLM."""
    seen = []

    def batch(made):
        torch.manual_seed(0)
        generate = made._generate

        def sampled(prompts):
            made.use_vllm = False
            found = list(generate(prompts))
            made.use_vllm = True
            g = torch.Generator().manual_seed(2)
            found[4] = [(0.2 * torch.randn(len(ids), generator=g) - 3.9).tolist() for ids in found[1]]
            return tuple(found)

        made._generate = sampled
        prompts = [made.train_dataset[i // 2] for i in range(4)]
        seen.append(made._generate_and_score_completions(prompts))
        return seen[-1]

    check_step(tmp_path, batch=batch, vllm_importance_sampling_mode=mode, **BOUNDS)
    theirs, ours = (made["importance_sampling_ratio"] for made in seen)
    assert ours.shape[1] == 1 if mode.startswith("sequence") else ours.shape[1] > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert (ours == 0).any() if mode.endswith("mask") else (ours == 1.1).any() or (ours == 0.8).any()
