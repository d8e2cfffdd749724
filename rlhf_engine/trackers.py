"""Trackers of experiments: TensorBoard, Trackio, Weights & Biases and MLflow, each through its own package.

A tracker receives what `metrics.jsonl` holds, and tables of sampled responses. The packages are optional and are imported when
a run that uses them starts. A resumed run continues the run of the tracker, whose id is in `OUTPUT_DIR/trackers.json`.
"""

from __future__ import annotations

import importlib
import io
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.utils.tensorboard import SummaryWriter

from rlhf_engine.config.tracking import TrackingConfig
from rlhf_engine.errors import foreign_errors
from rlhf_engine.files import read_json, with_new_file, write_json
from rlhf_engine.notices import notice

IDS = "trackers.json"
"""File in the output folder with the id of each stage's run in each tracker."""

Rows = Sequence[Mapping[str, object]]
"""Rows of a table, which have the same columns."""


class Tracker(Protocol):
    """A sink for the metrics of one stage."""

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step by their names."""

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Log a table."""

    def close(self) -> None:
        """Write what is waiting and end the run."""


class RunOf(NamedTuple):
    """The run of a tracker that a stage reports to."""

    folder: Path
    """Output folder of the stage."""
    stage: str
    settings: TrackingConfig
    after: int | None
    """Step after which the stage continues; None if it does not replace earlier steps."""

    @property
    def name(self) -> str:
        """The name of the run."""
        return f"{self.settings.run_name or self.folder.resolve().name}/{self.stage}"

    def id(self, tracker: str, new: Callable[[], str]) -> tuple[str, bool]:
        """Return the id of the run and whether it exists; store that of a new run, which `new` returns."""
        path = self.folder / IDS
        known: dict[str, Any] = read_json(path) if path.is_file() else {}
        mine = known.get(self.stage, {})
        if self.after and tracker in mine:
            return str(mine[tracker]), True
        known[self.stage] = mine | {tracker: new()}
        with_new_file(path, lambda file: write_json(file, known))
        return known[self.stage][tracker], False


class TensorBoard:
    """Scalars `<stage>/<name>` in the folder `tensorboard/<stage>`, which is created by the first step.

    Each stage has a separate folder, because a log that restarts at a step hides the later steps of all scalars in its folder.
    """

    def __init__(self, run: RunOf) -> None:
        self.run = run
        self.board: SummaryWriter | None = None

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        for name, value in metrics.items():
            self._open().add_scalar(f"{self.run.stage}/{name}", value, step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Log a table as Markdown."""
        self._open().add_text(f"{self.run.stage}/{name}", markdown(rows), step)

    def close(self) -> None:
        """Close the file."""
        if self.board is not None:
            self.board.close()

    def _open(self) -> SummaryWriter:
        if self.board is None:
            purge = None if self.run.after is None else self.run.after + 1
            self.board = SummaryWriter(str(self.run.folder / "tensorboard" / self.run.stage), purge_step=purge)
        return self.board


class WandB:
    """A run of Weights & Biases; its files are in `OUTPUT_DIR/wandb`.

    A resumed run repeats steps with the same numbers, which wandb leaves out.
    """

    def __init__(self, run: RunOf) -> None:
        self.wandb, self.stage = import_tracker("wandb"), run.stage
        found, _ = run.id("wandb", lambda: uuid.uuid4().hex)
        run.folder.mkdir(parents=True, exist_ok=True)
        self.run = self.wandb.init(
            project=run.settings.project,
            name=run.name,
            group=run.name.rpartition("/")[0],
            id=found,
            resume="allow",
            dir=str(run.folder),
            settings=self.wandb.Settings(silent=True, console="off"),
        )

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self.run.log({f"{self.stage}/{name}": value for name, value in metrics.items()}, step=step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Log a table."""
        columns = list(rows[0])
        cells = [[row[column] for column in columns] for row in rows]
        self.run.log({f"{self.stage}/{name}": self.wandb.Table(columns=columns, data=cells)}, step=step)

    def close(self) -> None:
        """End the run, after everything is uploaded or written."""
        self.run.finish()


class Trackio:
    """A run of Trackio, whose data is in the folder of `TRACKIO_DIR`, or in a Space."""

    def __init__(self, run: RunOf) -> None:
        self.trackio, self.stage = import_tracker("trackio"), run.stage
        with redirect_stdout(io.StringIO()):  # it prints how to open its dashboard
            self.run = self.trackio.init(
                project=run.settings.project,
                name=run.name,
                group=run.name.rpartition("/")[0],
                resume="allow" if run.after else "never",
                embed=False,
            )

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self.run.log({f"{self.stage}/{name}": value for name, value in metrics.items()}, step=step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Log a table."""
        import pandas

        table = self.trackio.Table(dataframe=pandas.DataFrame([dict(row) for row in rows]))
        self.run.log({f"{self.stage}/{name}": table}, step=step)

    def close(self) -> None:
        """End the run, after everything is written."""
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


class MLflow:
    """A run of MLflow at its tracking URI; tables are the artifacts `<name>/<step>.json`."""

    def __init__(self, run: RunOf) -> None:
        self.client, self.stage = import_tracker("mlflow").MlflowClient(), run.stage
        found = self.client.get_experiment_by_name(run.settings.project)
        experiment = found.experiment_id if found else self.client.create_experiment(run.settings.project)
        self.id, known = run.id("mlflow", lambda: self.client.create_run(experiment, run_name=run.name).info.run_id)
        if known:
            self.client.update_run(self.id, status="RUNNING")

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        for name, value in metrics.items():
            self.client.log_metric(self.id, f"{self.stage}/{name}", value, step=step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Log a table as an artifact."""
        text = json.dumps([dict(row) for row in rows], indent=2, ensure_ascii=False)
        self.client.log_text(self.id, text, f"{name}/{step}.json")

    def close(self) -> None:
        """End the run."""
        self.client.set_terminated(self.id)


_TRACKERS: Mapping[str, Callable[[RunOf], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}


class Trackers:
    """The trackers of `settings.report_to`, as one.

    A package that fails after the start, for example without a network, is reported once, and the run continues without it:
    `metrics.jsonl` has everything. TensorBoard writes to the disk of `metrics.jsonl`, and its errors are raised.

    Raises:
        ValueError: a tracker cannot start a run; the message names it.
    """

    def __init__(self, run: RunOf) -> None:
        self.run = run
        self.open: dict[str, Tracker] = {}
        for name in run.settings.report_to:
            with foreign_errors(f"tracking.report_to: {name}"):
                self.open[name] = _TRACKERS[name](run)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step by their names."""
        self._each(lambda tracker: tracker.scalars(step, metrics))

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Log a table, unless it is empty."""
        if rows:
            self._each(lambda tracker: tracker.table(step, name, rows))

    def close(self) -> None:
        """End the runs."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            if isinstance(tracker, TensorBoard):
                call(tracker)
                continue
            try:
                with foreign_errors(f"tracking: {name}"):
                    call(tracker)
            except ValueError as error:
                del self.open[name]
                notice(f"{error}; the run continues without it")


def import_tracker(name: str) -> Any:
    """Return the package of a tracker.

    Raises:
        ValueError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"tracking.report_to: {name} is not installed ({error}); pip install 'rlhf-kernels[{name}]', or remove it"
        ) from None


def import_trackers(settings: TrackingConfig) -> None:
    """Import the packages of all trackers of a run, before a model is loaded; raise ValueError if one is not installed."""
    for name in settings.report_to:
        if name != "tensorboard":
            import_tracker(name)


def markdown(rows: Rows) -> str:
    """Return a table in Markdown; line breaks in a cell become `<br>`."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[name]) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
