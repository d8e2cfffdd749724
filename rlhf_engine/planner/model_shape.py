"""The sizes of a model that decide its memory: the shape of every weight, without allocating one.

Legend: V vocabulary, H hidden, I intermediate, A query width (heads x head size), K key width (groups x head size).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from rlhf_engine.files import read_json, read_model_config, require
from rlhf_engine.model.trunk import input_layer, output_layer
from rlhf_engine.planner.presets import PRESETS
from rlhf_engine.planner.skeleton import MOST_COLUMNS, PassBytes, Skeleton
from rlhf_engine.rollout.decode import is_recurrent

_FIELDS = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size", "n_embd"),
    "intermediate": ("intermediate_size", "n_inner"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "positions": ("max_position_embeddings", "n_positions"),
}
"""Sizes that the config of every architecture must define, and their names in it."""

_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"gated": False},
    "granite": {},
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True, "output_bias": False},
    "qwen3": {"head_norm": True},
}
"""Architectures whose layers are known, and their properties that are not in the config."""

OUTSIDE = ("embedding", "place", "norm", "norm_bias")
"""Weights of `ModelShape.trunk` outside the layers."""

UNLIMITED = 2**31
"""Positions of a model whose config does not limit them."""


class UnknownMemoryError(ValueError):
    """A model or an objective whose memory cannot be planned."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model: norm, attention, norm, gated feed-forward (GPT-2's: not gated, learned positions)."""

    model_type: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    """Number of key and value heads."""
    head_dim: int
    positions: int
    """Longest sequence that the model supports."""
    tied: bool
    """Whether the language-model head shares the weight of the embedding."""
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    """Whether queries and keys are normalised in each head."""
    window: int | None = None
    """Columns that sliding-window attention reads; None: all."""

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of the keys of all heads, and of the values."""
        return self.groups * self.head_dim

    @property
    def kv_numbers(self) -> int:
        """Numbers per token of the keys and values of all layers."""
        return 2 * self.layers * self.key_width

    def trunk(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight except the language-model head.

        The shape of a layer's weight begins with the number of layers.
        """
        H, I, A, K, L = self.hidden, self.intermediate, self.query_width, self.key_width, self.layers
        if not self.gated:
            matrices = {"attention": (A + 2 * K, H), "output": (H, A), "up": (I, H), "down": (H, I)}
            vectors = {"attention_bias": A + 2 * K, "output_bias": H, "up_bias": I, "down_bias": H}
            vectors |= {name: H for name in ("norm_1", "norm_1_bias", "norm_2", "norm_2_bias")}
            outside = {"embedding": (self.vocab, H), "place": (self.positions, H), "norm": (H,), "norm_bias": (H,)}
        else:
            matrices = {"query": (A, H), "key": (K, H), "value": (K, H), "output": (H, A)}
            matrices |= {"gate": (I, H), "up": (I, H), "down": (H, I)}
            vectors = {"norm_1": H, "norm_2": H}
            if self.qkv_bias:
                vectors |= {"query_bias": A, "key_bias": K, "value_bias": K}
            if self.output_bias:
                vectors |= {"output_bias": H}
            if self.mlp_bias:
                vectors |= {"gate_bias": I, "up_bias": I, "down_bias": H}
            if self.head_norm:
                vectors |= {"query_norm": self.head_dim, "key_norm": self.head_dim}
            outside = {"embedding": (self.vocab, H), "norm": (H,)}
        layers = {name: (L, *shape) for name, shape in matrices.items()}
        return outside | layers | {name: (L, size) for name, size in vectors.items()}

    def top(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the top `count` layers, the last norm and an untied head, which `train_top` trains."""
        layers = {name: (count, *shape[1:]) for name, shape in self.trunk().items() if name not in OUTSIDE}
        norm = {name: shape for name, shape in self.trunk().items() if name.startswith("norm") and name in OUTSIDE}
        return layers | norm | self.head()

    def head(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the language-model head; empty if it is tied."""
        return {} if self.tied else {"head": (self.vocab, self.hidden)}

    @property
    def trunk_parameters(self) -> int:
        """Number of weights without the language-model head."""
        return _numbers(self.trunk().values())

    @property
    def parameters(self) -> int:
        """Number of weights of the causal LM; a tied weight counts once."""
        return self.trunk_parameters + _numbers(self.head().values())

    @property
    def largest_layer_matrix(self) -> int:
        """Elements of the largest matrix within a layer."""
        inside = ("attention", "query", "output", "gate", "up", "down")
        return max(math.prod(shape[1:]) for name, shape in self.trunk().items() if name in inside)

    @property
    def layer_matrices(self) -> int:
        """Elements of all matrices within layers, which autocast copies."""
        return _numbers(self.matrices())

    def matrices(self) -> list[tuple[int, ...]]:
        """Return the shapes of the matrices within layers, which begin with their number."""
        return [shape for shape in self.trunk().values() if len(shape) == 3]

    @classmethod
    def of(cls, model: str, key: str = "model") -> ModelShape:
        """Return the shape of a model.

        Args:
            model: the name of a preset, or a folder with a `config.json`.
            key: the name of the setting for error messages.

        Raises:
            ValueError: `model` is neither, or the config is invalid.
            UnknownMemoryError: the plan does not know the architecture.
        """
        if model in PRESETS:
            return cls.from_fields(PRESETS[model], model)
        folder = Path(model)
        if not folder.is_dir():
            raise ValueError(
                f"{key}: got {model!r}, expected a folder with a config.json, or one of {', '.join(PRESETS)}"
            )
        require(folder, "config.json")
        source, content = str(folder / "config.json"), read_json(folder / "config.json")
        # Checked before transformers divides by one of them.
        counts = (name for names in _FIELDS.values() for name in names if isinstance(content.get(name), int))
        _check_sizes({name: content[name] for name in counts}, source)
        try:
            config = read_model_config(folder)
        except ValueError as error:
            if content.get("model_type") in list(_FAMILIES):
                raise
            raise UnknownMemoryError(f"{error}; {_needed()}") from None
        return cls.from_config(config, source)

    @classmethod
    def from_fields(cls, fields: dict[str, Any], source: str = "config") -> ModelShape:
        """Return the shape that `fields` of a config.json describe; other fields have transformers' defaults."""
        rest = {name: value for name, value in fields.items() if name != "model_type"}
        return cls.from_config(AutoConfig.for_model(fields["model_type"], **rest), source)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, source: str = "config") -> ModelShape:
        """Return the shape of the model that transformers builds from `config`.

        Args:
            config: the config of a causal LM.
            source: the name of the config for error messages.

        Raises:
            ValueError: a size is invalid.
            UnknownMemoryError: the plan does not know the architecture. The message names the fields that it needs.
        """
        text = config.get_text_config()
        kind = text.model_type
        found = {ours: _first(text, theirs) for ours, theirs in _FIELDS.items()}
        if kind == "gpt2" and found["intermediate"] is None and found["hidden"] is not None:
            found["intermediate"] = 4 * found["hidden"]
        if is_recurrent(config):
            return RecurrentShape.count_of(config, found, source)
        missing = ["/".join(_FIELDS[name]) for name, value in found.items() if value is None]
        if kind not in _FAMILIES or missing:
            lacks = f" without {', '.join(missing)}" if missing else ""
            raise UnknownMemoryError(
                f"{source}: got model_type {kind!r}{lacks}, whose layers the plan does not know; {_needed()}"
            )
        sizes = {name: value for name, value in found.items() if value is not None}
        heads, hidden = sizes["heads"], sizes["hidden"]
        _check_sizes({"/".join(_FIELDS[name]): value for name, value in found.items()}, source)
        windowed = kind == "mistral" or getattr(text, "use_sliding_window", False)
        traits = {
            "qkv_bias": bool(getattr(text, "attention_bias", False)),
            "output_bias": bool(getattr(text, "attention_bias", False)),
            "mlp_bias": bool(getattr(text, "mlp_bias", False)),
            "window": getattr(text, "sliding_window", None) if windowed else None,
        }
        groups, head_dim = (getattr(text, name, None) for name in ("num_key_value_heads", "head_dim"))
        groups = heads if groups is None else groups
        head_dim = hidden // heads if head_dim is None else head_dim
        _check_sizes({"num_key_value_heads": groups, "head_dim": head_dim, "sliding_window": traits["window"]}, source)
        if heads % groups:
            raise ValueError(f"{source}: num_key_value_heads: got {groups}, expected a divisor of {heads}, the heads")
        return cls(
            model_type=kind,
            groups=groups,
            head_dim=head_dim,
            tied=bool(text.tie_word_embeddings),
            **sizes,
            **traits | _FAMILIES[kind],
        )


@dataclass(frozen=True)
class RecurrentShape(ModelShape):
    """A language model with recurrent states, whose sizes are counted in a model without data."""

    config: PreTrainedConfig | None = field(default=None, repr=False, compare=False)
    skeletons: dict[Any, Skeleton] = field(default_factory=dict, repr=False, compare=False)
    counts: dict[Any, PassBytes] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def count_of(cls, config: PreTrainedConfig, found: dict[str, int | None], source: str) -> RecurrentShape:
        """Return the shape of the model that transformers builds from `config`, with sizes `found` in it.

        Raises:
            UnknownMemoryError: the model has experts, whose memory depends on the data.
        """
        text = config.get_text_config()
        kind, hidden, vocab = text.model_type, found["hidden"], found["vocab"]
        assert hidden is not None and vocab is not None
        heads = found["heads"] or 1
        shape = cls(
            model_type=kind,
            vocab=vocab,
            hidden=hidden,
            intermediate=found["intermediate"] or hidden,
            layers=text.num_hidden_layers,
            heads=heads,
            groups=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            positions=found["positions"] or UNLIMITED,
            tied=bool(text.tie_word_embeddings),
            config=config,
        )
        if any(x.dim() == 3 and x.shape[1] > 1 for x in shape.skeleton(torch.float32).model.parameters()):
            raise UnknownMemoryError(
                f"{source}: got model_type {kind!r} with experts, the memory of whose products depends on the data; "
                "unset memory.budget to run without a plan"
            )
        return shape

    def skeleton(self, dtype: torch.dtype, *, eager: bool = False, checkpointed: bool = False) -> Skeleton:
        """Return the model without data."""
        key = dtype, eager, checkpointed
        if key not in self.skeletons:
            assert self.config is not None
            self.skeletons[key] = Skeleton(self.config, dtype, eager=eager, checkpointed=checkpointed)
        return self.skeletons[key]

    def pass_bytes(self, columns: int, dtype: torch.dtype, *, eager: bool, checkpointed: bool) -> tuple[PassBytes, int]:
        """Return the bytes of a pass over one sequence, and its tokens, of which there are at most `columns`."""
        columns = columns if eager else min(columns, MOST_COLUMNS)
        key = columns, dtype, eager, checkpointed
        if key not in self.counts:
            self.counts[key] = self.skeleton(dtype, eager=eager, checkpointed=checkpointed).count(columns)
        return self.counts[key], columns

    def trunk(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight except the language-model head; a matrix within layers begins with 1."""
        model, shapes = self.skeleton(torch.float32).model, {}
        embedding, head = input_layer(model).weight, output_layer(model).weight
        for name, parameter in model.named_parameters():
            if parameter is head and not self.tied:
                continue
            inside = parameter.dim() == 2 and parameter is not embedding
            shapes[name] = (1, *parameter.shape) if inside else tuple(x for x in parameter.shape if x > 1) or (1,)
        return shapes

    def top(self, count: int) -> dict[str, tuple[int, ...]]:
        """Raise UnknownMemoryError: layers of different kinds have different sizes, which are not counted one by one."""
        raise UnknownMemoryError(
            f"model.train_layers: got {count} with the recurrent model_type {self.model_type!r}, of which the plan knows only "
            "the whole; unset memory.budget to run without a plan"
        )


def _check_sizes(sizes: dict[str, int | None], source: str) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{source}: {name}: got {size}, expected at least 1")


def _numbers(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _needed() -> str:
    fields = ", ".join("/".join(names) for names in _FIELDS.values())
    return f"expected one of {', '.join(_FAMILIES)} with {fields}"
