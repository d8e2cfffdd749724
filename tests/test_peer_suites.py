"""The pytest plugin of `benchmarks.peer_suites` on a small package, and the table of suites."""

import json

import pytest
import torch

from benchmarks.peer_suites import __main__ as command
from benchmarks.peer_suites import plugin

pytest_plugins = ["pytester"]

SUITE = """
[peer]
version = "1"
source = "sdist"
files = ["test_peer.py"]
stubs = ["not_installed", "not_installed.inner"]
bare = ["peer.heavy"]
[peer.swaps]
"peer.loss:double" = "ours:triple"
"peer.loss:Head.scale" = "ours:scale"
[peer.expected_failures]
'test_value\\[2\\]' = "ours multiplies by three"
"""
TESTS = """
import pytest
import peer
from peer.loss import TABLE, Head, double

@pytest.mark.parametrize("x", [0, 2])
def test_value(x):
    assert double(x) == 2 * x

def test_references():
    assert peer.double(1) == TABLE["double"](1) == double(1) == 3

def test_method():
    assert Head().scale() == 5

def test_other():
    from peer.heavy.light import CONSTANT
    from not_installed.inner import decorator
    assert CONSTANT == 7 and decorator(test_other) is not None
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """Return a function that runs the suite of the package `peer` and returns the exit code and the report."""
    pytester.mkpydir("peer")
    pytester.path.joinpath("peer", "__init__.py").write_text("from .loss import double\n")
    loss = "def double(x): return 2 * x\nTABLE = {'double': double}\nclass Head:\n    def scale(self): return 1\n"
    pytester.path.joinpath("peer", "loss.py").write_text(loss)
    heavy = pytester.mkpydir("peer/heavy")
    heavy.joinpath("__init__.py").write_text("import too_much\n")
    heavy.joinpath("light.py").write_text("CONSTANT = 7\n")
    pytester.makepyfile(ours="def triple(x): return 3 * x\ndef scale(head): return 5\n", test_peer=TESTS)
    pytester.syspathinsert()

    def run(table=SUITE, *options):
        monkeypatch.setattr(plugin, "TABLE", pytester.makefile(".toml", table))
        monkeypatch.setattr("sys.dont_write_bytecode", True)
        arguments = ["-p", plugin.__name__, "--peer", "peer", "--report", "report.json", *options]
        result = pytester.runpytest_inprocess(*arguments)
        return result.ret, json.loads(pytester.path.joinpath("report.json").read_text())

    return run


def test_functions_are_swapped_wherever_the_package_refers_to_them(suite):
    code, report = suite()
    assert code == 0 and report["failed"] == report["problems"] == []
    assert report["outcomes"] == {"passed": 4, "expected failure": 1}
    assert report["calling"] == {"passed": 3, "expected failure": 1}  # test_other calls none
    assert report["calls"] == {"peer.loss:double": 5, "peer.loss:Head.scale": 1}
    assert report["expected"] == {"ours multiplies by three": 1}


def test_originals_are_counted_and_nothing_is_expected_to_fail(suite):
    code, report = suite(SUITE, "--originals")
    assert code == 1 and report["outcomes"] == {"passed": 3, "failed": 2}
    assert report["failed"] == ["test_peer.py::test_method", "test_peer.py::test_references"]
    assert report["calls"]["peer.loss:double"] == 5


def test_an_expected_failure_that_matches_no_test_fails_the_run(suite):
    code, report = suite(SUITE + "'test_value\\[3\\]' = 'no such test'\n")
    assert code == 1 and report["problems"] == ["test_value\\[3\\]: matches no test"]


def test_an_expected_failure_that_passes_fails_the_run(suite):
    code, report = suite(SUITE + "'test_value\\[0\\]' = '3 * 0 is 2 * 0'\n")
    assert code == 1 and report["failed"] == ["test_peer.py::test_value[0]"]


def test_a_swapped_function_that_is_never_called_fails_the_run(suite):
    code, report = suite(SUITE, "--deselect", "test_peer.py::test_method")
    assert code == 1 and report["problems"] == ["peer.loss:Head.scale: swapped and never called"]


def test_tensors_of_a_gpu_are_created_on_the_cpu():
    with plugin.OnCPU():
        x = torch.ones(2, device="cuda") + torch.zeros(2).to("cuda:0") + torch.zeros(2).cuda()
        assert x.to(torch.device("cuda")).device.type == "cpu" and x.double().dtype == torch.float64


def test_the_table_is_complete():
    for peer, entry in plugin.read_table().items():
        assert entry.source in ("sdist", "checkout") and bool(entry.repository) == (entry.source == "checkout"), peer
        assert entry.files and entry.swaps
        for ours in entry.swaps.values():
            owner, name = plugin.resolve(ours)
            assert callable(getattr(owner, name)), ours
        assert all(reason.strip() for reason in entry.expected_failures.values()), peer


def test_a_suite_without_its_checkout_says_how_to_get_it(monkeypatch, tmp_path):
    entry = next(s for s in plugin.read_table().values() if s.source == "checkout")
    clone = f"git clone --depth 1 --branch {entry.version} {entry.repository} {entry.peer}"
    monkeypatch.delenv("PEER_CHECKOUTS", raising=False)
    with pytest.raises(command.Missing, match=f"set PEER_CHECKOUTS .*{clone}"):
        command.source(entry)
    monkeypatch.setenv("PEER_CHECKOUTS", str(tmp_path))
    with pytest.raises(command.Missing, match=f"does not exist; run there: {clone}"):
        command.source(entry)
    (tmp_path / entry.peer).mkdir()
    assert command.source(entry) == tmp_path / entry.peer
