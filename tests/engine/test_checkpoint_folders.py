"""Checkpoints that are kept, damaged, full-disk, links: which are there after a save, and which one a run resumes."""

import errno
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_engine import files
from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.checkpoint_folders import Keeper, kept_checkpoints, remove_checkpoints
from rlhf_engine.config import CheckpointConfig, RunConfig
from rlhf_engine.manifest import damage
from rlhf_engine.recipes.session import load_newest
from tests.engine.helpers.counter import Counter


def save(folder, trainer, keeper, score=None, config=None):
    keeper.save(
        lambda retire: save_checkpoint(folder, trainer, None, config or RunConfig(), score=score, retire=retire)
    )


def steps_of(folder):
    return json.loads((folder / "trainer.json").read_text())["done"]


def kept(folder):
    return [steps_of(one) for one in (folder, *kept_checkpoints(folder))]


@pytest.mark.parametrize(
    "settings, scores, expected",
    [
        (CheckpointConfig(keep=1), [None] * 5, [5]),
        (CheckpointConfig(), [None] * 5, [5, 4]),
        (CheckpointConfig(keep=3), [None] * 5, [5, 4, 3]),
        (CheckpointConfig(keep=1, best="score_mean"), [1.0, 3.0, 2.0, 0.0, 1.0], [5, 2]),
        (CheckpointConfig(keep=2, best="score_mean"), [1.0, 3.0, 2.0, 0.0, 1.0], [5, 4, 2]),
        (CheckpointConfig(keep=2, best="score_mean"), [1.0, 3.0, 2.0, 0.0, 4.0], [5, 4]),
        (CheckpointConfig(keep=2, best="score_mean"), [None] * 5, [5, 4]),
    ],
)
def test_the_last_checkpoints_and_the_best_one_are_kept(tmp_path, settings, scores, expected):
    folder, trainer = tmp_path / "ppo", Counter()
    keeper = Keeper(folder, settings)
    for score in scores:
        trainer.step()
        save(folder, trainer, keeper, score)
    assert kept(folder) == expected
    assert all(damage(one) is None for one in (folder, *kept_checkpoints(folder)))
    names = {"ppo", "checkpoints"} if len(expected) > 1 else {"ppo"}
    assert {path.name for path in tmp_path.iterdir()} == names
    remove_checkpoints(folder)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def three(tmp_path):
    """A folder with checkpoints after 1, 2 and 3 steps, the first two of them kept ones."""
    folder, trainer = tmp_path / "ppo", Counter()
    keeper = Keeper(folder, CheckpointConfig(keep=3))
    for _ in range(3):
        trainer.step()
        save(folder, trainer, keeper)
    return folder


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": flip,
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
    "longer": lambda path, rng: path.write_bytes(path.read_bytes() + b" "),
    "emptied": lambda path, rng: path.write_bytes(b""),
    "zeros": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path, rng: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_found_and_the_run_continues_from_the_checkpoint_before(three, caplog, kind):
    """Each file of the checkpoint is damaged in turn, at places that a seed chooses."""
    names = sorted(path.name for path in three.iterdir())
    assert names == [
        *("config.json", "config.yaml", "manifest.json", "model.safetensors", "optimizer.safetensors", "trainer.json")
    ]
    for name in names:
        for seed in range(8 if kind in ("flipped bit", "cut") else 1):
            before = (three / name).read_bytes()
            DAMAGES[kind](three / name, random.Random(seed))
            trainer = Counter()
            assert resume(three, trainer, RunConfig()) == three.parent / "checkpoints" / "ppo-2", (name, seed)
            assert trainer.done == 2 and float(trainer.weight[0]) == 2
            (shown,) = caplog.messages
            assert name in shown and "the run continues from the earlier checkpoint" in shown
            caplog.clear()
            (three / name).write_bytes(before)
    assert resume(three, Counter(), RunConfig()) == three and not caplog.messages


def test_two_damaged_checkpoints_are_skipped_and_three_are_an_error(three, caplog):
    places = [three, *kept_checkpoints(three)]
    for place in places[:2]:
        flip(place / "model.safetensors", random.Random(0))
    trainer = Counter()
    assert resume(three, trainer, RunConfig()) == places[2] and trainer.done == 1
    assert len(caplog.messages) == 2
    flip(places[2] / "model.safetensors", random.Random(0))
    with pytest.raises(ValueError, match=r"model\.safetensors: the content differs .* --overwrite") as refused:
        resume(three, trainer, RunConfig())
    assert str(three) in str(refused.value) and not trainer.whole


def test_a_damaged_checkpoint_is_not_kept_when_it_is_replaced(three):
    flip(three / "model.safetensors", random.Random(0))
    trainer = Counter()
    keeper = Keeper(three, CheckpointConfig(keep=3), loaded=resume(three, trainer, RunConfig()))
    for expected in ([3, 2, 1], [4, 3, 2]):
        trainer.step()
        save(three, trainer, keeper)
        assert kept(three) == expected
        assert all(damage(one) is None for one in (three, *kept_checkpoints(three)))


def test_a_run_whose_newest_folder_is_gone_continues_from_the_one_before(three):
    files.remove(three)
    trainer = Counter()
    assert resume(three, trainer, RunConfig()).name == "ppo-2" and trainer.done == 2


def test_resuming_without_a_checkpoint_is_an_error_but_a_stage_begins_from_the_start(tmp_path, caplog):
    with pytest.raises(ValueError, match="ppo: there is no checkpoint to resume from"):
        resume(tmp_path / "ppo", Counter(), RunConfig())
    assert load_newest(tmp_path / "ppo", Counter(), RunConfig(), {}) is None
    assert "there is no checkpoint yet, so the run begins from the start" in caplog.text


@pytest.mark.parametrize("name", ["weight", "moment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensors_that_are_not_finite_replace_no_checkpoint(three, name, value):
    trainer = Counter()
    resume(three, trainer, RunConfig())
    trainer.step()
    getattr(trainer, name)[7] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        save(three, trainer, Keeper(three, CheckpointConfig()))
    assert kept(three) == [3, 2, 1]


class Faulty(files.Disk):
    """A disk on which `fault(operation, path)` may raise or change the file."""

    def __init__(self, fault):
        self.fault = fault

    def sync(self, path):
        super().sync(path)
        self.fault("sync", path)

    def rename(self, source, target):
        self.fault("rename", source)
        super().rename(source, target)


def test_a_disk_that_loses_what_was_written_is_found_before_the_old_checkpoint_goes(three, monkeypatch):
    def lose(operation, path):
        if operation == "sync" and path.name == "model.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"x")

    trainer = Counter()
    resume(three, trainer, RunConfig())
    trainer.step()
    monkeypatch.setattr(files, "disk", Faulty(lose))
    with pytest.raises(OSError, match=r"model\.safetensors: the content differs .* did not store"):
        save(three, trainer, Keeper(three, CheckpointConfig(keep=3)))
    assert kept(three) == [3, 2, 1]


@pytest.mark.parametrize("place", ["ppo", "ppo.new"])
def test_a_rename_that_fails_is_undone(three, monkeypatch, place):
    """A mount point, for example, cannot be renamed."""

    def fail(operation, path):
        if operation == "rename" and path.name == place:
            raise OSError(errno.EBUSY, "busy")

    trainer = Counter()
    resume(three, trainer, RunConfig())
    trainer.step()
    monkeypatch.setattr(files, "disk", Faulty(fail))
    with pytest.raises(OSError, match="busy"):
        save(three, trainer, Keeper(three, CheckpointConfig(keep=3)))
    assert kept(three) == [3, 2, 1]


def test_a_full_disk_costs_the_kept_checkpoints_and_not_the_new_one(three, monkeypatch, caplog):
    def fault(operation, path):
        if operation == "sync" and path.name == "model.safetensors" and kept_checkpoints(three):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = Counter()
    resume(three, trainer, RunConfig())
    trainer.step()
    monkeypatch.setattr(files, "disk", Faulty(fault))
    save(three, trainer, Keeper(three, CheckpointConfig(keep=3)))
    assert kept(three) == [4, 3]
    assert "the earlier checkpoints in" in caplog.text


def test_a_folder_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "large").mkdir()
    folder, trainer = tmp_path / "out" / "ppo", Counter()
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "large" / "policy")
    keeper = Keeper(folder, CheckpointConfig())
    for number in (1, 2, 3):
        trainer.step()
        save(folder, trainer, keeper)
        assert folder.is_symlink() and steps_of(folder) == number
    assert {path.name for path in (tmp_path / "large").iterdir()} == {"policy", "checkpoints"}
    assert resume(folder, Counter(), RunConfig()) == folder
    remove_checkpoints(folder)
    assert not list((tmp_path / "large").iterdir()) and not folder.is_symlink()


def test_saving_needs_no_second_copy_of_the_model(tmp_path):
    """256 MB of weights and optimizer state; a copy of the largest tensor would be 192 MB."""
    trainer = Counter()
    trainer.weight, trainer.moment = torch.ones(16_000_000), torch.ones(48_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    save_checkpoint(tmp_path / "ppo", trainer, None, RunConfig())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - max(before, rss) < 30_000, (before, rss, after)


# ---- the lock ----

HOLDER = """
import sys, time
from rlhf_engine.files import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_releases_the_folder(tmp_path):
    folder = tmp_path / "deep" / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    try:
        refused = pytest.raises(ValueError, match=rf"{folder}: process {holder.pid} on .* is writing there")
        with refused, files.FolderLock(folder):
            pytest.fail("two processes hold the lock")
    finally:
        holder.kill()
        holder.wait()
    assert (folder / ".lock").exists()
    with files.FolderLock(folder):
        assert (folder / ".lock").read_text().startswith(f"{os.getpid()} on ")
    assert not list(folder.iterdir())


def test_the_lock_leaves_nothing_where_nothing_was(tmp_path):
    with files.FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_reads_as_safetensors(three):
    assert float(load_file(three / "model.safetensors")["weight"][0]) == 3
    save_file({"weight": torch.zeros(1)}, three / "other.safetensors")  # a user's further file is no damage
    assert damage(three) is None
