"""Language models with a value function, and the roles that they have in PPO."""

from rlhf_engine.model.actor_critic import ActorCritic, LanguageModel, frozen_copy
from rlhf_engine.model.heads import ValueHead
from rlhf_engine.model.layout import TokenBatch, token_batch
from rlhf_engine.model.references import FrozenCopy
from rlhf_engine.model.roles import Outputs, Policy, Reference, Reward, ValueFunction

__all__ = [
    "ActorCritic",
    "FrozenCopy",
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
