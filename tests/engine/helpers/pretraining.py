"""A stream of pretraining sequences."""

import torch

from rlhf_engine.ppo.ptx import PretrainStream
from tests.engine.helpers.tiny_models import VOCABULARY


def make_stream(count=24, length=18, seed=1):
    generator = torch.Generator().manual_seed(4)
    return PretrainStream(torch.randint(3, VOCABULARY, (count, length), generator=generator), seed)
