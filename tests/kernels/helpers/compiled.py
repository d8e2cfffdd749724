"""`torch.compile` without C++ code for the operations around ours."""

from collections.abc import Callable

import torch


def compile_whole(function: Callable) -> Callable:
    """Compile as one graph through Inductor, which calls every operation instead of generating C++ code for it.

    Inductor still plans the memory of the graph, for which it uses the results that our operations declare. Its cache is off,
    because the key of a graph does not include these declarations. `test_linear_ppo_loss.py` compiles with the defaults, where
    the C++ compiler takes seconds per graph.
    """
    options = {"fallback_by_default": True, "selective_decompose": True, "fx_graph_cache": False}
    return torch.compile(function, fullgraph=True, options=options)
