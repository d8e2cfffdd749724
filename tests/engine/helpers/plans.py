"""Workloads of the memory plan."""

from rlhf_engine.planner import ModelShape, Workload

SMALL = ModelShape(
    "llama", vocab=10, hidden=4, intermediate=6, layers=2, heads=2, groups=1, head_dim=2, positions=64, tied=False
)


RUN = Workload(SMALL, SMALL, prompt=3, response=2, rollout_batch=4, minibatch=2, microbatch=1, slots=4)
