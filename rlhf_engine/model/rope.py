"""Rotary embeddings that depend on the longest position of a pass: one set of factors for a whole run.

transformers chooses the factors of "longrope" and of "dynamic" rope in every forward pass, by its longest position. A short
sequence then gets other log-probs next to a long one, and keys that are cached before the boundary do not match those after it.
Here every pass sees the longest position that the run allows. The model itself is changed, so its own forward pass agrees.
Shapes: B sequences, S positions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_engine.model.pretrained import max_positions

_BY_LENGTH = ("dynamic", "longrope")
"""Rope types whose factors depend on the longest position of a pass."""


def limit_positions(model: PreTrainedModel, longest: int | None) -> None:
    """Fix the factors of rotary embeddings to those of a sequence of `longest` tokens; None: as long as the config allows.

    The first number replaces the config's limit. Later ones count only if they are larger, so that the parts of one run, which
    know of different lengths, agree. Copies of the model, such as a reference, share the limit. Without a rotary embedding that
    depends on the length this does nothing.
    """
    for module in model.modules():
        if not _by_length(getattr(module, "rope_type", None)):
            continue
        held = getattr(module, "longest_position", None)
        if held is None:
            held = _LongestPosition(max_positions(model) or 1)
            module.longest_position = held  # pyright: ignore[reportArgumentType]
            module.register_forward_pre_hook(held.extend, with_kwargs=True)
            module.register_forward_hook(held.cut)
        if longest is not None:
            held.tokens = longest if held.by_config else max(held.tokens, longest)
            held.by_config = False


def _by_length(kind: object) -> bool:
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    return any(name in str(one) for one in kinds for name in _BY_LENGTH)


class _LongestPosition:
    """Hooks of a rotary embedding that append the run's last position to those of a pass, and drop it from the result."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.by_config = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _LongestPosition:
        return self

    def extend(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Append the last position to the argument `position_ids`, [B, S]."""
        if getattr(module, "fixed_for", self.tokens) != self.tokens:
            _forget(module)
        module.fixed_for = self.tokens  # pyright: ignore[reportArgumentType]
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._longer(kwargs["position_ids"])}
        hidden, positions, *rest = args
        return (hidden, self._longer(positions), *rest), kwargs

    def cut(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Drop the last position from cosines and sines, [B, S, D], or from complex numbers of that shape."""
        if isinstance(output, Tensor):
            return output[..., :-1, :]
        return tuple(one[..., :-1, :] for one in output)

    def _longer(self, positions: Tensor) -> Tensor:
        return nn.functional.pad(positions, (0, 1), value=self.tokens - 1)


def _forget(module: nn.Module) -> None:
    """Drop the factors that "dynamic" rope keeps of the longest pass so far, so that the next pass computes them again."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        current = name.replace("original_inv_freq", "inv_freq")
        cached = current.replace("inv_freq", "max_seq_len_cached")
        if current != name and hasattr(module, cached):
            getattr(module, current).copy_(buffer)
            setattr(module, cached, module.original_max_seq_len)
