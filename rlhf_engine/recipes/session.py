"""Training sessions: checkpoints during a stage, and what is saved when the stage ends early.

Guarantees for `rlhf sft`, `rlhf rm` and `rlhf ppo`:

* A checkpoint on disk is complete, no matter how the process ends, and a resumed run gives the numbers of an uninterrupted one.
* By default a checkpoint is written when ten minutes have passed since the last one. `kill -9`, a power cut, or an error after
  an update's first optimizer step therefore costs at most those minutes and the step or update that was running.
* Ctrl-C, SIGTERM and SIGHUP save what is finished. PPO abandons an update that has not changed a weight yet and completes one
  that has. A second signal, at least two seconds later, abandons that one too. Signals within two seconds count as one,
  because terminals and batch systems often send several.
* Any exception saves the finished steps or updates if the weights are still those of the last finished one. Otherwise the last
  checkpoint is kept, and a note on the exception describes it.
* A failed save leaves the last checkpoint as it was, and the session tries other places (`_rescue`).
* With several ranks, the first one writes. All ranks save and stop together, after a finished step: a signal ends the run after
  the current update, and an error on one rank leaves the last checkpoint.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ParamSpec, Protocol, Self, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_engine.checkpoint import Checkpointable, save_checkpoint
from rlhf_engine.checkpoint import resume as resume_trainer
from rlhf_engine.checkpoint_folders import Keeper, checkpoints, remove_checkpoints
from rlhf_engine.config import RunConfig
from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.files import now, recover, with_new_folder
from rlhf_engine.metrics import METRICS, MetricsWriter
from rlhf_engine.notices import notice
from rlhf_engine.supervised.trainer import SupervisedTrainer

INTERVAL = 600.0
"""Seconds between checkpoints if the config gives no number of steps; longer if a save takes over a twentieth of that."""
ONE_SIGNAL = 2.0
"""Seconds after the first signal in which further signals count as the same one."""

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CANNOT_SAVE = (OSError, ValueError, RuntimeError)


class Log(Protocol):
    """A file to which a run appends lines, such as a `MetricsWriter`."""

    def sync(self) -> None:
        """Sync the file to disk."""

    def lines(self) -> bytes:
        """Return the run's lines so far."""
        ...


class Stopped(KeyboardInterrupt):
    """Exception that ends the training after a signal; its notes describe what is saved.

    It is a KeyboardInterrupt, so that neither `except Exception` in a user's code nor the wrapper of user functions catches it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.saved = False
        """Whether a checkpoint contains everything that was finished."""


class TrainingSession:
    """Context manager that saves `trainer` in `folder`, at intervals and when it ends early, and handles signals.

    `every` is the config's `checkpoint_every`: None saves by time (`INTERVAL`), 0 only at the end. `loaded` is the checkpoint
    that the run continues from. `replaces` are folders of an earlier run, which are deleted when the first step is finished.
    Signals are handled in the main thread only; signals that the process ignores, as under `nohup`, stay ignored.
    """

    def __init__(
        self,
        trainer: Checkpointable,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        data: Mapping[str, str],
        metrics: MetricsWriter,
        *,
        every: int | None,
        loaded: Path | None = None,
        replaces: Sequence[Path] = (),
        clock: Callable[[], float] = now,
        ranks: Ranks = ONE,
    ) -> None:
        self.ranks = ranks
        self.trainer, self.folder, self.metrics = trainer, folder, metrics
        self.logs: dict[str, Log] = {METRICS: metrics}
        """Files of lines that are synced before a checkpoint, which contains them, by their names."""
        self.tokenizer, self.config, self.data = tokenizer, config, data
        self.every, self.replaces, self.clock = every, replaces, clock
        self.keeper = Keeper(folder, config.checkpoint, loaded=loaded)
        self.score: float | None = None
        self.saved = self.started = trainer.done
        self._seen = trainer.done
        self._time, self._cost = clock(), 0.0
        self._received: int | None = None
        self._received_at = 0.0
        self._masked = False
        self._handlers: dict[int, Any] = {}  # as `signal.getsignal` returns them

    # ---- called by a stage ----

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a finished step; the first call deletes the folders that the run replaces."""
        if not self.ranks.first:
            return
        try:
            for folder in self.replaces:
                recover(folder)
                remove_checkpoints(folder)
            self.replaces = ()
        finally:
            self._score(metrics)
            self.metrics.write(step, metrics)

    def after(self) -> None:
        """Save if a checkpoint is due, then end the training if a signal has arrived; call this after every finished step."""
        if self.ranks.each(self._due())[0]:
            self.save()
        self._seen = self.trainer.done
        # Asked after the save, during which a signal may arrive.
        self._received = next((one for one in self.ranks.each(self._received) if one is not None), None)
        if self._received is not None:
            self._stop()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end the training immediately within the block, which must not change the trainer's state."""
        self._seen = self.trainer.done
        if self._received is not None and self.ranks.size == 1:
            self._stop()
        try:
            yield
        finally:
            self._seen = -1

    def finish(self) -> None:
        """Sync the logs, and keep later signals from ending the training: only its result is left to be written."""
        self._masked = True
        self._sync()

    def save(self) -> None:
        """Write a checkpoint unless the last one is current; sync the metrics first."""
        if self.saved == self.trainer.done:
            return
        masked, self._masked = self._masked, True
        begun = self.clock()
        try:
            parts = self.folder.with_name(f"{self.folder.name}.parts")
            with self.trainer.gathered(parts) if self.ranks.size > 1 else nullcontext():
                if self.ranks.first:
                    self._sync()
                    self.keeper.save(lambda retire: self._write(self.folder, retire))
        finally:
            self._masked = masked
        self.saved, self._time = self.trainer.done, self.clock()
        self._cost = self._time - begun

    def _sync(self) -> None:
        for log in self.logs.values():
            log.sync()

    def _due(self) -> bool:
        if self.every is not None:
            return self.every > 0 and self.trainer.done % self.every == 0
        return self.clock() - self._time >= max(INTERVAL, 20.0 * self._cost)

    # ---- signals ----

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                before = signal.getsignal(signum)
                if before not in (signal.SIG_IGN, None):
                    self._handlers[signum] = before
                    signal.signal(signum, self._receive)
        return self

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        first = self._received is None
        if first:
            self._received, self._received_at = signum, self.clock()
        if self._masked or self.ranks.size > 1:  # `after` ends the training on all ranks together
            return
        # Between the end of a step and `after`, metrics and counters may disagree.
        between_steps = self.trainer.whole and self.trainer.done == self._seen
        again = not first and self.clock() - self._received_at >= ONE_SIGNAL
        if between_steps or (again and not self.trainer.whole):
            self._stop()

    def _stop(self) -> None:
        self._masked = True
        assert self._received is not None
        raise Stopped(self._received)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._masked = True
        try:
            if error is not None:
                saved, note = self._save_what_is_whole(error)
                if note:
                    error.add_note(note)
                if isinstance(error, Stopped):
                    error.saved = saved
        finally:
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)

    # ---- early end of a run ----

    def _save_what_is_whole(self, error: BaseException) -> tuple[bool, str]:
        """Save the finished steps; return whether a checkpoint contains all of them, and a sentence about it."""
        trainer = self.trainer
        if self.ranks.size > 1 and not isinstance(error, Stopped):  # the other ranks do not take part in a save
            return False, self._last() if self.saved else "there is no checkpoint"
        if not trainer.whole:
            lost = f"{trainer.unit} {trainer.done + 1} had changed weights and was not finished, so nothing was saved"
            if self.saved:
                return self.saved == trainer.done, f"{lost}; {self._last()}"
            return False, f"{lost}; there is no checkpoint"
        if trainer.done == self.saved:
            return self.saved > 0, self._last() if self.saved else ""
        try:
            self.save()
        except FloatingPointError as diverged:
            return False, f"{diverged}; {self._last() if self.saved else 'there is no checkpoint'}"
        except _CANNOT_SAVE as failure:
            why = "" if str(failure) == str(error) else f"{failure}; "
            return False, why + self._rescue()
        return True, self._last()

    def _last(self) -> str:
        count = f"{self.saved} {self.trainer.unit}{'s' if self.saved > 1 else ''}"
        return f"the checkpoint {self.folder} holds {count}, and a resumed run continues from there"

    def _rescue(self) -> str:
        """Save next to the folder that could not be written, or on the disk of temporary files; return a note about it.

        Try the whole state in both places first, then the model without optimizer state, which takes about a third.
        """
        last = self._last() if self.saved else "there is no checkpoint"
        places = self._other_places()
        for write, what in ((self._write, "everything"), (self._write_model, "the model, without optimizer state,")):
            for place in places:
                try:
                    write(place)
                except _CANNOT_SAVE:
                    continue
                done = f"{what} after {self.trainer.unit} {self.trainer.done} is in {place}"
                if write == self._write:
                    return f"{done}; move it to {self.folder} and resume the run{self._missing()}"
                return f"{done}; {last}{self._missing()}"
        return f"no other place could be written either; {last}{self._missing()}"

    def _other_places(self) -> list[Path]:
        places = [self.folder.with_name(self.folder.name + ".rescued")]
        try:
            if Path(tempfile.gettempdir()).stat().st_dev != self.folder.parent.stat().st_dev:
                places.append(Path(tempfile.mkdtemp(prefix="rlhf-")) / places[0].name)
        except OSError:
            pass  # no temporary files here
        return places

    def _missing(self) -> str:
        """Return a note with the bytes that a checkpoint lacks on the folder's disk; empty if it lacks none."""
        needed = sum(tensor.nbytes for _, tensor in self.trainer.weights())
        needed += sum(tensor.nbytes for tensor in self.trainer.tensors().values())
        missing = needed - shutil.disk_usage(self.folder.parent).free
        return f"; {missing:,} bytes are missing on the disk of {self.folder.parent}" if missing > 0 else ""

    def _write(self, place: Path, retire: Callable[[Path], object] | None = None) -> None:
        logs, score = {name: log.lines() for name, log in self.logs.items()}, self.score
        save_checkpoint(
            place, self.trainer, self.tokenizer, self.config, self.data, logs=logs, score=score, retire=retire
        )

    def _score(self, metrics: Mapping[str, float]) -> None:
        """Set the score of the next checkpoint to the value of `checkpoint.best`, if these metrics have it."""
        best = self.config.checkpoint.best
        if best is not None:
            sign, name = (-1.0, best[1:]) if best.startswith("-") else (1.0, best)
            if name in metrics:
                self.score = sign * float(metrics[name])

    def _write_model(self, place: Path) -> None:
        with_new_folder(place, lambda new: self.trainer.write_model(new, self.tokenizer))


def run_session(
    trainer: SupervisedTrainer[Any],
    folder: Path,
    unfinished: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    data: Mapping[str, str],
    write_result: Callable[[], Result],
    *,
    every: int | None,
    resume: bool,
    overwrite: bool,
    ranks: Ranks = ONE,
) -> Result:
    """Train to the end with checkpoints in `unfinished`, which is deleted after `write_result` has written `folder`."""
    loaded = load_newest(unfinished, trainer, config, data) if resume else None
    replaces = (unfinished, folder) if overwrite else ()
    with (
        MetricsWriter(
            config.output_dir, trainer.stage, resume_after=trainer.done, history=loaded, tracking=config.tracking
        ) as metrics,
        TrainingSession(
            trainer,
            unfinished,
            tokenizer,
            config,
            data,
            metrics,
            every=every,
            loaded=loaded,
            replaces=replaces,
            ranks=ranks,
        ) as session,
    ):
        trainer.log = session.write
        trainer.train(session.after, session.interruptible)
        session.finish()
        result = write_result()
    if ranks.first:
        remove_checkpoints(unfinished)
    return result


def load_newest(folder: Path, trainer: Checkpointable, config: RunConfig, data: Mapping[str, str]) -> Path | None:
    """Resume from the newest undamaged checkpoint and return its folder; if there is none, warn and return None."""
    if checkpoints(folder):
        return resume_trainer(folder, trainer, config, data)
    notice(f"{folder}: there is no checkpoint yet, so the run begins from the start")
    return None
