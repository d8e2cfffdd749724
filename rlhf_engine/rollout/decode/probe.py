"""What a model caches and how it attends, seen in a forward pass over two tokens: configs of families name these differently.

Shapes: B sequences, S positions, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_engine.model import LanguageModel, TokenBatch
from rlhf_engine.model.trunk import attention

ATTENTION = "rlhf_probe"
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")
"""Arguments of transformers' attention functions that change the result and that our attention does not have."""
_MISSING = (AttributeError, TypeError, RuntimeError, ValueError, IndexError)
"""Errors of a model's code for a missing mask, or for keys that are no tensor."""


class LayerShape(NamedTuple):
    """Heads and head sizes that a layer caches per token; zeros for a layer without cached keys and values."""

    key_heads: int = 0
    key_size: int = 0
    value_heads: int = 0
    value_size: int = 0

    @property
    def numbers(self) -> int:
        """Numbers per token."""
        return self.key_heads * self.key_size + self.value_heads * self.value_size


@dataclass(frozen=True)
class Probe:
    """The cached layers of a model, and whether its attention can be replaced."""

    layers: tuple[LayerShape, ...]
    """The layers in the order of their indices in a cache."""
    routed: bool
    """Whether all layers attend through transformers' interface, without arguments or masks that our attention lacks."""
    direct: bool
    """Whether in addition each layer attends to exactly what the cache returned, which may then be pages."""

    @property
    def numbers(self) -> int:
        """Numbers per token in all layers."""
        return sum(layer.numbers for layer in self.layers)


class _Recorder:
    """An attention function that returns zeros, and records what a pass passes to it and what the cache returned before."""

    def begin(self) -> None:
        """Forget the last pass."""
        self.returned: list[object] = []
        self.calls, self.plain, self.same = 0, True, True

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,  # (B, heads, S, D)
        key: object,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: object,
    ) -> tuple[Tensor, None]:  # (B, S, heads, D)
        """Record a call through transformers' attention interface."""
        self.calls += 1
        # The pass has no mask, so a mask here is one that the layer computes.
        self.plain &= attention_mask is None and all(options.get(name) is None for name in _UNSUPPORTED)
        self.same &= all(any(one is other for other in self.returned) for one in (key, value))
        batch, heads, length, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[-1]), None


_recorder = _Recorder()
AttentionInterface.register(ATTENTION, _recorder)


class _RecordingLayer(CacheLayerMixin):
    """A layer of a cache that returns the new keys and values, or placeholders, and records their shapes."""

    is_sliding = False

    def __init__(self, *, opaque: bool) -> None:
        super().__init__()
        self.opaque, self.shape = opaque, LayerShape()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: nothing is stored."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[object, Tensor]:
        """Record the shapes; return the keys or an object without attributes, and the values."""
        self.shape = LayerShape(*key_states.shape[1::2], *value_states.shape[1::2])
        keys = object() if self.opaque else key_states
        _recorder.returned += [keys, value_states]
        return keys, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the keys."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: the pass begins at position 0."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: the length is not limited."""
        return -1


_found: WeakKeyDictionary[nn.Module, Probe] = WeakKeyDictionary()


def probe(policy: LanguageModel) -> Probe:
    """Return what a pass over two tokens shows; a model is probed once.

    Raises:
        ValueError: the model keeps no keys and values in a cache.
    """
    if policy.model not in _found:
        _found[policy.model] = _probe(policy)
    return _found[policy.model]


def _probe(policy: LanguageModel) -> Probe:
    config, routed = policy.model.config.get_text_config(), False
    try:
        layers = _pass(policy, ATTENTION)
        routed = _recorder.calls == len(layers) and _recorder.plain
    except _MISSING:
        pass  # the model's attention needs the mask that transformers makes for its own implementations
    if not routed:
        layers = _pass(policy, config._attn_implementation)
    if not any(layer.numbers for layer in layers):
        raise ValueError(
            f"policy: {type(policy.model).__name__} keeps no keys and values in transformers' cache, so it cannot be sampled; "
            "it can be scored and fine-tuned"
        )
    direct = routed and _recorder.same and all(layer.value_size <= layer.key_size for layer in layers)
    if direct:
        try:
            _pass(policy, ATTENTION, opaque=True)
        except _MISSING:
            direct = False  # the layers compute something from the keys before they attend
    return Probe(layers, routed, direct)


@torch.no_grad()
def _pass(policy: LanguageModel, name: str | None, *, opaque: bool = False) -> tuple[LayerShape, ...]:
    """Run a pass over two tokens with the attention implementation `name`; return what the layers cache."""
    config = policy.model.config.get_text_config()
    _recorder.begin()
    layers = [_RecordingLayer(opaque=opaque) for _ in range(config.num_hidden_layers)]
    ids = torch.arange(1, 3, device=policy.device).remainder(policy.lm_weight.shape[0])[None]
    with attention(config, name):
        policy(TokenBatch(input_ids=ids, cache=Cache(layers=[*layers])), ("hidden",))
    return tuple(layer.shape for layer in layers)
