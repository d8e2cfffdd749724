"""The reference policy of the KL penalty."""

from __future__ import annotations

import copy

from rlhf_engine.model.actor_critic import ActorCritic


def frozen_copy(policy: ActorCritic) -> ActorCritic:
    """A deep copy of `policy` as it is now, without gradients; costs the weights once more.

    It answers `hidden` and `token_logprobs`; its value head is the policy's and has no use.
    """
    return copy.deepcopy(policy).requires_grad_(False)
