"""The folders of a stage's checkpoints: the newest one, and the earlier ones that are kept.

The newest is in the stage's folder, such as OUTPUT_DIR/ppo. The kept ones are in OUTPUT_DIR/checkpoints, such as `ppo-12` after
12 updates.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_engine import files
from rlhf_engine.config import CheckpointConfig
from rlhf_engine.files import is_full, read_json, recover
from rlhf_engine.manifest import MANIFEST
from rlhf_engine.notices import notice

TRAINER = "trainer.json"
"""File in a checkpoint with the trainer's state."""
HISTORY = "checkpoints"
"""Folder in OUTPUT_DIR with the earlier checkpoints that are kept."""
DONE, SCORE = "done", "score"
"""Keys in the manifest: number of finished steps, and the value of the metric `checkpoint.best` or null."""


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a stage, the newest first: `folder`, then the earlier ones that were kept."""
    folder = Path(folder)
    recover(folder)
    newest = [folder] if folder.is_dir() and any(folder.iterdir()) else []
    return [*newest, *kept_checkpoints(folder)]


def kept_checkpoints(folder: Path) -> list[Path]:
    """Return the earlier checkpoints that were kept when the one in `folder` was replaced, the newest first."""
    place, name = _history(folder)
    numbers = [path.name.removeprefix(f"{name}-") for path in place.glob(f"{name}-*")]
    return [
        place / f"{name}-{number}" for number in sorted((int(one) for one in numbers if one.isdigit()), reverse=True)
    ]


def _history(folder: Path) -> tuple[Path, str]:
    """Return the folder of the kept checkpoints of a stage, and the first part of their names."""
    folder = folder.resolve() if folder.is_symlink() else folder
    return folder.parent / HISTORY, folder.name.removesuffix(".checkpoint")


class Keeper:
    """Saves checkpoints in `folder` and keeps earlier ones, as the section `checkpoint` of the config asks for."""

    def __init__(self, folder: Path, settings: CheckpointConfig, *, loaded: Path | None = None) -> None:
        self.folder, self.settings = folder, settings
        self.damaged = loaded is not None and loaded != folder
        """Whether the checkpoint in `folder` was found damaged, so that it is not kept."""

    def save(self, write: Callable[[Callable[[Path], object]], None]) -> None:
        """Call `write(retire)`, which replaces the checkpoint; on a full disk, delete the kept ones and try again."""
        try:
            write(self._retire)
        except OSError as error:
            kept = kept_checkpoints(self.folder)
            if not is_full(error) or not kept or not self.folder.exists():
                raise
            notice(f"{error}; the earlier checkpoints in {kept[0].parent} were deleted to save the new one")
            for place in kept:
                files.remove(place)
            write(self._retire)
        self.damaged = False
        self._prune()

    def _retire(self, old: Path) -> None:
        """Move the replaced checkpoint to the kept ones, unless it is damaged or only the newest is kept."""
        if self.damaged or (self.settings.keep == 1 and self.settings.best is None):
            return
        place, name = _history(self.folder)
        done = _record(old).get(DONE)
        if isinstance(done, int):
            place.mkdir(exist_ok=True)
            target = place / f"{name}-{done}"
            if target.exists():
                files.disk.delete(target)
            files.disk.rename(old, target)
            files.disk.sync(place)

    def _prune(self) -> None:
        """Delete the kept checkpoints except the newest and the one with the best score."""
        settings, kept = self.settings, kept_checkpoints(self.folder)
        staying = set(kept[: settings.keep - 1])
        if settings.best is not None:
            scores = {one: _record(one).get(SCORE) for one in (self.folder, *kept)}
            known = {one: score for one, score in scores.items() if isinstance(score, float)}
            if known:
                staying.add(max(known, key=lambda one: known[one]))
        for one in kept:
            if one not in staying:
                files.remove(one)
        _tidy(self.folder)


def clean_up_checkpoints(folder: Path) -> None:
    """Complete or undo what a killed process has begun with the checkpoints of a stage."""
    files.clean_up(folder)
    _tidy(folder)


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoint in `folder` and the earlier ones that were kept."""
    kept = kept_checkpoints(folder)
    for one in reversed(kept):
        files.remove(one)
    _tidy(folder)
    files.remove(folder)


def _tidy(folder: Path) -> None:
    """Delete the rests of kept checkpoints whose deletion was interrupted, and the folder of the kept ones if none is left."""
    place, name = _history(folder)
    for left in place.glob(f"{name}-*.new"):
        files.disk.delete(left)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def _record(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / MANIFEST)
    except (ValueError, OSError):
        return {}  # a damaged checkpoint has no number and no score
