"""What a trunk's passes hold: tensors that the backward pass reads again, and room for the work under way.

Counted from the layers as transformers writes them and from what autograd saves of each operation; a test compares the counts
with the tensors that autograd really saved. Legend: N tokens, H hidden, I intermediate, A query width, K key width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_engine.planner.model_shape import ModelShape

FLOAT, IDS = torch.float32.itemsize, torch.int64.itemsize
"""Bytes of a float32 number and of a token's id."""


@dataclass(frozen=True)
class Pass:
    """One pass of `rows` sequences of at most `columns` tokens through a trunk."""

    shape: ModelShape
    rows: int
    columns: int
    eager: bool
    """Whether attention makes its scores as a tensor."""
    weight_bytes: int
    """Of a number in the weights, and so in the stream of hidden states."""
    compute_bytes: int
    """Of a number in a matrix product; differs from `weight_bytes` under autocast."""
    count: int | None = None
    """Tokens of all sequences where they are of several lengths; None: `rows * columns`."""

    @property
    def tokens(self) -> int:
        return self.rows * self.columns if self.count is None else self.count

    @property
    def windowed(self) -> bool:
        """Whether fused attention reads a mask, and so keys and values repeated for each query head."""
        return not self.eager and self.shape.window is not None and self.columns > self.shape.window

    @property
    def mask(self) -> int:
        """Bytes of that mask in one layer."""
        return self.tokens * self.columns * self.compute_bytes if self.windowed else 0

    def scores(self, size: int) -> int:
        """Bytes of one layer's attention scores in numbers of `size` bytes, where they exist."""
        return self.tokens * self.shape.heads * self.columns * size if self.eager else 0

    @property
    def autocast(self) -> bool:
        return self.compute_bytes < self.weight_bytes

    def saved_by_layer(self) -> int:
        """Bytes that one layer keeps for its backward pass, its input among them."""
        s, c = self.shape, self.compute_bytes
        if s.gated:
            keys = s.query_width if self.eager or self.windowed else s.key_width
            attention, feed_forward = 2 * s.query_width + 2 * keys, 4 * s.intermediate
            # Autocast rounds the input of a product once for each product: 3 and 2 of them behind a norm, one counted there.
            attention += 3 * s.hidden if self.autocast else 0
        else:  # queries, keys and values are views of one product; GELU's formula keeps four widths, `down` one
            attention, feed_forward = 4 * s.query_width, 5 * s.intermediate
        softmax = c if c == FLOAT or not (s.gated or self.autocast) else FLOAT + c  # made in float32, then rounded
        statistics = 0 if self.eager else s.heads * FLOAT  # log-sum-exp
        heads = (s.query_width + s.key_width) * (FLOAT + c) + (s.heads + s.groups) * FLOAT if s.head_norm else 0
        by_token = 2 * self._norm() + (attention + feed_forward) * c + statistics + heads
        return self.tokens * by_token + self.scores(softmax) + self.mask

    def _norm(self) -> int:
        """Bytes a token that a norm and the first product behind it keep."""
        return self._last_norm() + self.shape.hidden * self.compute_bytes

    def _last_norm(self) -> int:
        H, w = self.shape.hidden, self.weight_bytes
        if not self.shape.gated:
            return w * H + 2 * w
        return (FLOAT + w) * H + FLOAT  # its input in float32, and normalised

    def saved(self, *, checkpointed: bool) -> int:
        """Bytes that the whole trunk keeps for its backward pass; checkpointed, each layer keeps its input alone.

        The output of the last norm is the caller's.
        """
        layer = self.tokens * self.shape.hidden * self.weight_bytes if checkpointed else self.saved_by_layer()
        angles = 2 * self.columns * self.shape.head_dim * self.weight_bytes if self.shape.gated else self.columns * IDS
        return self.shape.layers * layer + self.tokens * (self._last_norm() + IDS) + angles

    def forward_room(self) -> int:
        """Bytes in use at the fullest moment of a layer that keeps nothing."""
        s, c = self.shape, self.compute_bytes
        stream = self.tokens * s.hidden * (2 * self.weight_bytes + c)  # the layer's input, the sum so far, normalised
        feed_forward = self.tokens * 3 * s.intermediate * c
        repeated = 2 * s.query_width if self.eager or self.windowed else 0
        attention = (
            self.tokens * (2 * s.query_width + 2 * s.key_width + repeated) * c + 2 * self.scores(FLOAT) + self.mask
        )
        return stream + max(feed_forward, attention)

    def backward_room(self, *, checkpointed: bool) -> int:
        """Bytes in use beyond what was saved, at the fullest moment of the last layer's backward pass.

        The gradients of the two factors of the feed-forward product meet the gradient of the product while what was saved
        for them is still there; with eager attention two gradients of its scores do, when the feed-forward's share is gone.
        """
        s, c = self.shape, self.compute_bytes
        product = self.tokens * 2 * s.intermediate * c + s.largest_layer_matrix * FLOAT
        attention = 2 * self.scores(FLOAT) - self.tokens * 4 * s.intermediate * c
        again = self.saved_by_layer() if checkpointed else 0
        return again + max(product, attention) + self.tokens * s.hidden * self.weight_bytes
