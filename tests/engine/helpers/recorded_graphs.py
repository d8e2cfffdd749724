"""A stand-in for the parts of torch.cuda that capture graphs: operations are recorded, and replayed on the same memory.

Like a CUDA graph, a replay reads and writes the memory of the captured run and does not run the Python function. An operation
that would wait for the device raises RuntimeError during a capture.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device in a capture")
        if name == "index_put_" and any(x is not None and x.dtype is torch.bool for x in args[1]):
            raise RuntimeError("a mask as an index waits for the device in a capture")
        made = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, made))
        return made


class Graph:
    def __init__(self):
        self.replays = 0

    def pool(self):
        return id(self)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, made in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    def wait_stream(self, other):
        pass


class RecordedCuda:
    """Records the captured graphs; with `available` False it represents a machine without a GPU."""

    @classmethod
    def installed(cls, monkeypatch, **options):
        """Replace torch.cuda in the module that captures decode steps."""
        made = cls(**options)
        monkeypatch.setattr("rlhf_engine.rollout.decode.gpu.cuda", made)
        return made

    Stream = Stream

    def __init__(self, available=True):
        self.available, self.graphs, self.pools = available, [], []

    def is_available(self):
        return self.available

    def current_stream(self):
        return Stream()

    @contextmanager
    def stream(self, stream):
        yield

    def CUDAGraph(self):
        self.graphs.append(Graph())
        return self.graphs[-1]

    @contextmanager
    def graph(self, graph, pool=None):
        self.pools.append(pool)
        with Recorder() as recorder:
            yield
        graph.operations = recorder.operations
