"""The simulated disk itself: which operations it counts, and what its crashes leave."""

import errno
import os
from random import Random

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf_engine import files
from tests.engine.faults.disk import Fault, FaultyDisk, Killed, read_tree


def run(root, fault, action, seed=0):
    """Return the disk after `action(root)` has ended, and the exception that ended it."""
    root.mkdir(exist_ok=True)
    disk = FaultyDisk(root, fault, Random(seed))
    with disk.mounted():
        try:
            action(root)
        except (OSError, SafetensorError, Killed) as error:
            return disk, error
    return disk, None


def write_two(root):
    """Five operations: a file is opened, written and synced, and a second one is opened and written."""
    (root / "a").write_text("first file")
    files.disk.sync(root / "a")
    (root / "b").write_text("second file")


@pytest.mark.parametrize(
    "at, expected",
    [
        (1, {}),
        (2, {"a": b""}),
        (3, {"a": b"first file"}),
        (4, {"a": b"first file"}),
        (5, {"a": b"first file", "b": b""}),
    ],
)
def test_a_kill_leaves_what_the_operations_before_it_did(tmp_path, at, expected):
    disk, error = run(tmp_path / "disk", Fault("kill", at), write_two)
    assert isinstance(error, Killed) and disk.fired
    assert read_tree(tmp_path / "disk") == expected
    assert run(tmp_path / "other", None, write_two)[0].count == 5


def test_a_torn_write_leaves_a_part(tmp_path):
    found = set()
    for seed in range(20):
        _, error = run(tmp_path / "disk", Fault("torn_write", 5), write_two, seed)
        assert isinstance(error, Killed)
        found.add(read_tree(tmp_path / "disk")["b"])
    assert len(found) > 3 and all(b"second file".startswith(one) and 0 < len(one) < 11 for one in found)


def test_a_power_cut_keeps_what_was_synced_and_loses_all_orders_of_the_rest(tmp_path):
    def action(root):
        write_two(root)
        (root / "b").rename(root / "c")
        os.mkdir(root / "d")

    found = set()
    for seed in range(60):
        _, error = run(tmp_path / f"disk{seed}", Fault("power_cut", 7), action, seed)
        assert isinstance(error, Killed)
        tree = read_tree(tmp_path / f"disk{seed}")
        assert tree.pop("a") == b"first file" and len(tree) <= 1
        found |= {*tree.items()} or {None}
    names = {one and one[0] for one in found}
    assert names == {None, "b", "c"}
    contents = {one[1] for one in found if one}
    assert {b"", b"second file"} <= contents and any(one.endswith(b"\0") for one in contents)


@pytest.mark.parametrize("kind, code", [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
@pytest.mark.parametrize("lasting", [False, True])
def test_errors_of_writes_have_their_number(tmp_path, kind, code, lasting):
    def action(root):
        for name in ("a", "b"):
            try:
                (root / name).write_text("text")
            except OSError as error:
                assert error.errno == code
                failed.append(name)

    failed = []
    run(tmp_path / "disk", Fault(kind, 2, lasting), action)
    assert failed == ["a", "b"] if lasting else ["a"]


def test_short_writes_are_completed_by_python_and_tensors_fail_as_safetensors_does(tmp_path):
    disk, error = run(tmp_path / "disk", Fault("short_writes", 1), write_two)
    assert error is None and disk.fired and read_tree(tmp_path / "disk") == {"a": b"first file", "b": b"second file"}
    assert disk.count > 5
    weights = {"w": torch.arange(8.0)}
    _, error = run(tmp_path / "full", Fault("enospc", 1), lambda root: save_file(weights, root / "w.safetensors"))
    assert isinstance(error, SafetensorError) and "(os error 28)" in str(error)
    _, error = run(tmp_path / "torn", Fault("torn_write", 1), lambda root: save_file(weights, root / "w.safetensors"))
    assert isinstance(error, Killed)
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "torn" / "w.safetensors")


def test_the_clock_is_that_of_the_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    disk = FaultyDisk(tmp_path / "disk", None, Random(0), seconds=10.0)
    with disk.mounted():
        before = files.now()
        write_two(tmp_path / "disk")
        assert files.now() - before == 50.0
    assert files.now() != before
