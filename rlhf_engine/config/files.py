"""Reading a config from a YAML file and overrides, and writing it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml

from rlhf_engine.config.run import RunConfig
from rlhf_engine.config.schema import shortened
from rlhf_engine.config.yaml_text import MAX_BYTES, MAX_DEPTH, Dumper, parse_yaml

Kind = TypeVar("Kind", bound=RunConfig)

_VARIABLES = ("data.chat_template_kwargs",)
"""Settings whose value is a mapping."""
_DEMO_SECTIONS = ("demo", "figure")
"""Sections of `rlhf_engine.demo.config.DemoRunConfig` that only `rlhf demo` and `rlhf figure` read."""


@overload
def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig: ...


@overload
def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, kind: type[Kind]) -> Kind: ...


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, kind: type[RunConfig] = RunConfig
) -> RunConfig:
    """Read a YAML file, or the defaults if `path` is None, and apply overrides such as `ppo.optim.lr=1e-5` in order.

    `kind` is the class of the config: `RunConfig`, or a subclass with more sections.

    Raises:
        ValueError: the YAML does not parse, a key is unknown, a type is wrong, a value is out of range, or an override has no
            `=`. The message names the file and the key.
    """
    given = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(given, override)
    source = ", ".join(filter(None, [str(path or ""), shortened(" ".join(overrides), 300)]))
    try:
        _refuse_demo(given, kind)
        return kind.from_dict(given)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None


def load_saved_config(path: str | Path) -> RunConfig:
    """Read the config of a checkpoint.

    Raises:
        ValueError: as `load_config`.
    """
    given = _read_yaml(Path(path))
    for name in _DEMO_SECTIONS:
        # Checkpoints of earlier versions, in which RunConfig had these sections, contain them and must resume.
        given.pop(name, None)
    try:
        return RunConfig.from_dict(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def flat_settings(tree: dict[str, Any], leave_out: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting in nested dictionaries, except the keys and sections in `leave_out`."""
    for name, value in tree.items():
        key = prefix + name
        if key in leave_out:
            continue
        if isinstance(value, dict) and key not in _VARIABLES:
            yield from flat_settings(value, leave_out, key + ".")
        else:
            yield key, value


def refuse_overrides(overrides: Sequence[str], decided: Collection[str], who: str) -> None:
    """Raise ValueError if an override sets a key in `decided`; `who` names in the message what sets those keys."""
    for override in overrides:
        tree: dict[str, Any] = {}
        _apply_override(tree, override)
        for key, _ in flat_settings(tree):
            if key in decided:
                raise ValueError(f"override {override!r} is not possible: {who} sets {key}")


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write `config` as YAML that `load_config` reads back to an equal config."""
    Path(path).write_text(yaml.dump(config.to_dict(), Dumper=Dumper, sort_keys=False), encoding="utf-8")


def _refuse_demo(given: dict[str, Any], kind: type[RunConfig]) -> None:
    """Raise ValueError if `given` has a section that only the demo reads and that `kind` does not have."""
    known = {item.name for item in fields(kind)}
    for name in _DEMO_SECTIONS:
        if name in given and name not in known:
            raise ValueError(
                f"{name}: this section belongs to `rlhf demo` and `rlhf figure`, and this command does not read it; remove it"
            )


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: got {path.stat().st_size:,} bytes, expected a config of at most {MAX_BYTES:,}")
    try:
        given = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{path}: got {type(given).__name__}, expected a mapping of keys to values")
    return given or {}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    shown = shortened(repr(override), 200)
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {shown}: expected section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"override {shown}: {error}") from None
    *parents, name = key.split(".")
    if len(parents) > MAX_DEPTH:
        raise ValueError(f"override {shown}: got {len(parents)} sections, expected section.key=value")
    node = tree
    for parent in parents:
        # An unknown section becomes an unknown key, which RunConfig reports by name.
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {shown}: {shortened(repr(parent), 60)} is not a section")
        node = child
    node[name] = value
