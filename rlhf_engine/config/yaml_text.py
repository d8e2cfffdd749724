"""Parsing of YAML with bounds on size, depth and expansion, so that a damaged or hostile text is refused quickly."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from rlhf_engine.config.schema import shortened

MAX_BYTES = 100_000
MAX_DEPTH = 20
MAX_NODES = 20_000
"""Scalars, lists and mappings in a text, where each use of an alias counts the nodes that it repeats."""
MAX_DIGITS = 1_000

_ERRORS = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)
"""Exceptions of PyYAML for a text that is not YAML, or whose scalars do not fit their tags, such as `!!bool x`."""


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML 1.1 text. `1e-5` is a number, as in YAML 1.2 and unlike in PyYAML.

    Raises:
        ValueError: the text is not valid, has a duplicate key, exceeds a bound of this module, or contains itself.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ValueError(f"got {len(text):,} characters of YAML, expected at most {MAX_BYTES:,} bytes")
    try:
        return yaml.load(text, Loader=_Loader)
    except _ERRORS as error:
        kind = "" if isinstance(error, yaml.YAMLError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"not valid YAML: {kind}{shortened(' '.join(str(error).split()), 300)}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's reader with bounds; a duplicate key is an error, because its first value would be lost."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}
        """Nodes in each composed node, by its id; a node that is not finished is missing."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; raise YAMLError beyond the bounds, and for an alias of a node that contains it."""
        mark = self.peek_event().start_mark
        if self.depth == MAX_DEPTH:
            raise ComposerError(None, None, f"got more than {MAX_DEPTH} levels of lists and mappings", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and id(node) not in self.sizes:
            raise ComposerError(None, None, "got an alias of a value that contains it", mark)
        if not is_alias:
            self.sizes[id(node)] = 1 + sum(self.sizes[id(child)] for child in _children(node))
        if max(self.sizes[id(node)], len(self.sizes)) > MAX_NODES:
            raise ComposerError(None, None, f"got more than {MAX_NODES:,} values with all aliases replaced", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping; raise YAMLError for a duplicate key."""
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise ConstructorError(
                    None, None, f"the key {shortened(repr(name), 60)} appears twice; remove one", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        """Return the text of a scalar; raise YAMLError for a number of too many digits."""
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_DIGITS:
            raise ConstructorError(None, None, f"got a number of {len(node.value):,} characters", node.start_mark)
        return super().construct_scalar(node)


_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(*_FLOAT)


class Dumper(yaml.SafeDumper):
    """Writes YAML that this module reads as it was: a text such as 1e+25, which would be a number, is quoted."""


Dumper.add_implicit_resolver(*_FLOAT)


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
