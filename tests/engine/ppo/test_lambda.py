"""`ppo.lam_alpha` and `ppo.value_lam`: the lambda of each response, that of the returns, and settings that exclude them."""

import pytest
import torch

from rlhf_engine.config import load_config
from rlhf_engine.ppo.experience import Scored, advantages
from rlhf_kernels import gae, length_adaptive_lam
from tests.engine.helpers.tiny_trainer import make_trainer


def experience(**settings):
    """Return scored responses whose only reward is the score, with values that are not 0, and their experience."""
    trainer = make_trainer(whiten_advantages=False, **settings)
    rollout = trainer.generator.generate(trainer.prompts(0, 16), torch.arange(16))
    values = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0)) * rollout.mask
    scores = torch.arange(16) / 8 - 1
    scored = Scored(rollout, scores, scores, rollout.logprobs, values, rollout.logprobs)
    return scored, advantages(scored, trainer.config, 0.5)[0]


def estimate(scored, **options):
    mask = scored.rollout.mask
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return gae(torch.where(last, scored.scores[:, None], 0), scored.old_values, mask, **options)


def test_returns_of_lambda_one_are_the_score():
    scored, found = experience(value_lam=1.0, lam=0.5)
    expected = torch.where(scored.rollout.mask, scored.scores[:, None], 0)
    torch.testing.assert_close(found.returns, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.advantages, estimate(scored, lam=0.5).advantages, rtol=1e-5, atol=1e-6)


def test_lambda_grows_with_the_length_of_the_response():
    scored, found = experience(lam_alpha=0.5)
    lam = length_adaptive_lam(scored.rollout.mask, alpha=0.5)
    assert lam.unique().numel() > 2
    expected = estimate(scored, lam=lam)
    torch.testing.assert_close(found.advantages, expected.advantages, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.returns, expected.returns, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lam_alpha=0.05", "lam=0.9"], r"lam: got 0\.9, expected 0\.95; only lam_alpha None reads it"),
        (["lam_alpha=0.05", "preset=reinforce"], r"lam: got 1\.0, .*; only lam_alpha None reads it"),
        (["lam_alpha=0.0"], r"lam_alpha: got 0\.0"),
        (["value_lam=1.5"], r"value_lam: got 1\.5"),
        (["value_lam=1.0", "vf_coef=0.0"], r"value_lam: got 1\.0, .*only vf_coef above 0 reads it"),
        (["value_lam=1.0", "vf_coef=0.0", "baseline=none"], r"value_lam: got 1\.0, .*only baseline 'value' reads it"),
        (["length_adaptive_gae_alpha=0.05"], r"did you mean 'ppo\.lam_alpha'"),
        (["lam_critic=1.0"], r"did you mean 'ppo\.value_lam'"),
    ],
)
def test_settings_that_nothing_reads_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [f"ppo.{setting}" for setting in settings])
