"""Settings of the trackers to which the stages report."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_engine.config.schema import Section, WholeNumber

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


@dataclass(frozen=True)
class TrackingConfig(Section):
    """Trackers that receive the metrics of every stage, next to OUTPUT_DIR/metrics.jsonl, which is always written."""

    report_to: tuple[str, ...] = ("tensorboard",)
    """Any of tensorboard, trackio, wandb and mlflow; an empty list reports to none. tensorboard writes to
    OUTPUT_DIR/tensorboard. The others need the extra of their name, pip install 'rlhf-kernels[wandb]', and read their own
    environment variables for servers, keys and offline use, such as WANDB_MODE and MLFLOW_TRACKING_URI."""
    project: str = "rlhf"
    """Project of trackio and wandb, experiment of mlflow."""
    run_name: str | None = None
    """Name of the run; every stage is a run RUN_NAME/STAGE. If None, the name of output_dir."""
    samples_every: WholeNumber = 10
    """Updates of PPO between two tables of sampled responses, those of samples.jsonl, in the trackers. 0: no tables."""

    def check(self) -> None:
        """Raise ValueError for an unknown or repeated tracker."""
        for name in self.report_to:
            if name not in TRACKERS:
                raise ValueError(f"report_to: got {name!r}, expected any of {', '.join(TRACKERS)}")
            if self.report_to.count(name) > 1:
                raise ValueError(f"report_to: got {name!r} twice, expected every tracker once")
        if not self.project.strip():
            raise ValueError(f"project: got {self.project!r}, expected a name")
