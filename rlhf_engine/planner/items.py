"""Bytes of every item of a run: items that persist, and items that each moment of a phase needs in addition.

A phase is as large as its largest moment. Sizes and rules of other modules are imported from them, never repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from rlhf_engine.memory.arena import SUM_DTYPE
from rlhf_engine.model.quantised import quantised_bytes
from rlhf_engine.model.streamed import layer_bytes
from rlhf_engine.model.upcast import upcasts
from rlhf_engine.optim.eight_bit import moment_bytes
from rlhf_engine.optim.ema import AVERAGE_DTYPE
from rlhf_engine.optim.offload import HALF, most_in_transit
from rlhf_engine.planner.activations import FLOAT, Pass, pass_through
from rlhf_engine.planner.model_shape import OUTSIDE, ModelShape, RecurrentShape
from rlhf_engine.planner.workload import Workload
from rlhf_engine.ppo.experience import experience_bytes
from rlhf_engine.rollout.decode.cpu import reorders
from rlhf_engine.rollout.decode.pages import PAGE_SIZE, pages_of, pool_bytes
from rlhf_engine.rollout.decode.protocol import MIN_ROWS, kv_bytes, prompt_width
from rlhf_engine.rollout.decode.slots import slot_columns, slots_per_step
from rlhf_engine.rollout.decode.states import CacheShape
from rlhf_engine.rollout.rollout import rollout_bytes
from rlhf_engine.supervised.reward_model import rows_scored_together
from rlhf_kernels import head_workspace_bytes

Items = dict[str, int]

CONTEXT = {"cuda": 600 * 2**20, "cpu": 28 * 2**20}
"""Bytes of a process in addition to its tensors.

CUDA: the context, an estimate that we have not measured. CPU: pages of libraries that are touched by first calls,
measured with a model of 0.2 million weights.
"""
HALF_PRODUCTS, ADAPTED, ADAPTED_MATRIX = 46 * 2**20, 7 * 2**20, 64 * 2**10
"""Bytes of a process on the CPU in addition to those: half-precision kernels, which oneDNN compiles; peft; and the modules of
peft and the entries of the optimizer for each matrix with adapters. Measured with layers of width 64.
"""
STATE_COPIES = 6
"""Temporaries of a recurrent state in the step that updates it: decay, input, products and sums, by estimate."""


def persistent(w: Workload) -> Items:
    """Return the bytes of all items that persist for the whole run."""
    policy, size = w.policy, w.weight_bytes
    head = 0 if w.value == "backbone" else (policy.hidden + 1) * FLOAT
    items = {"policy": _frozen(w, policy, policy.parameters) + head}
    if w.adapter:
        items["policy"] += policy_trained(w) * size
    if w.copies_reference:
        items["reference"] = policy_trained(w) * size
    if w.reference_memory == "host":
        items |= _streamed_reference(w)
    if w.value == "backbone":
        shape = w.reward or policy
        shared = _value_adapter(w) * size + _scalar_head(shape)
        items["value_model"] = shared if w.adapter else _scalar_model(w, shape)
    if w.reward is not None:
        shared = policy_trained(w) * size + _scalar_head(policy)
        items["reward_model"] = shared if w.adapter and w.reward_adapter else _scalar_model(w, w.reward)
    if w.average:
        items["average"] = policy_trained(w) * AVERAGE_DTYPE.itemsize
    if w.optimizer_state != "host" or w.device == "cpu":
        items |= {"optimizer_state": optimizer_state(w)} | _masters(w)
    return items | {"context": _context(w)}


def _streamed_reference(w: Workload) -> Items:
    """Return the bytes of a reference with its layers in host memory: the rest of it, and two layers in transit."""
    size, layers = w.weight_bytes, w.policy.layers
    inside = [math.prod(shape) // layers for name, shape in w.policy.trunk().items() if name not in OUTSIDE]
    layer = layer_bytes([(count, size) for count in inside])
    rest = (w.policy.parameters - layers * sum(inside)) * size
    return {"reference": rest + (layers * layer if w.device == "cpu" else 0), "layers_in_transit": 2 * layer}


def _context(w: Workload) -> int:
    """Return the bytes of a process in addition to its tensors."""
    if w.device != "cpu":
        return CONTEXT["cuda"]
    half = w.product_dtype in HALF and not upcasts(w.product_dtype, w.device)
    matrices = sum(layers for layers, *_ in w.policy.matrices())
    adapted = ADAPTED + matrices * ADAPTED_MATRIX if w.adapter else 0
    return CONTEXT["cpu"] + HALF_PRODUCTS * half + adapted


def _masters(w: Workload) -> Items:
    """Return the bytes of the float32 masters of half-precision weights."""
    return {"master_weights": trained(w) * FLOAT} if w.weight_dtype in HALF else {}


def in_transit(w: Workload) -> Items:
    """Return the bytes of optimizer state in transit between host memory and the device."""
    if w.optimizer_state != "host":
        return {}
    return {"state_in_transit": most_in_transit(optimizer_state(w) + sum(_masters(w).values()))}


def gradients(w: Workload) -> Items:
    """Return the bytes of the gradients of one optimizer step."""
    return {"gradients": trained(w) * SUM_DTYPE.itemsize}


def _frozen(w: Workload, shape: ModelShape, numbers: int) -> int:
    """Return the bytes of a model's `numbers` weights, of which those within layers may be quantised."""
    if w.quant == "none":
        return numbers * w.weight_bytes
    inside = [layers * quantised_bytes(w.quant, rows, columns) for layers, rows, columns in shape.matrices()]
    return (numbers - shape.layer_matrices) * w.weight_bytes + sum(inside)


def adapter_numbers(w: Workload, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of weights of one adapter: two low-rank matrices for each matrix within the layers."""
    inside = [shape for shape in shapes.values() if len(shape) == 3]
    return sum(layers * w.adapter * (rows + columns) for layers, rows, columns in inside)


def policy_shapes(w: Workload) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the policy's weights that are trained, or that have adapters."""
    return w.policy.trunk() | w.policy.head() if w.train_layers is None else w.policy.top(w.train_layers)


def policy_trained(w: Workload) -> int:
    """Return the number of trained weights of the policy, without a value function."""
    shapes = policy_shapes(w)
    return adapter_numbers(w, shapes) if w.adapter else sum(map(math.prod, shapes.values()))


def _value_adapter(w: Workload) -> int:
    """Return the number of weights of the adapter of a value function; a separate reward model has it in all layers."""
    own = w.reward is not None and not w.reward_adapter
    return adapter_numbers(w, (w.reward or w.policy).trunk()) if own else adapter_numbers(w, policy_shapes(w))


def _scalar_head(shape: ModelShape) -> int:
    return (shape.hidden + 1) * FLOAT


def _scalar_model(w: Workload, shape: ModelShape) -> int:
    return _frozen(w, shape, shape.trunk_parameters) + _scalar_head(shape)


def trained(w: Workload) -> int:
    """Return the number of trained weights."""
    shape = (w.reward or w.policy) if w.value == "backbone" else w.policy
    own = shape.hidden + 1
    if w.value == "backbone":
        own += _value_adapter(w) if w.adapter else shape.trunk_parameters
    return policy_trained(w) + own


def optimizer_state(w: Workload) -> int:
    """Return the bytes of AdamW's two moments, in float32 or in 8 bits."""
    if w.optimizer_state != "8bit" or w.adapter:
        return 2 * FLOAT * trained(w)
    shapes = [policy_shapes(w)]
    if w.value == "backbone":
        shapes.append((w.reward or w.policy).trunk())
    state = 0
    for shape in (one for weights in shapes for one in weights.values()):
        count, numbers = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
        state += 2 * count * moment_bytes(math.prod(numbers))
    return state


def stored_states(w: Workload) -> Items:
    """Return the bytes of the output of the policy's frozen layers, if it is stored, for all inputs of a rollout batch."""
    inputs = w.rollout_batch * (w.length - 1)
    return {"states": inputs * w.policy.hidden * w.weight_bytes} if w.shares_states else {}


def rollout(w: Workload, *, scored: bool) -> int:
    """Return the bytes of a rollout batch during sampling, or, with `scored`, together with the experience of an update."""
    tokens, actions = w.rollout_batch * w.length, w.rollout_batch * w.response
    return rollout_bytes(tokens, actions, sampling=not scored) + (experience_bytes(actions) if scored else 0)


def kv_cache(w: Workload, slots: int) -> int:
    """Return the bytes of the keys and values, and of recurrent states, of `slots` sequences of maximum length."""
    columns = slot_columns(w.length)
    if isinstance(w.policy, RecurrentShape):
        return _cache_shape(w, w.policy).slot_bytes(slots, columns, eager=w.eager)
    if w.paged:
        return _pool_bytes(w, slots * pages_of(columns, PAGE_SIZE))
    slots += -slots % slots_per_step(eager=w.eager)
    return slots * kv_bytes(w.policy.kv_numbers, columns, w.product_dtype)


def _cache_shape(w: Workload, policy: RecurrentShape) -> CacheShape:
    return policy.skeleton(w.weight_dtype, eager=w.eager).cache


def least_kv_cache(w: Workload, slots: int) -> int:
    """Return the fewest bytes of keys and values with which `slots` sequences can begin.

    Each begins with the pages of its prompt and one more. The pool is at least large enough for one sequence of maximum
    length. Without pages a slot holds a whole sequence, so the result is that of `kv_cache`.
    """
    if not w.paged:
        return kv_cache(w, slots)
    longest = pages_of(slot_columns(w.length), PAGE_SIZE)
    begun = slots * min(longest, pages_of(w.prompt, PAGE_SIZE) + 1)
    return _pool_bytes(w, max(longest, begun))


def page_bytes(w: Workload) -> int:
    """Return the bytes of one page in all layers."""
    return kv_bytes(w.policy.kv_numbers, PAGE_SIZE, w.product_dtype)


def _pool_bytes(w: Workload, pages: int) -> int:
    return pool_bytes(w.policy.kv_numbers, pages, w.product_dtype)


def generate(w: Workload, slots: int, cache: int) -> dict[str, Items]:
    """Return the moments of sampling with `slots` sequences at a time and `cache` bytes of keys and values.

    The moments are the prefill of the first prompts and the decode step of the last token.
    """
    policy, rows, columns = w.policy, max(slots, MIN_ROWS), slot_columns(w.length)
    held = {"kv_cache": cache, "rollout": rollout(w, scored=False)}
    if w.autocast:
        held["rounded_weights"] = rounded_weights(w, policy)
    if w.merge_adapters == "always":
        held["merged_weights"] = policy.layer_matrices * w.top_layers // policy.layers * w.weight_bytes
    logits = rows * policy.vocab * 2 * FLOAT
    width = prompt_width(w.prompt)
    # Shorter prompts can fill the token budget of a pass better than the longest ones, whose width may not divide it.
    tokens = min(slots * width, max(width, w.prefill_tokens))
    if isinstance(policy, RecurrentShape) and w.device == "cpu":
        tokens = width  # every prompt has a separate pass
    reading = pass_of(w, policy, -(-tokens // width), width)
    prefill = {}
    decoding = rows * columns + dequantised(w, policy)
    if w.paged or w.eager or w.device != "cpu":
        decoding += 2 * rows * policy.heads * columns * w.compute_bytes
    if w.paged and w.device == "cpu":
        # A layer's pages are gathered into one tensor, and positions outside of the sequences are zeroed in a second one.
        decoding += 2 * rows * pages_of(columns, PAGE_SIZE) * PAGE_SIZE * policy.key_width * FLOAT
    if isinstance(policy, RecurrentShape):
        states = _cache_shape(w, policy)
        decoding += STATE_COPIES * states.largest_state(rows)
        # The cache of a prefill, before it is copied into slots.
        prefill["prefilled"] = states.slot_bytes(reading.rows, width, eager=False)
    prefill["prefill_workspace"] = max(reading.forward_room(), logits)
    if not w.autocast and reorders(w.device, w.weight_dtype) and not w.config.rollout.exact:
        # A copy of the head's weight in oneDNN's layout, from the first decode step to the last.
        held["reordered_head"] = policy.vocab * policy.hidden * w.weight_bytes
    return {"prefill": held | prefill, "decode": held | {"decode_workspace": decoding + logits}}


def score(w: Workload) -> dict[str, Items]:
    """Return the moments of scoring, in which the reference, the reward model and the value model run in turn."""
    held = {"rollout": rollout(w, scored=True)} | stored_states(w)
    tokens, count = w.pass_tokens(w.rollout_batch), w.pass_actions(w.rollout_batch)
    reading = _inputs(w, w.policy, tokens)
    actions = count * w.policy.hidden * w.compute_bytes
    copied = w.policy.vocab * w.policy.hidden * w.compute_bytes if w.autocast else 0
    block = {"head_workspace": head_block(w, count, gradient=False)}
    kept = block if w.device == "cpu" else {}  # the block of logits is kept between calls
    last = reading.tokens * w.policy.hidden * w.weight_bytes

    # Autocast caches rounded copies of weights that require gradients.
    def rounded(shape: ModelShape) -> Items:
        return {"rounded_weights": rounded_weights(w, shape)} if w.autocast else {}

    moments = {
        "reference": held | kept | {"score_workspace": max(reading.forward_room(), last + actions)},
        "reference head": held | block | {"score_workspace": actions + copied},
    }
    if w.reward is not None:
        shape = w.reward
        batch = pass_of(w, shape, min(rows_scored_together(w.length + 1), w.rollout_batch), w.length + 1)
        moments["reward model"] = held | kept | rounded(shape) | {"score_workspace": batch.forward_room()}
    if w.value == "backbone":
        shape = w.reward or w.policy
        room = _inputs(w, shape, tokens).forward_room()
        moments["values"] = held | kept | rounded(shape) | {"score_workspace": room}
    return moments


def train(w: Workload) -> dict[str, Items]:
    """Return the moments of an optimizer step: forward end, backward start, backward end, and the step itself."""
    tokens, actions = w.pass_tokens(w.minibatch), w.pass_actions(w.minibatch)
    moments = _micro_batch(w, tokens, actions, values=w.value == "backbone")
    if w.pretraining:
        # Every token of pretraining text is an action, and the gradients of the PPO loss exist already.
        tokens = min(w.pretraining, w.train_rows) * (w.length - 1)
        pretraining = _micro_batch(w, tokens, tokens, values=False)
        moments |= {f"pretraining, {name}": items for name, items in pretraining.items()}
    kept = {"rollout": rollout(w, scored=True)} | stored_states(w)
    return moments | {"optimizer step": kept | gradients(w) | in_transit(w)}


def _micro_batch(w: Workload, tokens: int, actions: int, *, values: bool) -> dict[str, Items]:
    policy, checkpointed = w.policy, w.gradient_checkpointing
    passes = [replace(_inputs(w, policy, tokens), trained=w.train_layers)]
    passes += [_inputs(w, w.reward or policy, tokens)] * values
    hidden = actions * policy.hidden
    frozen = w.train_layers is not None
    weight = 0 if w.adapter or (frozen and policy.tied) else policy.vocab * policy.hidden
    block = {"head_workspace": head_block(w, actions, gradient=True)}
    kept = block if w.device == "cpu" else {}
    summed = gradients(w)  # reserved in the arena from the first forward pass on
    held = {"rollout": rollout(w, scored=True)} | stored_states(w)
    if w.device != "cpu":  # a stream copies the first buckets in while gradients are computed
        held |= in_transit(w)
    if w.autocast:
        held["rounded_weights"] = sum(rounded_weights(w, one.shape) for one in passes)
    saved = {"activations": sum(one.saved(checkpointed=checkpointed) for one in passes)}
    of_head = {"head_gradients": (weight + hidden) * FLOAT + hidden * w.compute_bytes}
    # The head's gradient of a tied weight is kept until the embedding's gradient is added to it.
    waiting = {"head_gradients": weight * FLOAT} if policy.tied else {}
    room = max(one.backward_room(checkpointed=checkpointed) for one in passes)
    # The embedding's gradient is computed in the weights' dtype and exists at the same time as its float32 sum.
    embedding = 0 if frozen else weight * (FLOAT + (w.weight_bytes if w.weight_bytes < FLOAT else 0))
    begins, ends = {"backward_workspace": room}, {"backward_workspace": embedding}
    return {
        "forward": held | saved | of_head | block | summed,
        "backward begins": held | saved | waiting | kept | begins | summed,
        "backward ends": held | waiting | kept | ends | summed,
    }


def _inputs(w: Workload, shape: ModelShape, tokens: int) -> Pass:
    """Return a pass over `tokens` inputs, of sequences of at most the maximum length."""
    columns = w.length - 1
    rows = -(-tokens // columns)
    return _pass(w, shape, rows, columns, tokens)


def pass_of(w: Workload, shape: ModelShape, rows: int, columns: int) -> Pass:
    """Return a pass over `rows` sequences of `columns` tokens."""
    return _pass(w, shape, rows, columns, None)


def _pass(w: Workload, shape: ModelShape, rows: int, columns: int, tokens: int | None) -> Pass:
    sizes = (rows, columns, w.eager, w.weight_bytes, w.compute_bytes, tokens, w.adapter, dequantised(w, shape))
    return pass_through(shape, *sizes)


def rounded_weights(w: Workload, shape: ModelShape) -> int:
    """Return the bytes of the rounded matrices that autocast keeps of a trained model, including the head's.

    Quantised matrices are dequantised in each product, and are not kept.
    """
    inside = shape.layer_matrices if w.quant == "none" else 0
    return w.compute_bytes * (inside + shape.vocab * shape.hidden)


def dequantised(w: Workload, shape: ModelShape) -> int:
    """Return the bytes of the largest quantised matrix of a layer in the dtype of its product; 0 if none is quantised."""
    return 0 if w.quant == "none" else shape.largest_layer_matrix * w.factor_bytes


def head_block(w: Workload, actions: int, *, gradient: bool) -> int:
    """Return the bytes of the chunk of logits that the fused head computes at a time."""
    backend = "cpu" if w.device == "cpu" else "triton"
    return head_workspace_bytes(w.policy.vocab, w.product_dtype, tokens=actions, gradient=gradient, backend=backend)
