"""What a training session saves: when a checkpoint is due, and when a stage ends early."""

import json
import re
import signal

import pytest
from safetensors.torch import load_file

from rlhf_engine.config import RunConfig
from rlhf_engine.metrics import MetricsWriter, read_metrics
from rlhf_engine.recipes.session import INTERVAL, Stopped, TrainingSession
from tests.engine.helpers.counter import Counter


@pytest.fixture
def trainer():
    return Counter()


@pytest.fixture
def session(tmp_path, trainer):
    """Return a function that builds a session of the trainer in the folder `sft.checkpoint`."""

    def make(every=0, **options):
        metrics = MetricsWriter(tmp_path, "sft", resume_after=0)
        place = tmp_path / "sft.checkpoint"
        return TrainingSession(trainer, place, None, RunConfig(), {}, metrics, every=every, **options)

    return make


def held(folder):
    """Return the number of steps in a checkpoint, and check that its state and its weights agree."""
    if not folder.exists():
        return 0
    done = json.loads((folder / "trainer.json").read_text())["done"]
    assert float(load_file(folder / "model.safetensors")["weight"][0]) == done
    return done


def run(session, trainer, steps, within=lambda: None):
    """Run `steps` steps; call `within` during the last one, after it has changed the weights."""
    for number in range(1, steps + 1):
        trainer.step(within if number == steps else lambda: None)
        session.write(trainer.done, {"loss": float(trainer.done)})
        session.after()


# ---- when a checkpoint is due ----


@pytest.mark.parametrize(
    "every, cost, saves",
    [
        (None, 0.0, {601.0: True, 1100.0: False, 1300.0: True}),
        (
            None,
            60.0,
            {601.0: True, 1300.0: False, 1900.0: True},
        ),  # 20 times 60 s after the last one, which ended at 661
        (2, 0.0, {1.0: False, 2.0: True, 3.0: False, 4.0: True}),
        (0, 0.0, {601.0: False, 9999.0: False}),
    ],
)
def test_when_a_checkpoint_is_due(session, trainer, tmp_path, every, cost, saves):
    now = [0.0]
    real = trainer.write_model

    def slow(folder, tokenizer):
        now[0] += cost
        real(folder, tokenizer)

    trainer.write_model = slow
    assert INTERVAL == 600.0
    with session(every, clock=lambda: now[0]) as one:
        for time, due in saves.items():
            now[0] = time
            before = held(tmp_path / "sft.checkpoint")
            run(one, trainer, 1)
            assert held(tmp_path / "sft.checkpoint") == (trainer.done if due else before), time


# ---- F1: signals ----


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_between_steps_saves_the_finished_ones(session, trainer, tmp_path, signum):
    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match=signum.name) as stopped, session() as one:
        run(one, trainer, 3)
        signal.raise_signal(signum)
        pytest.fail("the signal did not end the training")
    assert stopped.value.saved and held(tmp_path / "sft.checkpoint") == 3
    (note,) = stopped.value.__notes__
    assert note == f"the checkpoint {tmp_path / 'sft.checkpoint'} holds 3 steps, and a resumed run continues from there"
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_signal_within_a_step_lets_it_finish(session, trainer, tmp_path, times):
    """Several signals at once count as one: terminals and batch systems send them to a process and to its group."""

    def within():
        for _ in range(times):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as stopped, session() as one:
        run(one, trainer, 3, within)
    assert stopped.value.saved and held(tmp_path / "sft.checkpoint") == 3
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_second_signal_seconds_later_abandons_the_step(session, trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_engine.recipes.session.ONE_SIGNAL", 0.0)

    def within():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as stopped, session(every=2) as one:
        run(one, trainer, 3, within)
    assert stopped.value.saved and held(tmp_path / "sft.checkpoint") == 2
    assert "step 3 had changed weights" in stopped.value.__notes__[0] and "holds 2 steps" in stopped.value.__notes__[0]


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(session, trainer, tmp_path):
    trainer.full = lambda name: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, session(every=1) as one:
        run(one, trainer, 1)
    assert stopped.value.saved and held(tmp_path / "sft.checkpoint") == 1


def test_without_a_finished_step_nothing_is_saved(session, tmp_path):
    with pytest.raises(Stopped) as stopped, session():
        signal.raise_signal(signal.SIGTERM)
    assert not stopped.value.saved and not (tmp_path / "sft.checkpoint").exists()


def test_ignored_signals_stay_ignored(session, trainer):
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with session() as one:
            run(one, trainer, 1)
            signal.raise_signal(signal.SIGHUP)
            run(one, trainer, 1)
        assert trainer.done == 2 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- F2: a step that failed after it had changed weights ----


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("every, kept", [(2, 2), (0, 0)])
def test_changed_weights_replace_no_checkpoint(session, trainer, tmp_path, error, every, kept):
    def within():
        raise error

    with pytest.raises(error) as raised, session(every) as one:
        run(one, trainer, 4, within)
    assert held(tmp_path / "sft.checkpoint") == kept
    (note,) = raised.value.__notes__
    assert note.startswith("step 4 had changed weights and was not finished, so nothing was saved; ")
    assert ("holds 2 steps" if kept else "there is no checkpoint") in note


# ---- F3: exceptions between steps ----


class Own(BaseException):
    """An exception that no handler names."""


@pytest.mark.parametrize(
    "error",
    [OSError("disk"), MemoryError(), KeyError("x"), TypeError("x"), AssertionError(), SystemExit(3), Own()],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_saves_the_finished_steps(session, trainer, tmp_path, error):
    with pytest.raises(type(error)) as raised, session() as one:
        run(one, trainer, 3)
        raise error
    assert raised.value is error and held(tmp_path / "sft.checkpoint") == 3
    assert "holds 3 steps" in error.__notes__[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_replace_no_checkpoint(session, trainer, tmp_path, value):
    with pytest.raises(ValueError) as raised, session(every=1) as one:
        run(one, trainer, 2)
        trainer.step(lambda: trainer.weight.fill_(value))
        raise ValueError("bad reward")
    assert held(tmp_path / "sft.checkpoint") == 2 and not list(tmp_path.glob("*.rescued"))
    assert "the weight weight is not finite; the checkpoint" in raised.value.__notes__[0]


# ---- F4: a save that fails ----


def test_a_failed_save_keeps_the_last_checkpoint_and_writes_next_to_it(session, trainer, tmp_path):
    with pytest.raises(OSError) as raised, session(every=2) as one:
        run(one, trainer, 2)
        trainer.full = lambda name: name == "sft.checkpoint"
        run(one, trainer, 2)
    rescued = tmp_path / "sft.checkpoint.rescued"
    assert held(tmp_path / "sft.checkpoint") == 2 and held(rescued) == 4
    assert f"everything after step 4 is in {rescued}; move it to" in raised.value.__notes__[0]


def test_only_the_model_is_saved_if_the_whole_state_does_not_fit(session, trainer, tmp_path, monkeypatch):
    """The optimizer state is two thirds of a checkpoint."""
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 5000}))
    full = [True]
    trainer.full = lambda name: full[0]
    real = TrainingSession._write_model

    def write_model(self, place):
        full[0] = False
        real(self, place)

    monkeypatch.setattr(TrainingSession, "_write_model", write_model)
    monkeypatch.setattr(TrainingSession, "_other_places", lambda self: [tmp_path / "other"])
    with pytest.raises(OSError) as raised, session() as one:
        run(one, trainer, 3)
        one.save()
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["config.json", "model.safetensors"]
    assert float(load_file(tmp_path / "other" / "model.safetensors")["weight"][0]) == 3
    note = raised.value.__notes__[0]
    assert f"the model, without optimizer state, after step 3 is in {tmp_path / 'other'}" in note
    assert "there is no checkpoint; 7,000 bytes are missing on the disk of" in note  # 4 * 1,000 + 4 * 2,000 - 5,000


def test_if_no_place_can_be_written_the_note_has_the_missing_bytes(session, trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 0}))
    with pytest.raises(OSError) as raised, session(every=1) as one:
        run(one, trainer, 1)
        trainer.full = lambda name: True
        run(one, trainer, 1)
    note = raised.value.__notes__[0]
    assert re.search(r"^no other place could be written either; the checkpoint .* holds 1 step,", note)
    assert "12,000 bytes are missing" in note and held(tmp_path / "sft.checkpoint") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".new", ".rescued"))]


# ---- F5: a run that replaces an earlier one ----


def test_an_overwriting_run_deletes_the_old_checkpoint_with_its_first_step(session, trainer, tmp_path):
    """Otherwise `--resume` would continue the old checkpoint with the new metrics, as if they were of one run."""
    with session(every=1) as one:
        run(one, trainer, 3)
    (tmp_path / "sft").mkdir()  # the finished model of an earlier run
    trainer.done = 0
    trainer.weight.zero_()
    with session(replaces=[tmp_path / "sft.checkpoint", tmp_path / "sft"]) as one:
        assert held(tmp_path / "sft.checkpoint") == 3 and len(read_metrics(tmp_path)) == 3
        assert (tmp_path / "sft").exists()
        run(one, trainer, 1)
        assert not (tmp_path / "sft.checkpoint").exists() and len(read_metrics(tmp_path)) == 1
        assert not (tmp_path / "sft").exists()
