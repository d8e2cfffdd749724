"""Memory of a trunk's passes: activations that are saved for the backward pass, and workspace of the current operation.

The counts follow the layers as transformers implements them, and what autograd saves for each operation. A test
compares them with the tensors that autograd actually saves.
Legend: N tokens, H hidden, I intermediate, A query width, K key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf_engine.planner.model_shape import ModelShape, RecurrentShape
from rlhf_engine.planner.skeleton import PassBytes

FLOAT, IDS = torch.float32.itemsize, torch.int64.itemsize
"""Bytes of a float32 number and of a token id."""


@dataclass(frozen=True)
class Pass:
    """One pass of `rows` sequences of at most `columns` tokens through a trunk."""

    shape: ModelShape
    rows: int
    columns: int
    eager: bool
    """Whether attention materialises its logits as a tensor."""
    weight_bytes: int
    """Bytes per element of the weights, and therefore of the residual stream."""
    compute_bytes: int
    """Bytes per element of a matrix product; differs from `weight_bytes` under autocast."""
    count: int | None = None
    """Tokens of all sequences if their lengths differ; None: `rows * columns`."""
    rank: int = 0
    """Rank of the adapters of every matrix, which is then frozen; 0: none."""
    dequantised: int = 0
    """Bytes of the largest matrix of a layer that is dequantised for its product; 0 if none is quantised."""
    trained: int | None = None
    """Number of top layers that are trained or have adapters, while the rest is frozen; None: all."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.rows * self.columns if self.count is None else self.count

    @property
    def windowed(self) -> bool:
        """Whether fused attention reads a mask, and therefore keys and values repeated for each query head."""
        return not self.eager and self.shape.window is not None and self.columns > self.shape.window

    @property
    def mask(self) -> int:
        """Bytes of the mask of fused attention in one layer; 0 if it reads none."""
        return self.tokens * self.columns * self.compute_bytes if self.windowed else 0

    def scores(self, size: int) -> int:
        """Return the bytes of one layer's attention logits with `size` bytes per element; 0 if they are not materialised."""
        return self.tokens * self.shape.heads * self.columns * size if self.eager else 0

    @property
    def autocast(self) -> bool:
        """Whether products use rounded copies of the weights."""
        return self.compute_bytes < self.weight_bytes

    def saved_by_layer(self) -> int:
        """Return the bytes that one layer saves for its backward pass, including its input."""
        s, c = self.shape, self.compute_bytes
        if s.gated:
            keys = s.query_width if self.eager or self.windowed else s.key_width
            attention, feed_forward = 2 * s.query_width + 2 * keys, 4 * s.intermediate
            # Autocast rounds the input once per product. 3 products follow the first norm and 2 the second, of which
            # `_norm` counts one each.
            attention += 3 * s.hidden if self.autocast else 0
        else:  # queries, keys and values are views of one product; GELU saves four tensors of width I, `down` one
            attention, feed_forward = 4 * s.query_width, 5 * s.intermediate
        if self.rank and self.autocast:
            attention += s.query_width  # the input of the output projection is rounded again
        softmax = c if c == FLOAT or not (s.gated or self.autocast) else FLOAT + c  # computed in float32, then rounded
        statistics = 0 if self.eager else s.heads * FLOAT  # log-sum-exp
        heads = (s.query_width + s.key_width) * (FLOAT + c) + (s.heads + s.groups) * FLOAT if s.head_norm else 0
        low_rank = self.rank * (7 if s.gated else 4) * c  # the input of B, for each matrix
        by_token = 2 * self._norm() + (attention + feed_forward) * c + statistics + heads + low_rank
        return self.tokens * by_token + self.scores(softmax) + self.mask

    def _norm(self) -> int:
        """Return the bytes per token that a norm and the first product after it save."""
        return self._last_norm() + self.shape.hidden * self.compute_bytes

    def _last_norm(self) -> int:
        H, w = self.shape.hidden, self.weight_bytes
        if not self.shape.gated:
            return w * H + 2 * w
        # Its input in float32, and normalised, which only the gradient of its weight reads.
        return (FLOAT + (0 if self.rank else w)) * H + FLOAT

    def _norm_input(self) -> int:
        """Return the bytes per token that a norm saves only for the gradient of its input."""
        return FLOAT * self.shape.hidden + FLOAT if self.shape.gated else 0

    def saved(self, *, checkpointed: bool) -> int:
        """Return the bytes that the whole trunk saves for its backward pass.

        With `checkpointed`, each layer saves only its input. The output of the last norm is not included, because the
        caller stores it.
        """
        layer = self.tokens * self.shape.hidden * self.weight_bytes if checkpointed else self.saved_by_layer()
        angles = 2 * self.columns * self.shape.head_dim * self.weight_bytes if self.shape.gated else self.columns * IDS
        layers = self.shape.layers if self.trained is None else self.trained
        if self.rank or self.trained is not None:
            # Nothing before the first trained layer has a gradient: no embedding and no position. Its first norm saves
            # what the gradient of its weight needs, or nothing with adapters.
            before = 0 if checkpointed else self.tokens * (self._last_norm() if self.rank else self._norm_input())
            angles -= 0 if self.shape.gated else angles
            return layers * layer + self.tokens * self._last_norm() - before + angles
        return self.shape.layers * layer + self.tokens * (self._last_norm() + IDS) + angles

    def forward_room(self) -> int:
        """Return the peak bytes in use in the forward pass of a layer that saves nothing."""
        s, c = self.shape, self.compute_bytes
        # The layer's input, the residual sum, and the normalised sum.
        stream = self.tokens * s.hidden * (2 * self.weight_bytes + c)
        # With adapters also the product with B, and that times the scale.
        feed_forward = self.tokens * (5 if self.rank else 3) * s.intermediate * c
        repeated = 2 * s.query_width if self.eager or self.windowed else 0
        attention = (
            self.tokens * (2 * s.query_width + 2 * s.key_width + repeated) * c + 2 * self.scores(FLOAT) + self.mask
        )
        return stream + max(feed_forward, attention) + self.dequantised

    def backward_room(self, *, checkpointed: bool) -> int:
        """Return the peak bytes in use in the last layer's backward pass, in addition to the saved activations.

        In the feed-forward product, the gradients of both factors and of the product exist at the same time, while the
        saved factors are not yet freed. With eager attention, two gradients of the attention logits exist at the same
        time, after the saved activations of the feed-forward network are freed.
        """
        s, c = self.shape, self.compute_bytes
        product = self.tokens * 2 * s.intermediate * c
        # The gradient of a matrix, or that of the product with B.
        product += self.tokens * s.intermediate * c if self.rank else s.largest_layer_matrix * FLOAT
        attention = 2 * self.scores(FLOAT) - self.tokens * 4 * s.intermediate * c
        again = self.saved_by_layer() if checkpointed else 0
        return again + max(product, attention) + self.tokens * s.hidden * self.weight_bytes + self.dequantised


@dataclass(frozen=True)
class CountedPass(Pass):
    """One pass of a model with recurrent states. Its bytes are counted for one sequence, and grow with the tokens."""

    shape: RecurrentShape

    def _scaled(self, *, checkpointed: bool) -> PassBytes:
        dtype = torch.float32 if self.weight_bytes == FLOAT else torch.bfloat16
        found, columns = self.shape.pass_bytes(self.columns, dtype, eager=self.eager, checkpointed=checkpointed)
        return PassBytes(*(-(-part * self.tokens // columns) for part in (found.forward, found.saved, found.backward)))

    def saved(self, *, checkpointed: bool) -> int:
        """Return the bytes that the whole trunk saves for its backward pass, its output included."""
        return self._scaled(checkpointed=checkpointed).saved

    def forward_room(self) -> int:
        """Return the peak bytes in use in a forward pass that saves nothing."""
        return self._scaled(checkpointed=False).forward

    def backward_room(self, *, checkpointed: bool) -> int:
        """Return the peak bytes in use in the backward pass, in addition to the saved activations."""
        return self._scaled(checkpointed=checkpointed).backward


def pass_through(shape: ModelShape, *sizes: Any) -> Pass:
    """Return the pass through a model of `shape`; `sizes` are the other fields of `Pass`."""
    return CountedPass(shape, *sizes) if isinstance(shape, RecurrentShape) else Pass(shape, *sizes)
