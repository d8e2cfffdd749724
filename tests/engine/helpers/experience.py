"""Experiences of tiny models, and gradients over them."""

import torch

from rlhf_engine.config import PPOConfig
from rlhf_engine.ppo.experience import advantages, score
from rlhf_engine.ppo.minibatch import minibatch_backward
from tests.engine.helpers.tiny_trainer import SETTINGS


def make_experience(trainer, temperature=1.0):
    rollout = trainer.generator.generate(trainer.prompts(0, 16), torch.arange(16))
    scored = score(rollout, trainer.policy, trainer.reference, trainer.reward, trainer.config, temperature)
    return advantages(scored, trainer.config, trainer.kl_coef)[0]


def gradients(trainer, experience, microbatch, **settings):
    config = PPOConfig(**{**SETTINGS, "microbatch": microbatch, "minibatch": 16, **settings})
    trainer.policy.zero_grad()
    metrics = minibatch_backward(trainer.policy, experience, torch.arange(16), config, 1.0)
    return {n: p.grad.clone() for n, p in trainer.policy.named_parameters() if p.grad is not None}, metrics
