"""Steps of a long run, each done once: what is done, and with which result, is in a JSON file that is whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_engine.config import RunConfig
from rlhf_engine.files import read_json, with_new_file, write_json


class Steps:
    """The steps in `path`; a run that is called again does only those that are missing.

    `may_change` are keys and sections of the config that a later call may have otherwise. Raises ValueError naming the first
    other setting that is not what the run began with.
    """

    def __init__(self, path: Path, config: RunConfig, may_change: frozenset[str]) -> None:
        self.path = path
        self.settings = dict(_settings(config.to_dict(), may_change))
        self.results: dict[str, Any] = {}
        if path.is_file():
            self._read()

    def once(self, name: str, run: Callable[[], Any]) -> Any:
        """The result of step `name`, which must be what JSON can hold; `run` is called only where it has none yet."""
        if name not in self.results:
            self.results[name] = run()
            content = {"settings": self.settings, "steps": self.results}
            with_new_file(self.path, lambda new: write_json(new, content))
        return self.results[name]

    def __contains__(self, name: str) -> bool:
        return name in self.results

    def _read(self) -> None:
        kept = read_json(self.path)
        before, self.results = kept.get("settings"), kept.get("steps")
        if not isinstance(before, dict) or not isinstance(self.results, dict):
            raise ValueError(f"{self.path}: expected an object with settings and steps")
        for key, value in self.settings.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{key}: got {value!r}, expected {before.get(key)!r} to go on with the run of {self.path}"
                )


def _settings(tree: dict[str, Any], may_change: frozenset[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = prefix + name
        if key in may_change:
            continue
        if isinstance(value, dict):
            yield from _settings(value, may_change, key + ".")
        else:
            yield key, value
