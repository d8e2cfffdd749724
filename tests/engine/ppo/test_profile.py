"""The profile of an update: its phases, their operations, and the FLOPs of their products."""

import json

import pytest

from rlhf_engine.config import PPOConfig
from rlhf_engine.ppo.profile import TABLE, TRACE, UpdateProfile, phases_of
from tests.engine.helpers.tiny_trainer import make_trainer


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Return the folder of a profile of the second of three updates, its log, and its phases."""
    folder, logs, found = tmp_path_factory.mktemp("run") / "profile", [], {}
    trainer = make_trainer(updates=3)

    class Kept(UpdateProfile):
        def _write(self, profile):
            found.update(phases_of(profile.events()))
            super()._write(profile)

    trainer.callbacks.append(Kept(folder, 2))
    for _ in range(3):
        logs.append(trainer.step())
    return folder, logs[1], found


def test_operations_fill_their_phases(profiled):
    folder, log, phases = profiled
    assert list(phases) == ["generate", "score", "train"]
    for name, seconds in (("generate", "seconds_collect"), ("score", "seconds_score"), ("train", "seconds_update")):
        spent = sum(one.seconds for one in phases[name].operations.values())
        assert 0.3 * phases[name].seconds < spent <= 1.01 * phases[name].seconds
        assert phases[name].seconds <= log[seconds]
    text = (folder / TABLE).read_text()
    assert text.startswith("# Update 2\n") and all(f"\n## {name}\n" in text for name in phases)
    assert json.loads((folder / TRACE).read_text())["traceEvents"]


def test_training_has_three_times_the_products_of_a_pass(profiled):
    """Two epochs of forward and backward passes, against one forward pass of policy and reference: 2 x 3 / (1 or 2)."""
    *_, phases = profiled
    assert 2.5 < phases["train"].flops / phases["score"].flops < 6.5
    assert phases["generate"].flops > 0


@pytest.mark.parametrize("update", [1, 4])
def test_an_update_that_cannot_be_profiled_is_refused(update):
    with pytest.raises(ValueError, match=f"profile_update: got {update}, expected 2 to updates 3"):
        PPOConfig(updates=3, profile_update=update)


def test_an_error_within_the_update_stops_the_profiler(tmp_path):
    trainer = make_trainer(
        updates=3, reward=lambda rollout: 1 / 0 if trainer.updates_done else rollout.mask.sum(1).float()
    )
    profile = UpdateProfile(tmp_path, 2)
    trainer.callbacks.append(profile)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert profile.active is None and not list(tmp_path.iterdir())
