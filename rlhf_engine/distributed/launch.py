"""The start of the processes of a run on one machine, and what a process knows of the others before torch is imported."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence


def process_count() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Return the number of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def check_count(count: int, device: str) -> None:
    """Raise ValueError unless `count` processes can run on this machine's device."""
    if count < 1:
        raise ValueError(f"--gpus: got {count}, expected at least 1")
    if process_count() > 1:
        raise ValueError("--gpus: torchrun has already started the processes; leave --gpus out")
    if device.startswith("cuda"):
        import torch

        visible = torch.cuda.device_count()
        if count > visible:
            raise ValueError(f"--gpus: got {count}, expected at most {visible}, the number of visible GPUs")


def start(count: int, arguments: Sequence[str]) -> int:
    """Run `rlhf ARGUMENTS` in `count` processes with torchrun's launcher; return the exit code.

    It is that of the process that failed first, or 128 plus the number of a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks report their errors in one line; the launcher would add a table.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 60},
        max_restarts=0,
        run_id=uuid.uuid4().hex,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "rlhf_engine.cli", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0
