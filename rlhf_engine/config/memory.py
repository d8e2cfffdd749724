"""Settings of where the bytes of a run live, apart from the rest of `config.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Section, Text

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str, key: str) -> int:
    """Bytes of a size such as `24GiB`, `900 MB` or `1073741824`; `key` names it in the ValueError for anything else, or 0."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{key}: got {text!r}, expected a size such as 24GiB, 900MB or a number of bytes")
    count = int(float(found[1]) * _UNITS[found[2].upper()])
    if count == 0:
        raise ValueError(f"{key}: got {text!r}, expected more than 0 bytes")
    return count


@dataclass(frozen=True)
class MemoryConfig(Section):
    """What a run may take of its device, and what it pays in time to take less."""

    budget: Text | None = None
    """Most bytes on the device, such as 24GiB; `rlhf ppo` alone reads it. As many sequences are decoded together as the plan
    leaves room for, in slots at their longest, in pages as they begin, and a run whose plan does not fit is refused before it
    starts; None gives every one of rollout.batch_size sequences room for its longest answer. On the CPU it is of what a run
    takes above its imports, and freed blocks go back to the system at once, which costs time."""
    optimizer_state: Literal["resident", "host", "8bit"] = "resident"
    """Where the optimiser's moments, and the masters of bfloat16 weights, live: on the device in float32; in host memory, from
    which they are copied while gradients are made (on a CPU that is the same memory, and saves nothing); or on the device in
    8 bits, but for the masters (needs torchao)."""
    gradient_checkpointing: bool = False
    """Keep the input of each layer alone and run the layer again in the backward pass."""

    def check(self) -> None:
        """A budget is a size."""
        if self.budget is not None:
            byte_count(self.budget, "budget")
