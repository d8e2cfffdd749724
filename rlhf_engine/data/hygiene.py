"""Prompt hygiene as InstructGPT describes it (Ouyang et al. 2022, section 3.2), one prompt at a time, with a report.

1. deduplicate: a prompt that shares a long prefix with a kept one is dropped;
2. user_limit: a user's first 200 prompts stay, those after them are dropped;
3. split: each user belongs to train, validation or test by a hash of the user's id, whatever `split` the file gives;
4. pii: training prompts with personal information are dropped, or lose it;
5. truncate: with a tokenizer, long prompts lose their beginning.

Deduplication comes first and looks at all prompts, so a prompt in validation or test has no near copy in train.

"A long prefix": of each prompt the first `prefix_chars` characters count after NFKC, case folding and with white space
collapsed, and prompts with the same ones are the same; a shorter prompt has to be the same as a whole. So being the same
is an equivalence, which of two comes first decides only who stays, and one look-up of a 128-bit hash replaces the
comparison with every kept prompt: linear in the number of prompts, however many share a template. (No comparison follows
the look-up: among 10^9 prompts, two with the same hash have odds of 10^-21.) For a conversation all its turns are one text.

Records are read, judged and written one by one in the order of the file, and what must be remembered lies in an index on
disk, so memory does not grow with the file and the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf_engine.config import HygieneConfig
from rlhf_engine.data.loading import read_prompts
from rlhf_engine.data.records import Prompt, PromptRecord, prompt_field, prompt_texts, with_texts
from rlhf_engine.data.tokenize import Codec
from rlhf_engine.files import with_new_folder, write_json

PROMPTS, REPORT = "prompts.jsonl", "report.json"
_EXAMPLES = 20  # bad lines that the report quotes


@dataclass
class Step:
    """One step of the pipeline and what it did so far."""

    name: str
    """What the report calls it."""
    apply: Callable[[PromptRecord], PromptRecord | None]
    """The record as it goes on, or None to drop it."""
    seen: int = 0
    """Prompts that came to it."""
    dropped: int = 0
    """Prompts that went no further."""
    changed: int = 0
    """Prompts whose text went on changed."""

    def __call__(self, record: PromptRecord) -> PromptRecord | None:
        """Apply it and count."""
        self.seen += 1
        result = self.apply(record)
        if result is None:
            self.dropped += 1
        elif result.prompt is not record.prompt:
            self.changed += 1
        return result


@dataclass
class HygieneReport:
    """How many prompts came, what each step did to them and where they went."""

    read: int = 0
    """Prompts that could be read."""
    users: int = 0
    """Users with at least one prompt after deduplication."""
    bad_lines: int = 0
    """Lines that were skipped because they hold no prompt."""
    bad_examples: list[str] = field(default_factory=list)
    """What was wrong with the first of them."""
    steps: list[Step] = field(default_factory=list)
    """The steps in their order."""
    pii: Counter[str] = field(default_factory=Counter)
    """Training prompts with each kind of personal information; one may have several."""
    splits: Counter[str] = field(default_factory=Counter)
    """Prompts written to each split."""
    warnings: list[str] = field(default_factory=list)
    """What a later stage may miss."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        names = ("name", "seen", "dropped", "changed")
        return {
            **{name: getattr(self, name) for name in ("read", "users", "bad_lines", "bad_examples")},
            "steps": [{name: getattr(step, name) for name in names} for step in self.steps],
            "pii": dict(sorted(self.pii.items())),
            "splits": {split: self.splits[split] for split in ("train", "validation", "test")},
            "warnings": self.warnings,
        }

    def table(self) -> str:
        """The same for people to read."""
        lines = [f"{'step':14}{'seen':>12}{'dropped':>12}{'changed':>12}{'left':>12}"]
        lines.append(f"{'read':14}{self.read + self.bad_lines:12,}{self.bad_lines:12,}{0:12,}{self.read:12,}")
        for step in self.steps:
            left = step.seen - step.dropped
            lines.append(f"{step.name:14}{step.seen:12,}{step.dropped:12,}{step.changed:12,}{left:12,}")
        counts = self.to_dict()
        for title in ("splits", "pii"):
            lines.append(f"{title}: " + (", ".join(f"{name} {n:,}" for name, n in counts[title].items()) or "none"))
        return "\n".join([*lines, *self.bad_examples, *(f"warning: {warning}" for warning in self.warnings)])


def clean_prompts(
    source: str | Path, folder: str | Path, settings: HygieneConfig, codec: Codec | None = None
) -> HygieneReport:
    """Read the prompts of `source` and write those that pass to `folder/prompts.jsonl`, the counts to report.json.

    `read_prompts` reads what it writes. With a `codec` long prompts are truncated to its `max_prompt_tokens`.

    Raises:
        ValueError: a bad line, named as `file:line`, unless `settings.bad_lines` is "skip"; no prompt at all; a
            `folder` with other files in it, which would be lost.
        OSError: a full disk.
    """
    folder, given = Path(folder), Path(source)
    if folder.resolve() in given.resolve().parents:
        raise ValueError(f"{folder}: holds the prompts to read, expected another folder")
    if folder.exists() and (not folder.is_dir() or {item.name for item in folder.iterdir()} - {PROMPTS, REPORT}):
        raise ValueError(
            f"{folder}: exists and holds something else than {PROMPTS} and {REPORT}, expected a new folder"
        )
    report = HygieneReport()
    records = read_prompts(source, on_bad=_skip(report) if settings.bad_lines == "skip" else None)

    def write(new: Path) -> None:
        try:
            _write(new, records, settings, report, codec, given)
        except sqlite3.Error as error:
            raise OSError(f"{new}: the index on disk fails: {error}") from None

    with_new_folder(folder, write)
    return report


def _write(
    folder: Path,
    records: Iterator[PromptRecord],
    settings: HygieneConfig,
    report: HygieneReport,
    codec: Codec | None,
    source: Path,
) -> None:
    with KeptIndex(folder / "index.sqlite") as index, (folder / PROMPTS).open("w", encoding="utf-8") as out:
        report.steps = _steps(settings, index, report, codec)
        for record in _run(records, report, source):
            out.write(json.dumps(_fields(record), ensure_ascii=False) + "\n")
        report.users = index.users()
    if not report.read:
        raise ValueError(f"{source}: got no prompts, expected at least one")
    report.warnings = [
        _empty(split, report) for split, share in _shares(settings) if share and not report.splits[split]
    ]
    write_json(folder / REPORT, {"source": str(source), "settings": settings.to_dict(), **report.to_dict()})


def prefix_key(prompt: Prompt, prefix_chars: int) -> bytes:
    """16 bytes that two prompts share if their first `prefix_chars` normalised characters are the same."""
    text = "\n".join(prompt_texts(prompt))
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    normal = " ".join(text.casefold().split())
    return hashlib.blake2b(normal[:prefix_chars].encode(), digest_size=16).digest()


def split_of(user_id: str, settings: HygieneConfig) -> str:
    """train, validation or test: the same for all prompts of a user, in every file and every run."""
    digest = hashlib.blake2b(user_id.encode(), digest_size=8, salt=settings.split_seed.to_bytes(16, "little")).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < settings.test_share:
        return "test"
    return "validation" if place < settings.test_share + settings.validation_share else "train"


def _shares(settings: HygieneConfig) -> list[tuple[str, float]]:
    held_out = settings.validation_share + settings.test_share
    return [("train", 1.0 - held_out), ("validation", settings.validation_share), ("test", settings.test_share)]


def _empty(split: str, report: HygieneReport) -> str:
    return (
        f"no prompt is left in {split}, of {report.users:,} users in all; data.hygiene.{{validation_share,test_share}} are "
        "shares of the users, and another data.hygiene.split_seed draws others"
    )


def _steps(settings: HygieneConfig, index: KeptIndex, report: HygieneReport, codec: Codec | None) -> list[Step]:
    def deduplicate(record: PromptRecord) -> PromptRecord | None:
        return record if index.add_key(prefix_key(record.prompt, settings.prefix_chars)) else None

    def limit(record: PromptRecord) -> PromptRecord | None:
        return record if index.add_prompt(record.user_id, settings.user_limit) else None

    def split(record: PromptRecord) -> PromptRecord:
        name = split_of(record.user_id, settings)
        return record if name == record.split else replace(record, split=name)

    steps = [Step("deduplicate", deduplicate), Step("user_limit", limit), Step("split", split)]
    if settings.pii != "keep":
        steps.append(Step("pii", _pii_filter(settings, report)))
    if codec is not None:
        steps.append(Step("truncate", lambda record: _with_prompt(record, codec.fit_prompt(record.prompt))))
    return steps


def _pii_filter(settings: HygieneConfig, report: HygieneReport) -> Callable[[PromptRecord], PromptRecord | None]:
    try:
        from rlhf_engine.data.pii import PiiFinder, redact
    except ImportError as error:
        raise ValueError(
            f"pii: got {settings.pii!r}, which needs `pip install phonenumbers python-stdnum` ({error}); 'keep' does not"
        ) from None
    finder = PiiFinder(settings.phone_regions, settings.honorifics)

    def apply(record: PromptRecord) -> PromptRecord | None:
        if record.split != "train":
            return record
        texts = prompt_texts(record.prompt)
        findings = [finder.find(text) for text in texts]
        kinds = {finding.kind for found in findings for finding in found}
        if not kinds:
            return record
        report.pii.update(kinds)
        if settings.pii == "drop":
            return None
        clean = [redact(text, found) for text, found in zip(texts, findings, strict=True)]
        return _with_prompt(record, with_texts(record.prompt, clean))

    return apply


def _run(records: Iterator[PromptRecord], report: HygieneReport, source: Path) -> Iterator[PromptRecord]:
    """The records that pass all steps."""
    for record in records:
        report.read += 1
        result: PromptRecord | None = record
        for step in report.steps:
            try:
                result = step(result)
            except ValueError as error:
                raise ValueError(f"{source}:{record.line}: {error}") from None
            if result is None:
                break
        else:
            report.splits[result.split] += 1
            yield result


def _skip(report: HygieneReport) -> Callable[[ValueError], None]:
    def on_bad(error: ValueError) -> None:
        report.bad_lines += 1
        if len(report.bad_examples) < _EXAMPLES:
            report.bad_examples.append(str(error))

    return on_bad


def _with_prompt(record: PromptRecord, prompt: Prompt) -> PromptRecord:
    return record if prompt is record.prompt else replace(record, prompt=prompt)


def _fields(record: PromptRecord) -> dict[str, Any]:
    """What `read_prompts` reads back as `record`."""
    return {**prompt_field(record.prompt), "user_id": record.user_id, "split": record.split}


_CACHE_KIB = 64 * 1024


class KeptIndex:
    """A set of keys and a count for each user, in a file that exists only while the index is open.

    Up to about 2,000,000 prompts it fits the cache of 64 MiB; from there on the disk sets the pace.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        # Nothing in it outlives the run, so nothing is journalled or synced.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE keys (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("CREATE TABLE users (user_id TEXT PRIMARY KEY, kept INTEGER) WITHOUT ROWID")
        self._cursor = self._database.cursor()
        self._cursor.execute("BEGIN")

    def add_key(self, key: bytes) -> bool:
        """Keep `key`; False if it was there already."""
        return self._cursor.execute("INSERT OR IGNORE INTO keys VALUES (?)", (key,)).rowcount == 1

    def add_prompt(self, user_id: str, limit: int) -> bool:
        """Count one more prompt of a user; False, and not counted, if there are `limit` already."""
        statement = "INSERT INTO users VALUES (?, 1) ON CONFLICT DO UPDATE SET kept = kept + 1 WHERE kept < ?"
        return self._cursor.execute(statement, (user_id, limit)).rowcount == 1

    def users(self) -> int:
        """How many users have been counted."""
        return self._cursor.execute("SELECT COUNT(*) FROM users").fetchone()[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._path.unlink()
