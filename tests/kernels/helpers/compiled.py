"""`torch.compile` without the C++ that it would write for the operations around ours."""

from collections.abc import Callable

import torch


def compile_whole(function: Callable) -> Callable:
    """Compile as one graph through Inductor, which calls every operation instead of generating C++ code for it.

    Inductor still plans the memory of the graph, and so still depends on what our operations declare of their results.
    Its cache is off, because the key of a graph does not cover that declaration.
    `test_linear_ppo_loss.py` compiles with the defaults; its C++ compiler takes seconds for each graph.
    """
    options = {"fallback_by_default": True, "selective_decompose": True, "fx_graph_cache": False}
    return torch.compile(function, fullgraph=True, options=options)
