"""Callbacks of the PPO trainer: logging, sampled responses, checkpoints, early stopping.

A callback is an object with any of the methods of `Callback`. The trainer calls its callbacks in the order of its list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rlhf_engine.files import parse_json
from rlhf_engine.metrics import LinesFile
from rlhf_engine.notices import notice
from rlhf_engine.progress import progress

if TYPE_CHECKING:
    from rlhf_engine.data.tokenize import Codec
    from rlhf_engine.ppo.experience import Scored
    from rlhf_engine.ppo.nonfinite import NonFinite
    from rlhf_engine.ppo.trainer import PPOTrainer


class Callback:
    """Base class of a callback, whose methods do nothing."""

    def on_rollout(self, trainer: PPOTrainer, scored: Scored) -> None:
        """Handle a scored rollout, before the policy is trained on it."""

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Handle a finished update; later callbacks receive what this one adds to `log`."""

    def on_nonfinite(self, trainer: PPOTrainer, cause: NonFinite) -> None:
        """Handle numbers that are not finite, before `ppo.on_nonfinite` is applied."""

    def on_checkpoint(self, trainer: PPOTrainer, folder: Path) -> None:
        """Handle a checkpoint that was written to `folder`."""

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Handle the end of training; `error` is the exception that ended it early, or None."""


class TextMetrics(Callback):
    """Adds to the log how the sampled ids and the texts that a reward reads differ.

    `text_mismatch` is the share of responses whose text has other ids than those that PPO trains on. `unknown_tokens` is the
    number of sampled ids that are no token of the tokenizer.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec, self.known = codec, frozenset(codec.tokenizer.get_vocab().values())
        self.found: dict[str, float] = {}

    def on_rollout(self, trainer: PPOTrainer, scored: Scored) -> None:
        """Compare the ids and the texts of a rollout."""
        responses = scored.rollout.responses()
        differ = sum(self.codec.text_differs(ids) for ids in responses)
        unknown = sum(token not in self.known for ids in responses for token in ids)
        self.found = {"text_mismatch": differ / len(responses), "unknown_tokens": unknown}

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Add the metrics of the update's rollout."""
        log |= self.found


class Writer(Protocol):
    """A sink for the metrics of updates, such as a `MetricsWriter`."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step."""


class MetricsLog(Callback):
    """Writes the metrics of every update with `writer`, and shows the progress on stderr.

    `extra()` returns additional metrics for each update. If an earlier callback raises when an update ends, the metrics of that
    update are written when the training ends, because a checkpoint counts the update as finished.
    """

    def __init__(self, writer: Writer, *, extra: Callable[[], dict[str, float]] = dict) -> None:
        self.writer, self.extra, self.bar = writer, extra, None
        self.history: list[dict[str, float]] = []
        self.written = 0
        self.tokens = 0
        """Response tokens of the last rollout."""

    def on_rollout(self, trainer: PPOTrainer, scored: Scored) -> None:
        """Count the tokens of a rollout."""
        self.tokens = int(scored.rollout.mask.sum())

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Write the metrics of one update."""
        log |= self.extra()
        self._write(trainer, log)
        if self.bar is None:
            self.bar = progress(trainer.config.updates, "ppo", unit="update", done=trainer.updates_done - 1)
        self.bar.advance(tokens=round(self.tokens))
        self.bar.show(score=f"{log['score_mean']:.2f}", kl=f"{log['kl']:.2f}")

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Write the metrics of a finished update that are not written yet, and close the progress bar."""
        if self.bar is not None:
            self.bar.close()
        if trainer.updates_done > max(self.written, trainer.resumed_at):
            self._write(trainer, trainer.latest | self.extra())

    def _write(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        self.written = trainer.updates_done
        self.history.append(log)
        self.writer.write(trainer.updates_done, log)


class RanksNotice(Callback):
    """Logs once, after the first update, when weights are gathered, how long ranks wait, and uneven batches."""

    logged = False

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Log the notice."""
        if self.logged:
            return
        self.logged = True
        weights = sum(parameter.nbytes for parameter in trainer.policy.parameters()) / 2**30
        gathered = (
            f"the sharded weights are gathered once per update for sampling, {weights:.2f} GiB on every rank, and layer by "
            "layer in other passes"
        )
        whole = "every rank has whole weights, and none are gathered"
        idle = f"the ranks waited for {log['idle_share']:.0%} of their time in the first sampling (metric idle_share)"
        ranks, config = trainer.ranks.size, trainer.config
        batches = {"ppo.rollout_batch": config.rollout_batch, "ppo.minibatch": config.minibatch}
        uneven = "".join(
            f"; {key} {count} is dealt as {count // ranks} or {count // ranks + 1} sequences per rank"
            for key, count in batches.items()
            if count % ranks
        )
        notice(f"{ranks} ranks: {gathered if trainer.sharded else whole}; {idle}{uneven}")


class Checkpoints(Callback):
    """Calls `save(trainer)`, which returns the folder written, every `every` updates (0: never) and at the end.

    After an error that leaves the state of the finished updates, that state is saved. After an error within an update that had
    changed a weight, nothing is saved, because an uninterrupted run never has that state.
    """

    def __init__(self, save: Callable[[PPOTrainer], Path], every: int = 0) -> None:
        self.save, self.every, self.saved = save, every, -1

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Save if the number of updates is a multiple of `every`."""
        if self.every and trainer.updates_done % self.every == 0:
            self._save(trainer)

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Save the finished updates that are not saved yet."""
        if trainer.whole and trainer.updates_done > max(self.saved, trainer.resumed_at):
            self._save(trainer)

    def _save(self, trainer: PPOTrainer) -> None:
        folder = self.save(trainer)
        self.saved = trainer.updates_done
        trainer.notify("on_checkpoint", folder)


class EarlyStopping(Callback):
    """Ends training once a metric was outside its bounds in `updates` consecutive updates."""

    def __init__(self, name: str, *, above: float = math.inf, below: float = -math.inf, updates: int = 1) -> None:
        if above == math.inf and below == -math.inf:
            raise ValueError("EarlyStopping has no bound; pass `above`, `below` or both")
        self.name, self.above, self.below, self.updates, self.count = name, above, below, updates, 0

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Count consecutive updates outside the bounds, and stop training after `updates` of them."""
        if self.name not in log:
            raise ValueError(f"name: got {self.name!r}, expected a metric of the log: {', '.join(sorted(log))}")
        outside = not self.below <= log[self.name] <= self.above
        self.count = self.count + 1 if outside else 0
        if self.count >= self.updates:
            trainer.stop()


Table = Callable[[int, str, list[dict[str, object]]], None]
"""Logs a table: `table(step, name, rows)`."""


class SampledResponses(Callback):
    """Writes the first `count` responses of every update's rollout to the JSONL file `path`, with their prompts and scores.

    The lines of updates after number `after` are dropped when the next update ends: a resumed run repeats those updates.
    `history` is a file with the lines until then, which are restored if `path` has lost some. `table(update, "samples", rows)`
    is called with the responses every `table_every` updates (0: never).

    Raises:
        ValueError: `path` exists and has a line that is not of this kind, named as `file:line`.
    """

    def __init__(
        self,
        path: Path,
        codec: Codec,
        count: int,
        *,
        after: int,
        history: Path | None = None,
        table: Table | None = None,
        table_every: int = 0,
    ) -> None:
        known = history is not None and history.is_file()
        kept = earlier_responses(path, after, damaged=known)
        if history is not None and known:
            kept = history.read_bytes()
        self.codec, self.count, self.log = codec, count, LinesFile(path, lambda: kept)
        self.table, self.table_every = table, table_every
        self.rows: list[dict[str, object]] = []
        self.written = after
        """Number of the last update whose responses are in `log`."""

    def on_rollout(self, trainer: PPOTrainer, scored: Scored) -> None:
        """Decode the responses of a rollout."""
        rollout = scored.rollout
        kl = (scored.old_logprobs - scored.ref_logprobs).sum(dim=1)
        columns = (rollout.prompts(), rollout.responses(), scored.raw_scores.tolist(), kl.tolist())
        self.rows = [
            {
                "update": trainer.updates_done + 1,
                "prompt": self.codec.decode_prompt(prompt),
                "response": self.codec.decode_response(response),
                "score": _rounded(score),
                "kl": _rounded(nats),
            }
            for prompt, response, score, nats in islice(zip(*columns, strict=True), self.count)
        ]

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Append the responses of the update's rollout."""
        self.written = trainer.updates_done
        self.log.add("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows).encode())
        if self.table is not None and self.table_every and self.written % self.table_every == 0:
            self.table(self.written, "samples", self.rows)

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Append the responses of a finished update if an earlier callback has raised."""
        if trainer.updates_done > self.written:
            self.on_update(trainer, {})

    def sync(self) -> None:
        """Write the lines that could not be written before, and sync the file to disk."""
        self.log.sync()

    def lines(self) -> bytes:
        """Return the lines so far."""
        return self.log.content()


def earlier_responses(path: Path, after: int, *, damaged: bool = False) -> bytes:
    """Return the lines of `SampledResponses` until update `after`, without an incomplete last line; empty without a file.

    With `damaged`, lines that are no JSON are left out: a power cut may leave zeros in a line, which a checkpoint restores.

    Raises:
        ValueError: a line is not of this kind, named as `file:line`.
    """
    kept: list[bytes] = []
    with path.open("rb") if path.is_file() else BytesIO() as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                kept += [line] if parse_json(line)["update"] <= after else []
            except (ValueError, KeyError, TypeError) as error:
                if damaged and isinstance(error, ValueError):
                    continue
                raise ValueError(f"{path}:{number}: not a line of sampled responses; move the file away") from None
    return b"".join(kept)


def _rounded(x: float) -> float | None:
    """Return `x` with 4 decimals and without a negative zero; None, as JSON's null, if it is not finite."""
    return round(x, 4) + 0.0 if math.isfinite(x) else None


class Ending:
    """Calls `on_end` of every callback with the exception that ended training, even if an `on_end` raises."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.trainer.resumed_at, self.trainer.stopped = self.trainer.updates_done, False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as ends:
            for callback in reversed(self.trainer.callbacks):
                ends.callback(getattr(callback, "on_end", _nothing), self.trainer, error)


def _nothing(*_: object) -> None:
    pass
