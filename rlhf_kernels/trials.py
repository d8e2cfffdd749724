"""Kernels that no device has timed yet. Each is off until `trial` turns it on; `"auto"` never selects one.

They pass the tests in Triton's interpreter or the CUDA emulator, and `benchmarks/results/notes.md` predicts their gain.
`python -m benchmarks.gpu_suite` times each of them next to the kernel that it would replace. One that is faster replaces it,
and its name is removed here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ._options import ACTIVE_TRIALS

TRIALS = {
    "gae_split": "gae: several programs per row if there are few long rows, in two launches",
    "half_logits": "the fused head: logits in the dtype of the hidden states instead of float32, in chunks of twice the rows",
}
"""Name of a trial -> what it changes."""


@contextmanager
def trial(*names: str) -> Iterator[None]:
    """Use the kernels `names` of `TRIALS` in this process until the context ends.

    The state belongs to the process and not to the thread, because torch runs backward passes in other threads.

    Raises:
        ValueError: a name that is not in `TRIALS`.
    """
    unknown = sorted(set(names) - set(TRIALS))
    if unknown:
        raise ValueError(f"trial: got {', '.join(unknown)}, expected some of {', '.join(TRIALS)}")
    before = set(ACTIVE_TRIALS)
    ACTIVE_TRIALS.update(names)
    try:
        yield
    finally:
        ACTIVE_TRIALS.clear()
        ACTIVE_TRIALS.update(before)
