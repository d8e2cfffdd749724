"""PPO trainers with random weights and random prompts, as `rlhf ppo` builds them from the same settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
import torch._dynamo  # the first call of a custom op would import it during an update
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_engine.config import RunConfig
from rlhf_engine.data import Codec
from rlhf_engine.model import ValueHead
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.pretrained import load_pretrained
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.roles import REWARD
from rlhf_engine.model.top_layers import train_top
from rlhf_engine.planner import MemoryPlan, ModelShape, Workload
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.ppo.ptx import PretrainStream
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.recipes.ppo import make_policy, reward_function
from rlhf_engine.rollout import Generator

Fields = dict[str, Any]
PHASES = {"collect": "generate", "score": "score", "update": "train"}
"""Name of a phase in the metrics of time -> its name in the metrics of memory and in the plan."""


def make_workload(fields: Fields, config: RunConfig) -> Workload:
    """Return the workload of a run whose reward model has the size of its policy."""
    shape = ModelShape.from_fields(fields)
    return Workload.of(config, shape, shape, reward_adapter=config.adapter.rank > 0)


def make_plan(fields: Fields, settings: dict[str, Any]) -> MemoryPlan:
    """Return the plan of a run whose reward model has the size of its policy."""
    return MemoryPlan.of(make_workload(fields, RunConfig.from_dict(settings)))


def make_model(fields: Fields, config: RunConfig, folder: str | None = None) -> PreTrainedModel:
    """Return a model with random weights, which are read from `folder` if they are quantised."""
    if folder is not None:
        where = {"attention": config.model.attention, "dtype": getattr(torch, config.dtype), "device": config.device}
        return load_pretrained(AutoModelForCausalLM, folder, quant=config.model.quant, **where)
    options = {"attn_implementation": config.model.attention, "dtype": getattr(torch, config.dtype)}
    with torch.device(config.device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), **options).eval()


def make_reward_model(model: PreTrainedModel, config: RunConfig) -> RewardModel:
    """Return a reward model of the size of the policy, or an adapter on it."""
    if not config.adapter.rank:
        return RewardModel.from_causal_lm(model, seed=1)
    adapters = Adapters.start(model, config.adapter, seed=0)
    adapters.add(REWARD, 1, trained=False)
    return RewardModel.sharing(adapters, REWARD, ValueHead(model.config.hidden_size))


def make_trainer(fields: Fields, settings: dict[str, Any], folder: str | None = None) -> PPOTrainer:
    """Return the trainer that `rlhf ppo` builds from these settings; every response has the maximum length."""
    config = RunConfig.from_dict(settings)
    torch.manual_seed(0)
    vocab = AutoConfig.for_model(**fields).vocab_size
    model = make_model(fields, config, folder)
    top = config.model.train_layers
    if top is not None and config.adapter.rank:  # adapters are added to the trained layers
        train_top(model, top)
    reward_model = make_reward_model(model, config)
    if top is not None and not config.adapter.rank:  # a copy of the whole model is the reward model
        train_top(model, top)
    policy, rollout = make_policy(config, model, reward_model), config.rollout
    length = rollout.max_prompt_tokens + rollout.max_response_tokens
    text = torch.randint(0, vocab, (config.ppo.minibatch, length))
    codec = cast(Codec, SimpleNamespace(eos_id=1, pad_id=0, content=tuple))
    return build_trainer(
        policy,
        None,
        reward_function(reward_model, codec),
        lambda first, count: list(torch.randint(0, vocab, (count, rollout.max_prompt_tokens))),
        config,
        # An end token outside the vocabulary is never sampled.
        generator=Generator(policy, rollout, eos_token_ids=vocab, pad_token_id=0, seed=0),
        pretrain=PretrainStream(text, 0) if config.ppo.ptx_coef else None,
    )
