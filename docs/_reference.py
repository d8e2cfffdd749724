"""Tables of the configuration, read from the dataclasses, and of the command line, read from typer's commands."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import typer
import yaml

from docs._tables import table
from rlhf_engine.cli.app import app
from rlhf_engine.config.describe import field_docs, type_words
from rlhf_engine.config.schema import Section
from rlhf_engine.demo.config import DemoRunConfig


def configuration() -> str:
    """Return a heading and a table for every section of the configuration, those of the demo included."""
    return "\n".join(_section(DemoRunConfig(), ""))


def _section(section: Section, path: str) -> Iterator[str]:
    docs, hints = field_docs(type(section)), get_type_hints(type(section), include_extras=True)
    rows, below = [], []
    for item in fields(section):
        name, value, hint = f"{path}{item.name}", getattr(section, item.name), hints[item.name]
        if is_dataclass(hint):
            below.append((name, value, docs[item.name]))
            continue
        rows.append((f"`{name}`", f"`{_as_yaml(value)}`", f"{docs[item.name]} *{type_words(hint)}*"))
    if not path:
        yield "## Top level\n"
    yield table(("key", "default", "meaning, and values"), rows)
    for name, value, doc in below:
        yield f"## {name}\n\n{doc}\n"
        yield from _section(value, f"{name}.")


def _as_yaml(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def command_line() -> str:
    """Return usage, help, arguments and options of every command."""
    return "\n".join(_commands(typer.main.get_command(app), "rlhf"))


def _commands(command: Any, path: str) -> Iterator[str]:
    below = getattr(command, "commands", None)
    if below is not None:
        for name in sorted(below):
            yield from _commands(below[name], f"{path} {name}")
        return
    rows, usage = [], [path]
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        name = f"`{parameter.name.upper()}`" if argument else ", ".join(f"`{option}`" for option in parameter.opts)
        if argument:
            usage.append(parameter.name.upper() if parameter.required else f"[{parameter.name.upper()}]")
        elif parameter.required:
            usage.append(f"{parameter.opts[0]} {parameter.name.upper()}")
        rows.append((name, "required" if parameter.required else _default(parameter), parameter.help or ""))
    usage += ["[OPTIONS]"] if any(p.param_type_name != "argument" and not p.required for p in command.params) else []
    yield f"## {path}\n\n```text\n{' '.join(usage)}\n```\n\n{inspect.cleandoc(command.help or '')}\n"
    if rows:
        yield table(("option", "default", "meaning"), rows)


def _default(parameter: Any) -> str:
    default = parameter.default
    if default is None or default is False or default in ((), ""):
        return ""
    return f"`{default}`"
