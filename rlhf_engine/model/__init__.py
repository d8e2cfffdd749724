"""One backbone and its heads."""

from rlhf_engine.model.actor_critic import ActorCritic, frozen_copy
from rlhf_engine.model.heads import HeadTransform, ValueHead
from rlhf_engine.model.layout import TokenBatch, token_batch

__all__ = ["ActorCritic", "HeadTransform", "TokenBatch", "ValueHead", "frozen_copy", "token_batch"]
