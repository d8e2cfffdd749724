"""The reference policy of the KL penalty."""

from __future__ import annotations

import copy

from rlhf_engine.model.actor_critic import ActorCritic


def frozen_copy(policy: ActorCritic) -> ActorCritic:
    """A deep copy of `policy` as it is now, without gradients; costs the weights once more.

    It answers `hidden` and `token_logprobs`; its value head is the policy's and has no use, and a value model is not copied.
    """
    left_out = {} if policy.value_model is None else {id(policy.value_model): None}
    return copy.deepcopy(policy, left_out).requires_grad_(False)
