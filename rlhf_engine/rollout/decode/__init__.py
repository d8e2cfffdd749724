"""Decoders, which generate one token per sequence and step with keys and values in slots or in pages."""

from __future__ import annotations

import logging

from transformers import PreTrainedConfig

from rlhf_engine.config import RolloutConfig
from rlhf_engine.model import LanguageModel
from rlhf_engine.rollout.decode.protocol import Decoder

_log = logging.getLogger(__name__)

_RECURRENT = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Kinds of layers, as configs name them, with a recurrent state per sequence."""


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Return whether the layers of a config's model have recurrent states, which only `RecurrentDecoder` keeps."""
    return not _RECURRENT.isdisjoint(getattr(config.get_text_config(), "layer_types", None) or ())


def is_paged(cache: str, device: str) -> bool:
    """Return whether the value `cache` of `rollout.cache` selects pages on a device of type `device`."""
    return cache == "paged" or (cache == "auto" and device == "cuda")


def takes_pages(policy: LanguageModel, cache: str, device: str) -> bool:
    """Return whether `policy` is sampled with pages; "auto" takes them only for attention that reads pages, and logs that."""
    if cache == "paged" or not is_paged(cache, device):
        return cache == "paged"
    from rlhf_engine.rollout.decode.pool import reads_pages

    if reads_pages(policy):
        return True
    _log.warning(
        "rollout.cache: auto is slots for %s, whose attention does not read the pages of a cache",
        type(policy.model).__name__,
    )
    return False


def make_decoder(policy: LanguageModel, config: RolloutConfig, columns: int, kv_bytes: int | None = None) -> Decoder:
    """Return the decoder that `config.cache` selects, for sequences of at most `columns` tokens.

    Its keys and values use at most `kv_bytes`.

    Raises:
        ValueError: as `SlotDecoder` or `PagedDecoder` does, and for `config.compile` without pages.
    """
    # Imported here, so that a run loads only the decoder that it uses.
    name, recurrent = type(policy.model).__name__, is_recurrent(policy.model.config)
    if config.exact and (recurrent or config.cache == "paged"):
        what = "a recurrent state" if recurrent else "rollout.cache 'paged'"
        raise ValueError(f"rollout.exact: got True for {name} with {what}, expected False; it needs slots")
    if recurrent and config.cache == "paged":
        raise ValueError(
            f"rollout.cache: got 'paged' for {name}, expected 'auto' or 'slots': a recurrent state has no pages"
        )
    if not recurrent and takes_pages(policy, config.cache, policy.device.type):
        from rlhf_engine.rollout.decode.paged import PagedDecoder

        return PagedDecoder(policy, config.batch_size, columns, kv_bytes=kv_bytes, compiles=config.compile)
    if config.compile:
        raise ValueError(
            f"rollout.compile: got True for {name} on {policy.device} with rollout.cache "
            f"{config.cache!r}, expected None or False: decode steps are compiled only on pages"
        )
    if recurrent:
        from rlhf_engine.rollout.decode.recurrent import RecurrentDecoder

        return RecurrentDecoder(policy, config.batch_size, columns, kv_bytes=kv_bytes)
    from rlhf_engine.rollout.decode.slots import SlotDecoder

    return SlotDecoder(policy, config.batch_size, columns, kv_bytes=kv_bytes)
