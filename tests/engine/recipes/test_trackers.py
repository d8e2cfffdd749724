"""Trackers of experiments, offline: what a run reports can be read back with the tracker's own package."""

import importlib
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_engine.config.tracking import TrackingConfig
from rlhf_engine.metrics import MetricsWriter, read_metrics
from rlhf_engine.trackers import import_trackers, markdown
from tests.engine.helpers.cli_run import new_run, rlhf

SAMPLES = [{"prompt": "p", "response": "a|b\nc", "score": 1.5}]


def report(folder, name, after=None, steps=(1, 2), **settings):
    """Write metrics and a table of samples for each step, as a run does."""
    tracking = TrackingConfig(report_to=(name,), run_name="mine", **settings)
    with MetricsWriter(folder, "ppo", resume_after=after, tracking=tracking) as writer:
        for step in steps:
            writer.write(step, {"kl": float(step)})
        writer.table(steps[-1], "samples", SAMPLES)


def test_tensorboard_has_scalars_and_the_table(tmp_path):
    report(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("ppo/kl")] == [(1, 1.0), (2, 2.0)]
    text = board.Tensors("ppo/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == markdown(SAMPLES) and text.splitlines()[2] == "| p | a\\|b<br>c | 1.5 |"


def test_an_empty_list_reports_to_no_tracker(tmp_path):
    with MetricsWriter(tmp_path, "ppo", tracking=TrackingConfig(report_to=())) as writer:
        writer.write(1, {"kl": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_mlflow_has_metrics_and_the_table_and_a_resumed_run_continues_it(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow.set_tracking_uri(None)
    report(tmp_path, "mlflow")
    report(tmp_path, "mlflow", after=2, steps=(3,))
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("rlhf").experiment_id])
    assert run.info.run_name == "mine/ppo" and run.info.status == "FINISHED"
    found = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "ppo/kl")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0)]
    (path,) = (tmp_path / "mlruns").rglob("samples/2.json")
    assert json.loads(path.read_text()) == SAMPLES


def test_trackio_has_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    sqlite = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(sqlite, "TRACKIO_DIR", tmp_path / "trackio")
    report(tmp_path, "trackio", project="tiny")
    logs = sqlite.SQLiteStorage.get_logs("tiny", "mine/ppo")
    assert [(row["step"], row["ppo/kl"]) for row in logs if "ppo/kl" in row] == [(1, 1.0), (2, 2.0)]
    assert [row["step"] for row in logs if "ppo/samples" in row] == [2]


def test_wandb_writes_a_run_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    report(tmp_path, "wandb")
    wandb.teardown()  # its process writes the file
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert b"ppo/kl" in content and b"mine/ppo" in content
    assert path.stem.removeprefix("run-") == json.loads((tmp_path / "trackers.json").read_text())["ppo"]["wandb"]


def test_a_tracker_without_its_package_names_the_extra(tmp_path, monkeypatch, base, capsys):
    real = importlib.import_module

    def missing(name, package=None):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        return real(name, package)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ValueError, match=r"wandb is not installed .*pip install 'rlhf-kernels\[wandb\]', or remove it"):
        import_trackers(TrackingConfig(report_to=("tensorboard", "wandb")))
    run = new_run(tmp_path, base)
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", sets=["tracking.report_to=[wandb]"])
    assert code == 2 and "pip install 'rlhf-kernels[wandb]'" in shown
    assert not (run / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("names", [("letters",), ("wandb", "wandb")])
def test_unknown_and_repeated_trackers_are_refused(names):
    with pytest.raises(ValueError, match=r"report_to: got '(letters', expected any of|wandb' twice)"):
        TrackingConfig(report_to=names)


def test_a_tracker_that_fails_during_a_run_is_left_out_and_reported(tmp_path, caplog):
    class Failing:
        def scalars(self, step, metrics):
            raise OSError("connection lost")

    with MetricsWriter(tmp_path, "ppo", tracking=TrackingConfig(report_to=())) as writer:
        writer.trackers.open["wandb"] = Failing()
        writer.write(1, {"kl": 1.0})
        writer.write(2, {"kl": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert [record.message for record in caplog.records] == [
        "tracking: wandb: OSError: connection lost; the run continues without it"
    ]


def test_ppo_logs_a_table_of_samples_every_few_updates(tmp_path, base, capsys):
    run = new_run(tmp_path, base, updates=3)
    (run / "score.py").write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    sets = [f"reward.function={run / 'score.py'}:score", "ppo.value_init=zero", "tracking.samples_every=2"]
    code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", sets=sets)
    assert code == 0, shown
    board = EventAccumulator(str(run / "out" / "tensorboard" / "ppo")).Reload()
    tables = board.Tensors("ppo/samples/text_summary")
    assert [table.step for table in tables] == [2]
    assert tables[0].tensor_proto.string_val[0].decode().startswith("| update | prompt | response | score | kl |")
