"""Runs in forked children that SIGKILL ends at random moments, and that end with the bits of an undisturbed run.

`python -m tests.engine.helpers.killed FOLDER CASE --trials 3 --kills 3` prints a JSON object for every trial: the kills, how
many attempts continued from a checkpoint, and the differences. With `--until N`, trials end when N kills are reached.
`--instants` kills at random times instead of random operations.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from tests.engine.faults.runs import ANSWERS, CASES, command, config_of, difference, no_drawing, outcome, prepare

SAVED = {
    "sft": "sft.checkpoint",
    "rm": "rm.checkpoint",
    "ppo": "ppo",
    "iterate": "state.json",
    "generate": "answers.jsonl.partial",
}
"""What the folder of a killed run contains if the run has something to continue from and is not finished."""
LONGEST = 300
"""Seconds after which a child that hangs prints where, and fails."""


class Killer:
    """Runs of a case in children of this process."""

    def __init__(self, folder: Path, name: str, settings: list[str], *, instants: bool) -> None:
        self.folder, self.case, self.settings, self.instants = folder, CASES[name], settings, instants
        if self.case.section is not None:
            self.settings = [f"{self.case.section}.checkpoint_every=1", *settings]

    def child(self, out: Path, kill: float | None) -> tuple[bool, float]:
        """Run the case in `out`; return whether it ended, and its seconds, or its operations unless `instants`.

        It is killed after `kill` of these.
        """
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._in_child(out, None if self.instants else kill)
        if self.instants and kill is not None:
            time.sleep(kill)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        if not killed and os.WEXITSTATUS(status):
            raise RuntimeError(f"the run in {out} failed")
        seconds = time.monotonic() - begun
        return not killed, seconds if self.instants or killed else float((self.folder / "operations").read_text())

    def _in_child(self, out: Path, kill: float | None) -> None:
        count, code = 0, 1

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            count += 1
            if count == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            out.mkdir(exist_ok=True)
            config = config_of(self.folder, self.case, out, *self.settings)
            sys.addaudithook(hook)
            with no_drawing():
                command(self.case, config, self.folder)()
            (self.folder / "operations").write_text(str(count))
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)

    def trials(self, trials: int, kills: int) -> Iterator[dict[str, Any]]:
        """Yield the result of each trial, with `kills` kills at most.

        Half of the killed runs continue in a copy of their folder.
        """
        whole = self.folder / "whole"
        _, length = self.child(whole, None)
        if self.instants:  # the first run compiles what the next ones find in a cache
            _, length = self.child(self.folder / "again", None)
        expected = outcome(whole, self.case.stage)
        for trial in range(trials):
            rng, out = Random(trial), self.folder / f"out{trial}"
            found = {"kills": 0, "continued": 0, "copied": 0}
            while True:
                saved = (SAVED[self.case.stage], self.case.stage, ANSWERS)
                found["continued"] += any((out / name).exists() for name in saved)
                kill = None
                if found["kills"] < kills:
                    if self.instants:
                        kill = rng.uniform(0.05, 1.0) * length
                    else:  # the first kill is late, so that there is a checkpoint from which the next attempt continues
                        least = 0.25 if found["kills"] else 0.85
                        kill = float(rng.randint(int(least * length), int(length)))
                if self.child(out, kill)[0]:
                    break
                found["kills"] += 1
                if rng.random() < 0.5:
                    copy = self.folder / f"out{trial}-{found['kills']}"
                    shutil.copytree(out, copy)
                    shutil.rmtree(out)
                    out = copy
                    found["copied"] += 1
            yield found | {"difference": difference(outcome(out, self.case.stage), expected)}
            shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.engine.helpers.killed", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--until", type=int)
    parser.add_argument("--instants", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # A child that is killed while it holds tqdm's default lock, which is one for all processes, would block the next ones. The
    # first class that draws a bar keeps the lock, so that it is set before any does.
    tqdm.set_lock(threading.RLock())
    given.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)
    prepare(given.folder)
    killer, total = Killer(given.folder, given.case, given.settings, instants=given.instants), 0
    for found in killer.trials(given.trials, given.kills):
        print(json.dumps(found), flush=True)
        total += found["kills"]
        if given.until is not None and total >= given.until:
            break


if __name__ == "__main__":
    main()
