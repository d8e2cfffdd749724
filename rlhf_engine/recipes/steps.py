"""Steps of a long run that are each done once: a JSON file records the finished steps, their results and settings."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rlhf_engine.config import RunConfig, flat_settings
from rlhf_engine.files import read_json, with_new_file, write_json


class Steps:
    """Record of the finished steps in `path`; a repeated call runs only the missing ones.

    `may_change` are keys and sections of the config that may always differ between calls. Any other setting may change until
    a finished step has read it, so that a failed step can be tried again with different settings.

    Raises:
        ValueError: a setting differs from the value that a finished step has read, and the message names the first one; or
            `path` is not such a record.
    """

    def __init__(self, path: Path, config: RunConfig, may_change: Collection[str]) -> None:
        self.path, self.may_change = path, may_change
        self.settings = dict(flat_settings(config.to_dict(), may_change))
        self.read: dict[str, dict[str, Any]] = {}
        self.results: dict[str, Any] = {}
        if path.is_file():
            self._read()

    def once(self, name: str, run: Callable[[], Any], reads: Collection[str] | None = None) -> Any:
        """Return the result of step `name`, which must be serialisable as JSON; call `run` only if there is no result yet.

        `reads` are the keys and sections of the config that the step depends on (None: all of them).
        """
        if name not in self.results:
            self.results[name] = run()
            self.read[name] = {
                key: value for key, value in self.settings.items() if reads is None or is_among(key, reads)
            }
            content = {"settings": self.read, "steps": self.results}
            with_new_file(self.path, lambda new: write_json(new, content))
        return self.results[name]

    def __contains__(self, name: str) -> bool:
        return name in self.results

    def _read(self) -> None:
        kept = read_json(self.path)
        read, results = kept.get("settings"), kept.get("steps")
        if not isinstance(read, dict) or not isinstance(results, dict) or list(read) != list(results):
            raise ValueError(
                f"{self.path}: expected a JSON object whose settings and steps have the same names; move it away"
            )
        self.read, self.results = read, results
        for name, settings in self.read.items():
            for key, value in settings.items():
                if not is_among(key, self.may_change) and self.settings.get(key) != value:
                    raise ValueError(
                        f"{key}: got {self.settings.get(key)!r}, expected {value!r} to go on with the run of {self.path}, "
                        f"whose step {name!r} has read it"
                    )


def is_among(key: str, names: Collection[str]) -> bool:
    """Return whether a dotted key is one of `names` or belongs to a section in `names`."""
    return any(key == name or key.startswith(name + ".") for name in names)
