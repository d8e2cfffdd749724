"""Prompt hygiene of InstructGPT (Ouyang et al. 2022, section 3.2), one prompt at a time, with a report.

1. deduplicate: drop a prompt that shares a long prefix with a kept prompt;
2. user_limit: keep the first 200 prompts of each user and drop the others;
3. split: assign each user to train, validation or test by a hash of the user's id, and ignore any `split` in the file; a
   prompt without a user id is assigned by a hash of its prefix;
4. pii: drop training prompts with personal information, or redact it;
5. truncate: with a tokenizer, cut the beginning of long prompts.

Deduplication is the first step and covers all prompts, so that a prompt in validation or test has no near copy in train.

The prefix of a prompt is its first `prefix_chars` characters after NFKC normalization, case folding and collapsing of white
space. Prompts with equal prefixes are duplicates; a prompt that is shorter is a duplicate only of an equal prompt. This is an
equivalence relation, so that the order of the prompts determines only which duplicate is kept. One look-up of a 128-bit hash
replaces the comparison with every kept prompt, so that the time is linear in the number of prompts, even if many share a
template. Texts with equal hashes are not compared: among 10^9 prompts the probability of a collision is 10^-21. The turns of a
conversation are joined to one text.

A frame, such as an instruction before every question, is no reason to drop a prompt. The prefix begins after the system
messages of a conversation, and after text that is common to at least `frame_share` of the prompts (`data.frames`). Prompts with
different system messages or different frames are never duplicates.

Records are read, processed and written one by one in the order of the file. Keys and counts are stored in an index on disk, so
that memory does not grow with the file. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf_engine.config import HygieneConfig
from rlhf_engine.data.frames import compared_text, shared_frames, without_frames
from rlhf_engine.data.loading import Reading, read_prompts
from rlhf_engine.data.records import Prompt, PromptRecord, prompt_field, prompt_texts, with_texts
from rlhf_engine.data.tokenize import Codec
from rlhf_engine.files import with_new_folder, write_json

PROMPTS, REPORT = "prompts.jsonl", "report.json"
_EXAMPLES = 20  # invalid lines that the report quotes
_MANY = 0.1
"""Share of its prompts from which a step's drops are worth a warning."""
_REASONS = {
    "deduplicate": "prompts with the same first data.hygiene.prefix_chars characters count as one",
    "user_limit": "data.hygiene.user_limit is the maximum per user",
    "pii": "data.hygiene.pii=redact keeps prompts with personal information, and replaces it",
}
"""Step -> why it drops prompts."""


@dataclass
class Step:
    """One step of the pipeline, with counts."""

    name: str
    """Name of the step in the report."""
    apply: Callable[[PromptRecord], PromptRecord | None]
    """Returns the record for the next step, or None to drop it."""
    seen: int = 0
    """Prompts that reached the step."""
    dropped: int = 0
    """Prompts that the step dropped."""
    changed: int = 0
    """Prompts whose text the step changed."""

    def __call__(self, record: PromptRecord) -> PromptRecord | None:
        """Apply the step to a record and count the result."""
        self.seen += 1
        result = self.apply(record)
        if result is None:
            self.dropped += 1
        elif result.prompt is not record.prompt:
            self.changed += 1
        return result


@dataclass
class HygieneReport:
    """Counts of the prompts that were read, of the effects of each step, and of the splits."""

    read: int = 0
    """Valid prompts in the source."""
    users: int = 0
    """Users with at least one prompt after deduplication."""
    without_user: int = 0
    """Valid prompts without a user id."""
    bad_lines: int = 0
    """Invalid lines, which were skipped."""
    bad_examples: list[str] = field(default_factory=list)
    """Error messages of the first invalid lines."""
    steps: list[Step] = field(default_factory=list)
    """The steps in the order in which they run."""
    pii: Counter[str] = field(default_factory=Counter)
    """Number of training prompts with each kind of personal information; a prompt may have several kinds."""
    splits: Counter[str] = field(default_factory=Counter)
    """Number of prompts written to each split."""
    warnings: list[str] = field(default_factory=list)
    """Problems that may affect a later stage, such as a split without prompts."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        names = ("name", "seen", "dropped", "changed")
        return {
            **{name: getattr(self, name) for name in ("read", "users", "without_user", "bad_lines", "bad_examples")},
            "steps": [{name: getattr(step, name) for name in names} for step in self.steps],
            "pii": dict(sorted(self.pii.items())),
            "splits": {split: self.splits[split] for split in ("train", "validation", "test")},
            "warnings": self.warnings,
        }

    def table(self) -> str:
        """Return the report as a text table."""
        lines = [f"{'step':14}{'seen':>12}{'dropped':>12}{'changed':>12}{'left':>12}"]
        lines.append(f"{'read':14}{self.read + self.bad_lines:12,}{self.bad_lines:12,}{0:12,}{self.read:12,}")
        for step in self.steps:
            left = step.seen - step.dropped
            lines.append(f"{step.name:14}{step.seen:12,}{step.dropped:12,}{step.changed:12,}{left:12,}")
        counts = self.to_dict()
        for name, title in (("splits", "splits"), ("pii", "personal information found")):
            lines.append(f"{title}: " + (", ".join(f"{kind} {n:,}" for kind, n in counts[name].items()) or "none"))
        return "\n".join([*lines, *self.bad_examples, *(f"warning: {warning}" for warning in self.warnings)])


def clean_prompts(
    source: str | Path,
    folder: str | Path,
    settings: HygieneConfig,
    codec: Codec | None = None,
    *,
    allow: Collection[str] | None = None,
) -> HygieneReport:
    """Clean the prompts of `source`; write the kept ones to `folder/prompts.jsonl` and the counts to `folder/report.json`.

    `read_prompts` reads the result, which has the further columns of the source. With a `codec`, long prompts are truncated to
    its `max_prompt_tokens`. `allow` is that of `read_prompts`.

    Raises:
        ValueError: an invalid line, named as `file:line`, unless `settings.bad_lines` is "skip"; no valid prompt; a `folder`
            that contains other files, which would be lost.
        OSError: the disk is full.
    """
    folder, given = Path(folder), Path(source)
    if folder.resolve() in given.resolve().parents:
        raise ValueError(f"{folder}: contains the prompts to read; give a different output folder")
    if folder.exists() and (not folder.is_dir() or {item.name for item in folder.iterdir()} - {PROMPTS, REPORT}):
        raise ValueError(f"{folder}: contains files other than {PROMPTS} and {REPORT}; give a new folder")
    report = HygieneReport()
    skips = settings.bad_lines == "skip"
    records = read_prompts(source, on_bad=_skip(report) if skips else None, allow=allow)
    frames: list[str] = []
    if settings.frame_share is not None:

        def prompts() -> Iterator[Prompt]:
            return (record.prompt for record in read_prompts(source, on_bad=_ignore if skips else None, allow=allow))

        frames = shared_frames(prompts, settings.prefix_chars, settings.frame_share)

    def write(new: Path) -> None:
        try:
            _write(new, records, settings, report, codec, frames)
        except sqlite3.Error as error:
            raise OSError(f"{new}: writing the temporary index failed: {error}") from None

    with_new_folder(folder, write)
    return report


def _write(
    folder: Path,
    records: Reading[PromptRecord],
    settings: HygieneConfig,
    report: HygieneReport,
    codec: Codec | None,
    frames: Sequence[str],
) -> None:
    source = records.path
    with KeptIndex(folder / "index.sqlite") as index, (folder / PROMPTS).open("w", encoding="utf-8") as out:
        report.steps = _steps(settings, index, report, codec, frames)
        for record in _run(records, report, source):
            out.write(json.dumps(_fields(record), ensure_ascii=False) + "\n")
        report.users = index.users()
    if not report.read:
        raise ValueError(f"{source}: contains no valid prompt; give a file with at least one")
    report.warnings = list(_warnings(settings, report, frames, list(records.columns)))
    write_json(folder / REPORT, {"source": str(source), "settings": settings.to_dict(), **report.to_dict()})


def _warnings(
    settings: HygieneConfig, report: HygieneReport, frames: Sequence[str], columns: Sequence[str]
) -> Iterator[str]:
    lines = report.read + report.bad_lines
    if report.bad_lines > _MANY * lines:
        yield f"{report.bad_lines:,} of {lines:,} lines are invalid and were skipped"
    for step in report.steps:
        if step.dropped > _MANY * step.seen:
            share = step.dropped / step.seen
            yield f"{step.name} dropped {step.dropped:,} of {step.seen:,} prompts ({share:.0%}); {_REASONS[step.name]}"
    for frame in frames:
        yield f"many prompts begin with the {len(frame):,} characters {frame[:40]!r}..., which were not compared"
    if report.without_user:
        yield (
            f"{report.without_user:,} of {report.read:,} prompts have no user_id: the step user_limit is left out for "
            "them, and they are split by prompt and not by user, so that several splits may have prompts of one person"
        )
    if columns and settings.pii != "keep":
        yield f"the columns {', '.join(columns)} were copied without a search for personal information"
    for split, share in _shares(settings):
        if share and not report.splits[split]:
            yield _empty(split, report)


def prefix_key(prompt: Prompt, prefix_chars: int, frames: Sequence[str] = ()) -> bytes:
    """Return 16 bytes that are equal for prompts whose first `prefix_chars` normalized characters are equal.

    The characters after the system messages and after the `frames` count; system messages and frames must be equal too.
    """
    system, text = compared_text(prompt)
    frame, rest = without_frames(text, frames)
    compared = "\0".join((system, frame, rest[:prefix_chars])) if system or frame else rest[:prefix_chars]
    return hashlib.blake2b(compared.encode(), digest_size=16).digest()


def split_of(user_id: str, settings: HygieneConfig) -> str:
    """Return the split of a user: train, validation or test. It depends only on the id and the settings."""
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
        f"no prompt is left in {split}, with {report.users:,} users in total; change data.hygiene.validation_share or "
        "test_share, which are fractions of the users, or data.hygiene.split_seed"
    )


def _steps(
    settings: HygieneConfig, index: KeptIndex, report: HygieneReport, codec: Codec | None, frames: Sequence[str]
) -> list[Step]:
    def key(record: PromptRecord) -> bytes:
        return prefix_key(record.prompt, settings.prefix_chars, frames)

    def deduplicate(record: PromptRecord) -> PromptRecord | None:
        return record if index.add_key(key(record)) else None

    def limit(record: PromptRecord) -> PromptRecord | None:
        if record.user_id is None or index.add_prompt(record.user_id, settings.user_limit):
            return record
        return None

    def split(record: PromptRecord) -> PromptRecord:
        name = split_of(key(record).hex() if record.user_id is None else record.user_id, settings)
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
            f"pii is {settings.pii!r}, which needs `pip install phonenumbers python-stdnum` ({error}); or set it to 'keep'"
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
    """Yield the records that pass all steps."""
    for record in records:
        report.read += 1
        report.without_user += record.user_id is None
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


def _ignore(error: ValueError) -> None:
    """Skip an invalid line that is counted elsewhere."""


def _with_prompt(record: PromptRecord, prompt: Prompt) -> PromptRecord:
    return record if prompt is record.prompt else replace(record, prompt=prompt)


def _fields(record: PromptRecord) -> dict[str, Any]:
    """Return the fields of the line that `read_prompts` reads back as `record`."""
    user = {} if record.user_id is None else {"user_id": record.user_id}
    return {**prompt_field(record.prompt), **user, "split": record.split, **record.columns}


_CACHE_KIB = 64 * 1024


class KeptIndex:
    """A set of keys and a count per user, in a file that exists only while the index is open.

    Up to about 2,000,000 prompts fit into its cache of 64 MiB; beyond that, the disk limits the speed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        # The file is deleted at the end of the run, so that it needs no journal and no syncing.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE keys (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("CREATE TABLE users (user_id TEXT PRIMARY KEY, kept INTEGER) WITHOUT ROWID")
        self._cursor = self._database.cursor()
        self._cursor.execute("BEGIN")

    def add_key(self, key: bytes) -> bool:
        """Add `key`; return False if it is in the set already."""
        return self._cursor.execute("INSERT OR IGNORE INTO keys VALUES (?)", (key,)).rowcount == 1

    def add_prompt(self, user_id: str, limit: int) -> bool:
        """Increase the count of a user by one; return False, and leave the count, if it is `limit` already."""
        statement = "INSERT INTO users VALUES (?, 1) ON CONFLICT DO UPDATE SET kept = kept + 1 WHERE kept < ?"
        return self._cursor.execute(statement, (user_id, limit)).rowcount == 1

    def users(self) -> int:
        """Return the number of users with a count."""
        return self._cursor.execute("SELECT COUNT(*) FROM users").fetchone()[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._path.unlink()
