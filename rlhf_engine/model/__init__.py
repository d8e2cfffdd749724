"""One backbone and its heads."""

from rlhf_engine.model.actor_critic import ActorCritic
from rlhf_engine.model.heads import HeadTransform, ValueHead
from rlhf_engine.model.layout import TokenBatch, token_batch
from rlhf_engine.model.reference import frozen_copy

__all__ = ["ActorCritic", "HeadTransform", "TokenBatch", "ValueHead", "frozen_copy", "token_batch"]
