"""Size of the forward and backward passes of an optimizer step, which a lack of memory halves.

All sums of a minibatch have the minibatch's denominators, so its gradient is the same for every size of a pass, within the
rounding of the sums. A minibatch that was begun again has the bits that the smaller size gives for the same rollout.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict, TypeVar

import torch

from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.errors import is_out_of_memory
from rlhf_engine.notices import notice

Result = TypeVar("Result")


class MicrobatchSize(TypedDict):
    """Size of a micro-batch: sequences (rankings of a reward model), or tokens if they are not None.

    The `ranks` share the sequences; without them, this process computes all.
    """

    microbatch: int
    microbatch_tokens: int | None
    ranks: NotRequired[Ranks]


def _nothing() -> None:
    pass


class Passes:
    """The current size of a pass. It starts with the config's; once halved, it stays small, also in a resumed run.

    `section` is the section of the config that has the size, and `ranks` are those that share the sequences.
    """

    def __init__(self, size: MicrobatchSize, section: str, ranks: Ranks = ONE) -> None:
        self.size: MicrobatchSize = {**size, "ranks": ranks} if ranks.size > 1 else size
        self.section, self.ranks = section, ranks

    def fitting(self, run: Callable[[MicrobatchSize], Result], undo: Callable[[], object] = _nothing) -> Result:
        """Return `run(size)`; after a lack of memory, call `undo` and try again with half of the size.

        With several ranks there is no second attempt, because the others wait in the pass that failed.

        Raises:
            MemoryError, RuntimeError: as `run`, if a pass of one sequence or one token does not fit either.
        """
        before = self._words()
        while True:
            try:
                result = run(self.size)
                break
            except (MemoryError, RuntimeError) as error:
                if self.ranks.size > 1 or not is_out_of_memory(error) or not self._halve():
                    raise
            # Here the exception is gone, and with it the tensors of the frames that it passed.
            undo()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self._words() != before:
            notice(
                f"out of memory in a pass of {before}: the run continues with {self._words()}, which gives the same gradient; "
                "set this size in the config of the next run, to save the failed attempts; a resumed run keeps it"
            )
        return result

    def state(self) -> dict[str, Any]:
        """Return the size under its name in a checkpoint."""
        return {"passes": {name: value for name, value in self.size.items() if name != "ranks"}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; checkpoints of earlier releases have the config's size."""
        self.size = MicrobatchSize(**{**self.size, **state.get("passes", {})})

    def _halve(self) -> bool:
        """Halve the size; return whether it was more than one sequence or one token."""
        name = "microbatch" if self.size["microbatch_tokens"] is None else "microbatch_tokens"
        size = self.size[name] or 1
        self.size = MicrobatchSize(**{**self.size, name: max(1, size // 2)})
        return size > 1

    def _words(self) -> str:
        sequences, tokens = self.size["microbatch"], self.size["microbatch_tokens"]
        size = f"microbatch={sequences}" if tokens is None else f"microbatch_tokens={tokens}"
        return f"{self.section}.{size}"
