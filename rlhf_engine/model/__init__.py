"""One backbone and its heads, in the roles that PPO needs."""

from rlhf_engine.model.actor_critic import ActorCritic, LanguageModel
from rlhf_engine.model.heads import HeadTransform, ValueHead
from rlhf_engine.model.layout import TokenBatch, token_batch
from rlhf_engine.model.roles import FrozenCopy, Outputs, Policy, Reference, Reward, ValueFunction, frozen_copy

__all__ = [
    "ActorCritic",
    "FrozenCopy",
    "HeadTransform",
    "LanguageModel",
    "Outputs",
    "Policy",
    "Reference",
    "Reward",
    "TokenBatch",
    "ValueFunction",
    "ValueHead",
    "frozen_copy",
    "token_batch",
]
