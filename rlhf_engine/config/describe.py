"""A config as commented YAML: every field with its docstring, type and default, read from the sources of the dataclasses."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf_engine.config.schema import Section

_WIDTH = 120


def describe(section: Section, defaults: Section, only: str | None = None) -> str:
    """Return YAML that reads back to `section`, with the docstring, type and default of each field in a comment above it.

    With `only`, return the field of that name.
    """
    return "".join(line + "\n" for line in _lines(section, defaults, "", only)).lstrip("\n")


def _lines(section: Section, defaults: Section, indent: str, only: str | None = None) -> Iterator[str]:
    docs, hints = field_docs(type(section)), get_type_hints(type(section), include_extras=True)
    for item in fields(section):
        if only not in (None, item.name):
            continue
        value, default, hint = getattr(section, item.name), getattr(defaults, item.name), hints[item.name]
        if is_dataclass(hint):
            yield ""
            yield from _comment(docs[item.name], indent)
            yield f"{indent}{item.name}:"
            yield from _lines(value, default, indent + "  ")
            continue
        yield from _comment(f"{docs[item.name]} ({type_words(hint)}; default {_as_yaml(default)})", indent)
        yield f"{indent}{item.name}: {_as_yaml(value)}"


@cache
def field_docs(section: type) -> dict[str, str]:
    """Return the docstring of every field of a dataclass, which is the string after the field, with None spelled null."""
    docs: dict[str, str] = {}
    for base in section.__bases__:
        docs |= field_docs(base) if is_dataclass(base) else {}
    source = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(source, ast.ClassDef)
    for statement, following in pairwise(source.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant)
            words = " ".join(inspect.cleandoc(str(following.value.value)).split())
            docs[statement.target.id] = re.sub(r"\bNone\b", "null", words)
    return docs


def type_words(hint: Any) -> str:
    """Return the allowed values of a type hint in words: `float above 0`, `clip | ratio`, `int at least 1, or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{type_words(arguments[0])} {arguments[1]}"
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return f"{type_words(inner)}, or null"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        every = arguments[-1] is Ellipsis
        return f"list of {type_words(arguments[0])}" if every else f"[{', '.join(map(type_words, arguments))}]"
    if origin is dict:
        return "mapping"
    plain: type = hint
    return {str: "text", bool: "true | false"}.get(plain, plain.__name__)


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False):
        yield f"{indent}# {line}"


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
