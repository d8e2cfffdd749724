"""Settings of device memory and of where the optimizer state is stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Section, Text

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str, key: str) -> int:
    """Return the bytes of a size such as `24GiB`, `900 MB` or `1073741824`.

    Raises:
        ValueError: the text is not a size, or the size is less than a megabyte, as is 24 without a unit. The message begins
            with `key`.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{key}: got {text!r}, expected a size such as 24GiB, 900MB or a number of bytes")
    count = int(float(found[1]) * _UNITS[found[2].upper()])
    if count < 10**6:
        example = f"{found[1]}GiB" if count else "24GiB"
        raise ValueError(
            f"{key}: got {text!r}, which is {count} bytes, expected at least a megabyte; give a unit, as in {example}"
        )
    return count


@dataclass(frozen=True)
class MemoryConfig(Section):
    """Limit on device memory, and options that trade time for memory."""

    budget: Text | None = None
    """Limit on device memory, such as 24GiB or a number of bytes; only PPO and `rlhf plan` read it. It limits the
    number of sequences that are decoded together: a slot holds a sequence of maximum length, pages are claimed as
    sequences grow. A run whose planned peak exceeds the budget is an error before it starts. If None, the cache holds
    rollout.batch_size sequences of maximum length. On a CPU the budget covers memory beyond that of the imported
    modules, and freed blocks are returned to the system at once, which costs time."""
    optimizer_state: Literal["resident", "host", "8bit"] = "resident"
    """Storage of the optimizer's moments and of the float32 masters of bfloat16 weights. resident: on the device, in
    float32. host: in host memory, copied to the device while gradients are computed; on a CPU this saves nothing. 8bit:
    on the device with moments in 8 bits and masters in float32 (needs torchao)."""
    reference: Literal["device", "host"] = "device"
    """Storage of the layers of a frozen reference (ppo.reference frozen_copy). host: in host memory; while a layer
    computes, the next one is copied to the device. On a CPU this saves nothing."""
    gradient_checkpointing: bool = False
    """Store only the input of each layer in the forward pass, and recompute the layer in the backward pass."""

    def check(self) -> None:
        """Raise ValueError if the budget is not a size."""
        if self.budget is not None:
            byte_count(self.budget, "budget")
