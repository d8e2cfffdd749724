"""A trainer of a tiny random model, with steps of a fraction of a second."""

import torch

from rlhf_engine.config import MemoryConfig, OptimConfig, PPOConfig, RolloutConfig, RunConfig
from rlhf_engine.model import ActorCritic, ValueHead
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.ppo.callbacks import Callback
from rlhf_engine.rollout import Generator
from tests.engine.helpers.tiny_models import VOCABULARY, tiny

ROLLOUT = RolloutConfig(max_prompt_tokens=8, max_response_tokens=10, batch_size=16)
SETTINGS = {"updates": 2, "rollout_batch": 16, "minibatch": 8, "microbatch": 4, "ppo_epochs": 2, "kl_coef": 0.05}


def target_share(rollout):
    """Return the share of token 5 in the response, a reward that is easy to learn."""
    return ((rollout.response_ids == 5) & rollout.mask).sum(1) / rollout.response_lengths


def make_trainer(
    family="llama",
    *,
    seed=1,
    model_seed=0,
    rollout=ROLLOUT,
    reward=target_share,
    pretrain=None,
    value_model=None,
    attention=None,
    memory=None,
    arena=None,
    dtype=torch.float32,
    device="cpu",
    model=None,
    **settings,
):
    generator = torch.Generator().manual_seed(5)
    head = ValueHead.from_weights(torch.randn(32, generator=generator) * 0.1, 0.2).to(device)
    if model is None:
        model = tiny(family, seed=model_seed, initializer_range=0.1).to(device, dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    policy = ActorCritic(model, head) if value_model is None else ActorCritic(model, value_model)
    stream = torch.Generator().manual_seed(9)
    prompts = [torch.randint(3, VOCABULARY, (1 + n % 8,), generator=stream) for n in range(40)]
    config = PPOConfig(**{**SETTINGS, "optim": OptimConfig(lr=1e-3), **settings})
    return build_trainer(
        policy,
        None,
        reward,
        lambda first, count: [prompts[n % 40] for n in range(first, first + count)],
        RunConfig(seed=seed, ppo=config, rollout=rollout, memory=memory or MemoryConfig()),
        generator=Generator(policy, rollout, eos_token_ids=(2, 7), pad_token_id=0, seed=seed),
        pretrain=pretrain,
        arena=arena,
    )


class OnUpdate(Callback):
    """Calls a function with the number of finished updates and the log of every update."""

    def __init__(self, function):
        self.function = function

    def on_update(self, trainer, log):
        self.function(trainer.updates_done, log)


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.policy.named_parameters()}
