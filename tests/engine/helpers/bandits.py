"""Problems small enough to enumerate."""

import torch

from tests.engine.helpers.tiny_models import VOCABULARY

BEST = 17


def arm(rollout):
    """A bandit whose arms pay 0 to .5, and one that pays 1."""
    token = rollout.response_ids[:, 0]
    return torch.where(token == BEST, 1.0, 0.5 * token / VOCABULARY)
