"""What reads the fields of a family's config: the model's own code, this engine, or nothing.

The engine runs a model's own trunk, so a field that the trunk's code reads has its effect. The engine replaces the output
layer, the loss and the cache. A field that the class of the causal LM reads in its forward pass must therefore be read here
too.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import rlhf_engine
import rlhf_kernels
from benchmarks.families.configs import FAMILIES

HARMLESS: dict[str, str] = {}
"""Fields without a reader, and why they have no effect here."""

_SOURCES = "\n".join(
    path.read_text()
    for package in (rlhf_engine, rlhf_kernels)
    for path in Path(str(package.__file__)).parent.rglob("*.py")
)


def fields_of(family: str) -> list[str]:
    """Return the fields that a family's config class defines in addition to those of every config."""
    kind = getattr(transformers, FAMILIES[family][0])
    own = {
        name
        for base in kind.__mro__
        if issubclass(base, PreTrainedConfig)
        for name in vars(base).get("__annotations__", {})
    }
    return sorted(name for name in own - set(PreTrainedConfig.__annotations__) if not name.startswith("_"))


def read_by_engine(field: str) -> bool:
    """Return whether code of the engine or of the kernels names a field."""
    return re.search(rf"[\"'.]{re.escape(field)}\b", _SOURCES) is not None


def read_by_model(model: PreTrainedModel, field: str) -> bool:
    """Return whether the code of a model, its config or transformers' rotary embeddings reads a field, by any of its names."""
    kind = type(model.config)
    names = {field, *(ours for ours, theirs in kind.attribute_map.items() if theirs == field)}
    modules = {type(model).__module__, "transformers.modeling_rope_utils"}
    modules |= {
        type(module).__module__ for module in model.modules() if type(module).__module__.startswith("transformers")
    }
    source = "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(modules))
    methods = inspect.getsource(kind).split("def ", 1)[1:]
    return any(re.search(rf"\b(config|cfg|\w+_config)\.{one}\b|[\"']{one}[\"']", source) for one in names) or any(
        re.search(rf"self\.{one}\b", text) for one in names for text in methods
    )


def read_after_the_trunk(model: PreTrainedModel) -> set[str]:
    """Return the fields that the forward pass of the causal LM reads outside of its trunk."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward))))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
            text = ast.unparse(node)
            if text.startswith(("self.config.", "self.")):
                found.add(node.attr)
    fields = set(vars(type(model.config)).get("__annotations__", {}))
    return found & fields


def unread(model: PreTrainedModel, family: str) -> list[str]:
    """Return the fields of a family's config that nothing reads and that are not declared harmless."""
    return [
        name
        for name in fields_of(family)
        if name not in HARMLESS and not read_by_engine(name) and not read_by_model(model, name)
    ]
