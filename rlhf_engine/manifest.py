"""The manifest of a checkpoint: a JSON file with the size and the SHA-256 of every other file, and with its own SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_engine import files
from rlhf_engine.files import json_text, read_json, write_json

MANIFEST = "manifest.json"
FILES, SEAL = "files", "sha256"
"""Keys of the manifest: the checksums of the other files, and its own."""

_THREADS = 4


def write_manifest(folder: Path, more: Mapping[str, Any]) -> None:
    """Write the manifest of the files in `folder`, with the entries `more`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter's lock
        digests = list(pool.map(files.disk.digest, paths))
    known = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, SEAL: digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    content = {**more, FILES: known}
    write_json(folder / MANIFEST, {**content, SEAL: _digest(content)})


def foreign_files(folder: Path) -> list[Path]:
    """Return the files in a folder that its manifest does not list, such as a user's notes; none if it has no manifest."""
    try:
        known = read_json(folder / MANIFEST)[FILES]
    except (OSError, ValueError, KeyError):
        return []
    names = {MANIFEST, *known}
    return sorted(path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in names)


def damage(folder: Path) -> str | None:
    """Return a sentence on the first file in `folder` that differs from the manifest, or on the manifest; None if none does."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder}: the file {MANIFEST} is missing"
    try:
        content = read_json(path)
    except ValueError as error:
        return str(error)
    same_text = path.read_text(encoding="utf-8") == json_text(content)
    seal, known = content.pop(SEAL, None), content.get(FILES)
    if not same_text or seal != _digest(content) or not isinstance(known, dict):
        return f"{path}: the content differs from the one that was written (SHA-256)"
    return first_difference(folder, known)


def first_difference(
    folder: Path, known: Mapping[str, Mapping[str, Any]], wanted: Callable[[str], bool] = lambda name: True
) -> str | None:
    """Return a sentence on the first file that differs from its checksum, of the files whose name is `wanted`."""
    names = [name for name in known if wanted(name)]
    for name in names:
        path, size = folder / name, known[name]["bytes"]
        if not path.is_file():
            return f"{folder}: the file {name} is missing"
        if path.stat().st_size != size:
            return f"{path}: got {path.stat().st_size:,} bytes, expected {size:,}; the file is cut or was changed"
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, digest in zip(names, pool.map(files.disk.digest, [folder / name for name in names]), strict=True):
            if digest != known[name][SEAL]:
                return f"{folder / name}: the content differs from the one that was written (SHA-256)"
    return None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
