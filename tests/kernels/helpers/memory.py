"""The memory that a call allocates."""

from torch.profiler import ProfilerActivity, profile


def largest_block(run) -> int:
    """Return the bytes of the largest tensor that torch allocates in `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    return max(e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]")
