"""Generators with pages, and their comparison with slots."""

from functools import partial

import torch

from rlhf_engine.config import RolloutConfig
from rlhf_engine.rollout import Generator
from rlhf_engine.rollout.decode.paged import PagedDecoder, kv_bytes_of
from tests.engine.helpers.sampling import ENDS

SETTINGS = {"max_prompt_tokens": 20, "max_response_tokens": 12, "batch_size": 16}


def dirty(shape, dtype, device):
    """Return memory filled with NaN, like that of an arena, which is not cleared."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def make_generator(actor, *, cache="paged", page_size=4, pages=None, ends=ENDS, allocate=dirty, **settings):
    config = RolloutConfig(**{**SETTINGS, "cache": cache, **settings})
    decoder = None
    if cache == "paged":
        columns = config.max_prompt_tokens + config.max_response_tokens
        kv_bytes = None if pages is None else kv_bytes_of(actor, pages, page_size)
        decoder = PagedDecoder(actor, config.batch_size, columns, kv_bytes=kv_bytes, page_size=page_size)
    generator = Generator(actor, config, eos_token_ids=ends, pad_token_id=0, seed=3, decoder=decoder)
    generator.generate = partial(generator.generate, allocate=allocate)
    return generator


def check_same(paged, slots):
    assert torch.equal(paged.response_ids, slots.response_ids) and torch.equal(paged.ended, slots.ended)
    assert torch.equal(paged.mask, slots.mask)
    for name in ("logprobs", "sampling_logprobs"):
        torch.testing.assert_close(getattr(paged, name), getattr(slots, name), rtol=0, atol=1e-5)
    torch.testing.assert_close(paged.values, slots.values, rtol=1e-4, atol=1e-4)
