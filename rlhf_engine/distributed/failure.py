"""One message for a run whose ranks end early.

The first rank that fails reports its error, and the others, whose collectives fail because of it, are silent. A rank that was
killed cannot report; the others find out which process is gone.
"""

from __future__ import annotations

import os
import platform
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

_CLAIM, _PROCESS = "rlhf/failed", "rlhf/process/"
_WAIT = 10.0
"""Seconds in which a rank looks for the cause of a failed collective."""
_LOST = re.compile(
    r"closed by peer|reset by peer|connection reset|broken pipe|connectfull|socket|nccl|gloo", re.IGNORECASE
)
_LATE = re.compile(r"timed out|timeout", re.IGNORECASE)


def register() -> None:
    """Store the machine and the number of this process, with which other ranks see that it is gone."""
    store = _store()
    if store is not None:
        store.set(f"{_PROCESS}{dist.get_rank()}", f"{platform.node()} {os.getpid()}")


def report(text: str, error: BaseException) -> str | None:
    """Return the line that this rank prints for the exception that ends it, or None if a different rank has reported."""
    rank, store = int(os.environ["RANK"]), _store()
    if not _is_of_collective(error):
        return f"rank {rank}: {text}" if _claims(store, rank) else None
    if _LATE.search(str(error)):
        text = f"a rank did not arrive at a collective operation within distributed.timeout ({text})"
        return f"rank {rank}: {text}" if _claims(store, rank) else None
    deadline = time.monotonic() + _WAIT
    while time.monotonic() < deadline:
        if store is not None and store.check([_CLAIM]):
            return None
        gone = _gone(store)
        if gone is not None:
            what = "ended without a message; it was killed, perhaps for lack of memory"
            return f"rank {gone}: the process {what}" if _claims(store, rank) else None
        time.sleep(0.2)
    return f"rank {rank}: the connection to a different rank was lost" if _claims(store, rank) else None


def _is_of_collective(error: BaseException) -> bool:
    """Return whether an exception is that of a collective operation, and not of this rank's own work."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and bool(_LOST.search(str(error)) or _LATE.search(str(error)))


def _store() -> Any:
    """Return torchrun's store, which outlives the ranks; None if it cannot be reached."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return None
    try:
        return cast("Any", dist).TCPStore(
            host, int(port), is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
        )
    except (RuntimeError, dist.DistError):
        return None


def _claims(store: Any, rank: int) -> bool:
    """Return whether this rank is the first to report."""
    if store is None:
        return True
    return store.compare_set(_CLAIM, "", str(rank)).decode() == str(rank)


def _gone(store: Any) -> int | None:
    """Return the number of a rank on this machine whose process has ended."""
    if store is None or not Path("/proc").is_dir():
        return None
    for rank in range(int(os.environ["WORLD_SIZE"])):
        key = f"{_PROCESS}{rank}"
        if not store.check([key]):
            continue
        node, _, process = store.get(key).decode().rpartition(" ")
        if node == platform.node() and not _lives(int(process)):
            return rank
    return None


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"
