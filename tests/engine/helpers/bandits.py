"""Problems small enough to enumerate."""

import torch

from tests.engine.helpers.tiny_models import VOCABULARY

BEST = 17


def arm(rollout):
    """Return the rewards of a bandit: the arm `BEST` pays 1, the other arms pay 0 to 0.5."""
    token = rollout.response_ids[:, 0]
    return torch.where(token == BEST, 1.0, 0.5 * token / VOCABULARY)
