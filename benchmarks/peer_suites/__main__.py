"""`python -m benchmarks.peer_suites [PEER ...]`: run the unit tests that other projects ship, with our functions swapped in.

`suites.toml` lists the suites. A suite that a source distribution contains is downloaded with pip. The others need a checkout
of the peer's repository in the subfolder PEER of the folder in the environment variable PEER_CHECKOUTS; without it, they are
not run. The counts are printed and, unless `--originals` is given, written to `benchmarks/results/peer_suites.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.agreement.originals import SOURCES, Missing
from benchmarks.harness import RESULTS
from benchmarks.peer_suites.plugin import Suite, read_table

ROOT = Path(__file__).parents[2]
COLUMNS = ("peer", "version", "passed", "of which call our functions", "expected failures", "skipped", "failed")


def source(suite: Suite) -> Path:
    """Return the folder with the tests of a suite; download its source distribution if it is not there.

    Raises:
        Missing: the suite needs a checkout that is not there.
    """
    if suite.source == "sdist":
        return _unpacked(suite)
    parent = os.environ.get("PEER_CHECKOUTS")
    clone = f"git clone --depth 1 --branch {suite.version} {suite.repository} {suite.peer}"
    if not parent:
        raise Missing(f"set PEER_CHECKOUTS to a folder in which you ran: {clone}")
    folder = Path(parent, suite.peer).resolve()
    if not folder.is_dir():
        raise Missing(f"{folder} does not exist; run there: {clone}")
    return folder


def _unpacked(suite: Suite) -> Path:
    name = f"{suite.peer.replace('-', '_')}-{suite.version}"
    folder = SOURCES / name
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            wanted = f"{suite.peer}=={suite.version}"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", suite.peer]
            subprocess.run([*pip, "--dest", scratch, wanted], check=True)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                archive.extractall(SOURCES, filter="data")
    return folder


def run(suite: Suite, root: Path, *, originals: bool = False) -> dict[str, Any]:
    """Run one suite in a separate process and return the report of the plugin, with pytest's exit code.

    `python -m pytest` puts the root on the path, so that tests and functions are of the same version.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.peer_suites.plugin", "-p", "no:cacheprovider"),
            *("--peer", suite.peer, "--report", str(report), "--override-ini", "addopts=", "--tb", "short", "-rfE"),
            *(["--originals"] if originals else []),
            *([] if suite.conftest else ["--noconftest"]),
            *(["-k", suite.select] if suite.select else []),
            *suite.files,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, cwd=root, env=environment).returncode
        found = json.loads(report.read_text()) if report.exists() else {"outcomes": {}, "calling": {}, "expected": {}}
    return {"version": suite.version, "exit_code": code, **found}


def row(peer: str, found: dict[str, Any]) -> str:
    """Return the line of a suite in the printed table."""
    count = found["outcomes"].get
    cells = [
        *(peer, found["version"], count("passed", 0), found["calling"].get("passed", 0)),
        *(count(name, 0) for name in ("expected failure", "skipped", "failed")),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    suites = read_table()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_suites", description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"some of {', '.join(suites)}; all by default")
    parser.add_argument(
        "--originals", action="store_true", help="swap nothing, to see what fails with the peer's functions"
    )
    options = parser.parse_args()
    if unknown := set(options.peers) - set(suites):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; expected some of {', '.join(suites)}")
    results: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for peer in options.peers or suites:
        print(f"\n# {peer}", flush=True)
        try:
            results[peer] = run(suites[peer], source(suites[peer]), originals=options.originals)
        except Missing as reason:
            missing[peer] = str(reason)
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for peer, found in results.items():
        print(row(peer, found))
    for peer, reason in missing.items():
        print(f"{peer} was not run: {reason}")
    failed = [peer for peer, found in results.items() if found["exit_code"]]
    if not options.originals:
        _write({peer: found for peer, found in results.items() if peer not in failed}, list(suites))
    print(f"\n{len(results)} suites, {len(failed)} with failures, {len(missing)} not run")
    return int(bool(failed))


def _write(results: dict[str, dict[str, Any]], order: list[str]) -> None:
    """Bring the results file up to date; a suite that failed or was not run keeps its last result."""
    path = RESULTS / "peer_suites.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    names = ("version", "outcomes", "calling", "expected", "calls")
    kept |= {peer: {name: found[name] for name in names} for peer, found in results.items()}
    path.write_text(json.dumps({peer: kept[peer] for peer in order if peer in kept}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
