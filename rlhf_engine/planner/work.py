"""An estimate of the time of one PPO update, to order strategies: counted matrix products, conversions and transfers.

    update = generate + score + ppo_epochs x (train + optimizer steps)

The unit is the time of one weight times one token in a large product in float32. What is bound by memory bandwidth, such as
a decode step with few rows, counts as a number of tokens per weight that depends on the device. Attention, activations and
Python are not counted. `python -m benchmarks step_time` compares the estimate with measured updates on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from rlhf_engine.planner import items
from rlhf_engine.planner.gpus import GPUS, LINKS, MEMORY, TRANSFERS, Gpu
from rlhf_engine.planner.workload import Workload


@dataclass(frozen=True)
class Machine:
    """Costs of a device in tokens per weight, and the speed of its half-precision products."""

    weight_seconds: float
    """Seconds of one weight times one token in a large float32 product, which is the unit of all costs."""
    read: float
    """Reading a float32 weight from memory."""
    from_host: float
    """Copying a float32 weight from host memory."""
    half: float
    """Time of a half-precision product in units of a float32 product."""
    dequantise: dict[str, float]
    """Dequantising a weight, by the format."""
    optimizer: dict[str, float]
    """AdamW's step, by the kind of its state."""

    @classmethod
    def of(cls, gpu: Gpu) -> Self:
        """Return the costs that follow from a data sheet. AdamW reads and writes 28 bytes per weight, or copies 24."""
        memory, host = MEMORY * gpu.bandwidth, TRANSFERS * LINKS[gpu.host]
        read = gpu.tokens(4, memory)
        return cls(
            weight_seconds=gpu.seconds_per_weight,
            read=read,
            from_host=gpu.tokens(4, host),
            half=gpu.float32 / gpu.half,
            dequantise=dict.fromkeys(("int8", "nf4", "fp8"), read),
            optimizer={
                "resident": gpu.tokens(28, memory),
                "8bit": gpu.tokens(42, memory),
                "host": gpu.tokens(24, host),
            },
        )


MACHINES = {
    # Single products and conversions on 2 cores with AVX-512: 24 ps per weight and token, `half` without half-precision
    # instructions.
    "cpu": Machine(
        weight_seconds=24e-12,
        read=7,
        from_host=7,
        half=1.3,
        dequantise={"int8": 4, "nf4": 12, "fp8": 100},
        optimizer={"resident": 60, "8bit": 240, "host": 60},
    ),
    # From the data sheet of an H200, not measured: 67 TFLOP/s in float32, 4.8 TB/s, and 50 GB/s to host memory.
    "cuda": Machine(
        weight_seconds=2 / 67e12,
        read=30,
        from_host=2_600,
        half=0.1,
        dequantise={"int8": 30, "nf4": 30, "fp8": 30},
        optimizer={"resident": 200, "8bit": 300, "host": 20_000},
    ),
    **{name: Machine.of(gpu) for name, gpu in GPUS.items()},
}
LOW_RANK = 2.0
"""Time of a product with the matrices of an adapter in units of a large product with as many weights."""


def update_time(w: Workload) -> float:
    """Return the estimated time of one update."""
    return sum(phase_times(w).values())


def phase_times(w: Workload) -> dict[str, float]:
    """Return the estimated time of one update by phase, and that of its optimizer steps."""
    epochs, steps = w.config.ppo.ppo_epochs, math.ceil(w.rollout_batch / w.minibatch)
    trained = {"train": epochs * _train(w), "optimizer": epochs * steps * _optimizer(w)}
    return {"generate": _generate(w), "score": _score(w)} | trained


def phase_seconds(w: Workload) -> dict[str, float]:
    """Return the estimated seconds of each phase, with the optimizer in `train`. Attention and Python are not counted."""
    found = {name: time * _machine(w).weight_seconds for name, time in phase_times(w).items()}
    return found | {"train": found["train"] + found.pop("optimizer")}


def product_rate(w: Workload) -> float:
    """Return the FLOPs per second of products in the workload's dtype: a named GPU's data sheet, or what the plan assumes."""
    if w.gpu:
        return GPUS[w.gpu].half if w.compute_bytes < 4 else GPUS[w.gpu].float32
    return 2 / (_machine(w).weight_seconds * _per_token(w))


def model_flops(w: Workload) -> float:
    """Return the FLOPs of one update that the models need, without recomputation, for model FLOPs utilisation.

    Two per weight and token: one product per matrix in sampling and in the passes of the reference, the reward model and a
    value model, and per epoch one forward and, for what is trained, two backward (with adapters one). Attention is not counted.
    """
    tokens, actions, layers = w.rollout_batch * w.length, w.rollout_batch * w.response, w.policy.layer_matrices
    once = 2 * (layers * tokens + _head(w) * actions)
    others = [shape.layer_matrices for shape in (w.reward,) if shape is not None]
    others += [(w.reward or w.policy).layer_matrices] * (w.value == "backbone")
    frozen_head = w.adapter or (w.train_layers is not None and w.policy.tied)
    epoch = layers * tokens * (1 + _top(w) * (1 if w.adapter else 2)) + _head(w) * actions * (2 if frozen_head else 3)
    if w.value == "backbone":
        epoch += others[-1] * tokens * (2 if w.adapter else 3)
    return 2 * (once + sum(others) * tokens + w.config.ppo.ppo_epochs * epoch)


def _machine(w: Workload) -> Machine:
    return MACHINES.get(w.gpu or w.device, MACHINES["cuda"])


def _per_token(w: Workload) -> float:
    return _machine(w).half if w.compute_bytes < 4 else 1.0


def _dequantise(w: Workload) -> float:
    """Return the time per weight and pass of dequantising the layers."""
    return 0.0 if w.quant == "none" else _machine(w).dequantise[w.quant]


def _adapter(w: Workload) -> float:
    """Return the weights of the policy's adapter, in weights of large products."""
    return LOW_RANK * items.adapter_numbers(w, items.policy_shapes(w)) if w.adapter else 0.0


def _head(w: Workload) -> int:
    return w.policy.vocab * w.policy.hidden


def _top(w: Workload) -> float:
    """Return the share of the layers that are trained or have adapters."""
    return w.top_layers / w.policy.layers


def _generate(w: Workload) -> float:
    """Return the time of prompts and of decode steps, which have one row per slot and read every weight."""
    layers, slots = w.policy.layer_matrices, max(1, w.slots)
    adapter = 0.0 if w.merge_adapters == "always" else _adapter(w)
    prompts = w.rollout_batch * w.prompt * (layers + adapter) * _per_token(w)
    steps = w.response * max(1.0, w.rollout_batch / slots)
    row = max(slots * _per_token(w), _machine(w).read * w.weight_bytes / 4)
    return prompts + steps * ((layers + adapter + _head(w)) * row + layers * _dequantise(w))


def _score(w: Workload) -> float:
    """Return the time of a pass each of the reference, the reward model and a value model."""
    tokens, actions = w.rollout_batch * w.length, w.rollout_batch * w.response
    passes = math.ceil(w.rollout_batch / max(1, w.train_rows))

    def whole(weights: float) -> float:
        return weights * (tokens * _per_token(w) + passes * _dequantise(w))

    policy = w.policy.layer_matrices
    reference = actions * _head(w) * _per_token(w)
    if w.reference_memory == "host":
        # Copies run while the device computes.
        reference += max(whole(policy), policy * passes * _machine(w).from_host * w.weight_bytes / 4)
    else:
        reference += whole(policy)
    roles = 0.0
    if w.reward is not None:
        roles += whole(w.reward.layer_matrices) + w.reward_adapter * tokens * _adapter(w) * _per_token(w)
    if w.value == "backbone":
        roles += whole((w.reward or w.policy).layer_matrices) + tokens * _adapter(w) * _per_token(w)
    return reference + roles


def _train(w: Workload) -> float:
    """Return the time of one epoch: forward passes, and products for the gradients of inputs and of trained weights."""
    tokens, actions = w.rollout_batch * w.length, w.rollout_batch * w.response
    passes = math.ceil(w.rollout_batch / max(1, w.train_rows))
    top, layers = _top(w), w.policy.layer_matrices
    # Layers below the trained ones have no backward pass, and no second forward pass if their output is stored.
    forward = (top if w.shares_states else 1.0) + top * w.gradient_checkpointing
    products = forward + top * (1 if w.adapter else 2)
    frozen_head = w.adapter or (w.train_layers is not None and w.policy.tied)
    head = _head(w) * actions * (2 if frozen_head else 3)
    low_rank = _adapter(w) * tokens * (3 + w.gradient_checkpointing)
    time = (layers * products * tokens + head + low_rank) * _per_token(w)
    time += layers * passes * (forward + top) * _dequantise(w)
    if w.value == "backbone":
        shape = w.reward or w.policy
        time += shape.layer_matrices * tokens * (2 if w.adapter else 3) * _per_token(w)
    return time


def _optimizer(w: Workload) -> float:
    return items.trained(w) * _machine(w).optimizer[w.optimizer_state]
