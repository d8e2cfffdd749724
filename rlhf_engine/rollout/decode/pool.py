"""Keys and values in pages: the pool of all layers, the layers of a cache in it, and attention that reads pages.

Shapes: P pages, R rows of a step, M pages per row, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin

from rlhf_engine.model import LanguageModel
from rlhf_engine.rollout.decode.pages import PAGE_SIZE, pool_bytes
from rlhf_engine.rollout.decode.probe import LayerShape, probe
from rlhf_kernels import paged_attention

ATTENTION = "rlhf_pages"


class PagedKeys(NamedTuple):
    """The keys argument of attention in decode steps."""

    pages: Tensor  # (P, page size, groups, D)
    table: Tensor  # (R, M), int32
    lengths: Tensor  # (R,), int32, the new token included
    window: int | None
    value_size: int
    """Head size of the values, whose pages are padded to that of the keys."""


def attend(
    module: nn.Module,
    query: Tensor,  # (R, heads, 1, D)
    key: PagedKeys,
    value: Tensor,  # (P, page size, groups, D)
    attention_mask: Tensor,  # not read: a row attends to the tokens given by its pages and its length
    scaling: float | None = None,  # default: D ** -0.5
    softcap: float | None = None,
    **unused: object,  # arguments of other implementations: dropout, sliding_window, is_causal
) -> tuple[Tensor, None]:  # (R, 1, heads, value size)
    """Compute `paged_attention` in transformers' attention interface."""
    options = {"scale": scaling, "window": key.window, "softcap": softcap}
    found = paged_attention(query[:, :, 0].to(value.dtype), key.pages, value, key.table, key.lengths, **options)
    return found[:, None, :, : key.value_size], None


AttentionInterface.register(ATTENTION, attend)


@dataclass
class Pass:
    """Arguments of the current forward pass, which the layers of the cache read. It writes N tokens."""

    page: Tensor | None = None  # (N,)
    within: Tensor | None = None  # (N,), the index in the page
    source: Tensor | None = None  # (N,), prefill: the index in the flattened prompts; None in decode
    table: Tensor | None = None  # (R, M), decode
    lengths: Tensor | None = None  # (R,), decode
    gathers: bool = False  # decode: attention reads one tensor per layer instead of pages


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer: views of the pool, [pages, page size, groups, D]."""

    is_sliding = False

    def __init__(self, now: Pass, window: int | None, shape: LayerShape) -> None:
        super().__init__()
        self.now, self.window, self.shape = now, window, shape

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise AssertionError: the pool is allocated in `PagedDecoder.open`."""
        raise AssertionError("the pool is allocated before the first forward pass")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor | PagedKeys, Tensor]:
        """Write the new tokens; return the keys and values for attention: the new ones in prefill, the pages in decode."""
        now = self.now
        for states, pages in ((key_states, self.keys), (value_states, self.values)):
            assert pages is not None
            tokens = states.transpose(1, 2).flatten(0, 1).to(pages.dtype)  # (rows * tokens, groups, D)
            tokens = pad(tokens, (0, pages.shape[-1] - tokens.shape[-1]))
            pages[now.page, now.within] = tokens if now.source is None else tokens[now.source]
        if now.source is not None:
            return key_states, value_states
        assert self.keys is not None and self.values is not None and now.table is not None and now.lengths is not None
        if now.gathers:
            return self._gathered(self.keys), self._gathered(self.values)
        return PagedKeys(self.keys, now.table, now.lengths, self.window, self.shape.value_size), self.values

    def _gathered(self, pages: Tensor) -> Tensor:  # (P, page size, groups, D) -> (R, groups, M * page size, D)
        """Return the tokens of each row in one tensor, with zeros after its last token."""
        now = self.now
        assert now.table is not None and now.lengths is not None
        found = pages[now.table].flatten(1, 2)  # (R, M * page size, groups, D)
        column = torch.arange(found.shape[1], device=found.device)
        found.masked_fill_((column >= now.lengths[:, None])[:, :, None, None], 0)
        return found.transpose(1, 2).contiguous()  # some models call `view` on it

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the keys in prefill; decode steps do not call this."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: prefill begins at position 0, and decode steps pass their positions."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: the length is not limited."""
        return -1


def reads_pages(policy: LanguageModel) -> bool:
    """Return whether a policy's attention can read pages; otherwise they are copied into one tensor in every step."""
    config = policy.model.config.get_text_config()
    return probe(policy).direct and "chunked_attention" not in (getattr(config, "layer_types", None) or ())


def stored_layers(policy: LanguageModel) -> list[LayerShape]:
    """Return the shapes of a policy's pages in each layer. Attention that reads pages has one head size for keys and values."""
    found = probe(policy)
    if not found.direct:
        return list(found.layers)
    return [layer._replace(value_size=layer.key_size) for layer in found.layers]


def pool_shape(policy: LanguageModel, pages: int, page_size: int) -> tuple[int, ...]:
    """Return the pool's shape for a policy.

    It is (layers, 2 for keys and values, pages, page size, groups, D) if all of them have one shape, otherwise one dimension.
    """
    layers = stored_layers(policy)
    keys_like_values = all(layer[:2] == layer[2:] for layer in layers)
    if keys_like_values and len(set(layers)) == 1:
        return len(layers), 2, pages, page_size, *layers[0][:2]
    return (sum(layer.numbers for layer in layers) * pages * page_size,)


def layers_of_pool(pool: Tensor, policy: LanguageModel, page_size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and the values of each layer, [P, page size, groups, D], as views of the pool."""
    layers = stored_layers(policy)
    if pool.dim() > 1:
        return [(keys, values) for keys, values in pool]
    pages = len(pool) // (sum(layer.numbers for layer in layers) * page_size)
    shapes = [(pages, page_size, *shape) for layer in layers for shape in (layer[:2], layer[2:])]
    parts = pool.split([math.prod(shape) for shape in shapes])
    views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return list(zip(views[::2], views[1::2], strict=True))


def kv_bytes_of(policy: LanguageModel, pages: int, page_size: int = PAGE_SIZE) -> int:
    """Return `pool_bytes` for the keys and values of a policy."""
    numbers = sum(layer.numbers for layer in stored_layers(policy))
    return pool_bytes(numbers, pages, policy.product_dtype, page_size)


def pages_within(policy: LanguageModel, kv_bytes: int, page_size: int = PAGE_SIZE) -> int:
    """Return how many pages fit into `kv_bytes` in addition to page 0."""
    return kv_bytes // kv_bytes_of(policy, 0, page_size) - 1


def check_config_heads(policy: LanguageModel) -> None:
    """Raise ValueError if the config, from which memory is planned, was changed after the model was built from it."""
    config, found = policy.model.config.get_text_config(), probe(policy)
    heads = (
        getattr(config, "num_key_value_heads", None) if "num_key_value_heads" in type(config).__annotations__ else None
    )
    if found.direct and len(set(found.layers)) == 1 and heads is not None and heads != found.layers[0].key_heads:
        got, expected = found.layers[0][:2], (heads, found.layers[0].key_size)
        raise ValueError(f"policy: got keys or values of (heads, size) {got}, expected {expected} by its config")
