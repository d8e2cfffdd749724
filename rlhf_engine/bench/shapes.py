"""Shapes of a benchmark: named models, the sizes that replace theirs, and the device."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from rlhf_engine.files import read_json
from rlhf_engine.planner import ModelShape
from rlhf_engine.planner.presets import PRESETS

SMALL: dict[str, dict[str, Any]] = {
    "llama-7m": {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 672,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
    },
}
MODELS: dict[str, dict[str, Any]] = SMALL | PRESETS
"""Named models, smallest first: two that train on a CPU, and the planner's."""
DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def one_of(kind: str, name: str, known: Collection[str]) -> str:
    """Return `name` if it is one of `known`.

    Raises:
        ValueError: it is not; the message has the nearest name, if one is similar, and all of them.
    """
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if len(name) < 100 else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {kind} {name[:100]!r}: {hint}expected one of {', '.join(known)}")


def device_of(name: str | None) -> torch.device:
    """Return the device of a benchmark; None: a GPU if torch finds one.

    Raises:
        ValueError: an unknown device, or "cuda" without a GPU.
    """
    found = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if found else "cpu")
    if one_of("device", name, DEVICES) == "cuda" and not found:
        raise ValueError("--device cuda: torch finds no GPU; install a CUDA build of torch, or pass --device cpu")
    return torch.device(name)


def fields_of(model: str) -> dict[str, Any]:
    """Return the fields of `config.json` of a named model, or of the model in a folder.

    Raises:
        ValueError: it is neither.
    """
    if (Path(model) / "config.json").is_file():
        return read_json(Path(model) / "config.json")
    return MODELS[one_of("model", model, MODELS)]


@dataclass(frozen=True)
class Shape:
    """Sizes of the cases of one op: N tokens as B sequences of T positions, hidden size H, vocabulary V."""

    tokens: int
    hidden: int
    vocab: int
    positions: int
    """T, positions per sequence."""
    heads: int = 8
    groups: int = 8
    """Number of key and value heads."""
    head_dim: int = 64

    @classmethod
    def of(cls, model: ModelShape, tokens: int, *, hidden: int | None = None, vocab: int | None = None) -> Self:
        """Return the shape of a model's head for `tokens` tokens; `hidden` and `vocab` replace the model's."""
        for name, value in (("tokens", tokens), ("hidden", hidden), ("vocab", vocab)):
            if value is not None and value < 2:
                raise ValueError(f"--{name}: got {value}, expected at least 2")
        # At least 8 sequences, if there are as many tokens.
        positions = next(
            t for t in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if (tokens % t == 0 and tokens >= 8 * t) or t == 1
        )
        return cls(
            tokens=tokens,
            hidden=hidden or model.hidden,
            vocab=vocab or model.vocab,
            positions=positions,
            heads=model.heads,
            groups=model.groups,
            head_dim=model.head_dim,
        )

    @property
    def sequences(self) -> int:
        """B, number of sequences."""
        return self.tokens // self.positions
