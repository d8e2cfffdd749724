"""When callbacks are called, and the effects of one that raises."""

import pytest
import torch

from rlhf_engine.ppo.callbacks import Callback, Checkpoints, EarlyStopping, MetricsLog
from tests.engine.helpers.tiny_trainer import OnUpdate, make_trainer


class Recorder(Callback):
    """Records the names of the calls with the number of finished updates."""

    def __init__(self):
        self.seen = []

    def on_rollout(self, trainer, scored):
        self.seen.append(("rollout", trainer.updates_done))

    def on_update(self, trainer, log):
        self.seen.append(("update", trainer.updates_done))

    def on_checkpoint(self, trainer, folder):
        self.seen.append((folder, trainer.updates_done))

    def on_end(self, trainer, error):
        self.seen.append(("end", error))


class Broken(Callback):
    """Raises when training ends."""

    def on_end(self, trainer, error):
        raise OSError("the plot could not be drawn")


class OnlyUpdates:
    """Not a `Callback`, but with one of its methods."""

    def __init__(self):
        self.scores = []

    def on_update(self, trainer, log):
        self.scores.append(log["score_mean"])


def test_the_calls_of_train_and_of_a_single_step():
    recorder, partial = Recorder(), OnlyUpdates()
    trainer = make_trainer()
    trainer.callbacks += [recorder, partial, Checkpoints(lambda trainer: "folder", every=2)]
    trainer.step()
    assert recorder.seen == [("rollout", 0), ("update", 1)] and len(partial.scores) == 1
    recorder.seen.clear()
    trainer.train()
    assert recorder.seen == [("rollout", 1), ("update", 2), ("folder", 2), ("end", None)]


def test_on_end_of_every_callback_is_called():
    first, last, trainer = Recorder(), Recorder(), make_trainer(updates=1)
    trainer.callbacks += [first, Broken(), last]
    with pytest.raises(OSError, match="plot"):
        trainer.train()
    assert first.seen[-1] == ("end", None) and last.seen[-1][0] == "end"


def test_early_stopping():
    recorder, trainer = Recorder(), make_trainer(updates=5)
    trainer.callbacks += [EarlyStopping("kl", above=-1.0, updates=2), recorder]
    trainer.train()
    assert trainer.updates_done == 2 and recorder.seen[-1] == ("end", None)


def test_no_step_after_a_partial_update():
    """The weights are those of a partial update, from which a run cannot continue."""
    trainer = make_trainer()
    optimizer, calls = trainer.update_rule.optimizer, []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step()
    handle.remove()
    with pytest.raises(RuntimeError, match="update 1 failed after it had changed weights; load a checkpoint"):
        trainer.step()


def test_a_reward_that_returns_no_tensor_is_refused():
    with pytest.raises(ValueError, match="reward: got list, expected a tensor of 16 scores; use `text_reward`"):
        make_trainer(reward=lambda rollout: [0.0] * len(rollout)).step()
    assert make_trainer(reward=lambda rollout: torch.zeros(len(rollout))).step()["score_mean"] == 0.0


def test_an_update_at_whose_end_a_callback_raises_is_logged():
    """A checkpoint counts the update as finished, so the metrics may not have a gap."""

    class Fails(Callback):
        def on_update(self, trainer, log):
            if trainer.updates_done == 2:
                raise OSError("a callback")

    class Lines:
        def __init__(self):
            self.steps = []

        def write(self, step, metrics):
            self.steps.append((step, "score_mean" in metrics))

    lines = Lines()
    trainer = make_trainer(updates=3)
    trainer.callbacks += [Fails(), MetricsLog(lines)]
    with pytest.raises(OSError, match="a callback"):
        trainer.train()
    assert lines.steps == [(1, True), (2, True)] and trainer.whole


@pytest.mark.parametrize("where", ["divergence.add", "_measured"])
def test_an_interrupt_at_the_end_of_an_update_writes_that_update_s_numbers(where, monkeypatch):
    """The state counts the update as finished, so its line has its own numbers, not those of the update before."""
    whole, seen, lines = make_trainer(updates=2), [], []
    whole.callbacks.append(OnUpdate(lambda number, log: seen.append((number, log["score_mean"], log["kl"]))))
    whole.train()

    class Lines:
        def write(self, step, metrics):
            lines.append((step, metrics["score_mean"], metrics["kl"]))

    trainer = make_trainer(updates=2)
    owner, name = (trainer.divergence, "add") if where == "divergence.add" else (trainer, "_measured")
    real = getattr(owner, name)

    def interrupted(*arguments):
        if trainer.updates_done == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
    trainer.callbacks.append(MetricsLog(Lines()))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert lines == seen and seen[0][1:] != seen[1][1:]
