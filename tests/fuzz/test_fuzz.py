"""A short run of the fuzzer over all kinds, and inputs that its checks must report. The long run is `python -m tests.fuzz`."""

import json
import time
from random import Random

import numpy as np
import pytest

from tests.fuzz.harness import Case, Kind, Wrong, run_case
from tests.fuzz.kinds import KINDS, fuzz

CASES = 2_000


def test_every_damaged_input_is_refused_in_one_line_or_read_as_it_is():
    report = fuzz(CASES, seed=1, processes=1)
    assert not report.faults, "\n".join(report.faults)
    assert sum((report.accepted + report.refused).values()) >= 0.98 * CASES
    # A kind whose cases are all accepted, or all refused, tests little.
    assert all(report.refused.values()) and all(report.accepted[name] for name in KINDS if KINDS[name].share > 1)


class Planted(Kind):
    """A kind whose function is that of a test."""

    name, share = "planted", 0

    def __init__(self, folder, function):
        super().__init__(folder)
        self.function = function

    def case(self, random):
        return Case({"file": random.randbytes(2)})

    def run(self, case):
        self.function(self.folder / "file")


def hang(path):
    while True:
        time.sleep(0)


def refuse(text, kind=ValueError):
    def run(path):
        raise kind(text.format(path=path))

    return run


@pytest.mark.parametrize(
    "function, fault",
    [
        (lambda path: None, None),
        (refuse("{path}: wrong"), None),
        (refuse("{path}: " + "x" * 5_000), None),  # the command shortens it
        (refuse("wrong"), "names none of"),
        (refuse("{path}", KeyError), "exit code 1"),
        (refuse("{path}", RecursionError), "exit code 1"),
        (refuse("{path}", MemoryError), "exit code 1"),
        (refuse("{path}", Wrong), "exit code 1"),
        (refuse("{path}", GeneratorExit), "GeneratorExit"),
        (lambda path: json.loads("{"), "names none of"),
        (lambda path: np.ones(96 << 20, np.uint8).sum(), "memory grew"),
        (hang, "no end"),
    ],
    ids=[
        "accepts",
        "refuses",
        "long",
        "unnamed",
        "key",
        "recursion",
        "memory",
        "wrong",
        "exit",
        "library",
        "large",
        "hang",
    ],
)
def test_the_harness_reports_what_must_not_happen(tmp_path, monkeypatch, function, fault):
    monkeypatch.setattr("tests.fuzz.harness.SECONDS", 0.2 if function is hang else 5.0)
    monkeypatch.setattr("tests.fuzz.harness.MEGABYTES", 64)
    found = run_case(Planted(tmp_path, function), 0, 0)
    assert found is None if fault is None else fault in (found or "accepted")
    assert not (tmp_path / "file").exists()


def test_a_case_that_ends_its_process_is_a_fault(monkeypatch):
    class Ends(Planted):
        name, share = "ends", 1

        def __init__(self, folder):
            super().__init__(folder, lambda path: path.read_bytes()[0] < 128 and __import__("os")._exit(3))

    monkeypatch.setitem(KINDS, "ends", Ends)
    report = fuzz(20, 0, ["ends"], processes=2)
    assert 2 <= len(report.faults) <= 18 and "status" in report.faults[0]
    assert report.accepted["ends"] + len(report.faults) == 20


def test_equal_seeds_give_equal_cases(tmp_path):
    kind = KINDS["jsonl"](tmp_path)
    cases = [[kind.case(Random(f"{seed} {n}")) for n in range(50)] for seed in (0, 0, 1)]
    assert cases[0] == cases[1] != cases[2]
