"""Ranks as forked children of the test, with the environment that torchrun gives its processes; no interpreter starts."""

import faulthandler
import os
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

LONGEST = 300
"""Seconds after which a child that hangs writes where, and fails."""


def on_ranks(count, function, folder, *, stderr="stderr"):
    """Run `function(rank)` in `count` children; return their results, exit codes (negative: a signal) and seconds.

    The result of a child is what `torch.save` writes. Its stdout and stderr are appended to the file `stderr` of `folder`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    begun = time.monotonic()
    children = {_child(count, rank, store.port, function, folder, stderr): rank for rank in range(count)}
    codes = [None] * count
    for child, rank in children.items():
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - begun
    files = [folder / f"{rank}.pt" for rank in range(count)]
    found = [torch.load(file, weights_only=False) if file.is_file() else None for file in files]
    return found, codes, seconds


def _child(count, rank, port, function, folder, stderr):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        file = os.open(folder / stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.dump_traceback_later(LONGEST, exit=True, file=2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(1)
        torch.save(function(rank), folder / f"{rank}.pt")
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
