"""Bytes of every item of a run: what it keeps, and what each moment of a phase holds beside that.

A phase is as large as its largest moment.
"""

from __future__ import annotations

import math

from rlhf_engine.planner.activations import FLOAT, IDS, Pass
from rlhf_engine.planner.model_shape import ModelShape
from rlhf_engine.planner.workload import Workload

Items = dict[str, int]

MIN_SLOTS = 16
"""Rows that a decoding pass has at least, and slots of the cache where attention is eager: rlhf_engine.rollout.decode.slots's
MIN_ROWS."""
PAGE = 64
"""Tokens of a page of keys and values on a GPU: rlhf_engine.rollout.decode.paged's PAGE_SIZE."""
SCORE_ROWS = 64
"""Sequences that the reward model scores at a time: the default of rlhf_engine.supervised.reward_model.score_examples."""
BUCKET = 64 * 2**20
"""Bytes of optimiser state that are copied from host memory at a time."""
CONTEXT = {"cuda": 600 * 2**20, "cpu": 28 * 2**20}
"""What a process holds beside its tensors: of a GPU before the first of them, taken from others' machines and not measured
here; on the CPU pages of libraries that first calls touch, measured with a model of 0.2 million weights."""
BLOCK_STATE = 256
"""Numbers that share one scale in 8-bit optimiser state."""


def persistent(w: Workload) -> Items:
    """What lives as long as the run."""
    policy, size = w.policy, w.weight_bytes
    head = 0 if w.value == "backbone" else (policy.hidden + 1) * FLOAT
    items = {"policy": _frozen(w, policy, policy.parameters) + head}
    if w.adapter:
        items["policy"] += adapter_numbers(w) * FLOAT  # the reference is the policy without them
    else:
        items["reference"] = policy.parameters * size
    if w.value == "backbone":
        items["value_model"] = _scalar_model(w, w.reward or policy)
    if w.reward is not None:
        items["reward_model"] = _scalar_model(w, w.reward)
    if w.average:
        # In float32, whatever the weights are (rlhf_engine.optim.ema).
        items["average"] = (adapter_numbers(w) if w.adapter else policy.parameters) * FLOAT
    if w.optimizer_state != "host" or w.device == "cpu":
        items |= {"optimizer_state": optimizer_state(w)} | _masters(w)
    return items | {"context": CONTEXT["cpu" if w.device == "cpu" else "cuda"]}


def _masters(w: Workload) -> Items:
    """Float32 weights, whose rounding half-precision ones are."""
    return {"master_weights": trained(w) * FLOAT} if w.weight_bytes < FLOAT and not w.adapter else {}


def in_transit(w: Workload) -> Items:
    """Two buckets of state on its way from host memory and back."""
    if w.optimizer_state != "host":
        return {}
    return {"state_in_transit": min(2 * BUCKET, optimizer_state(w) + sum(_masters(w).values()))}


def _frozen(w: Workload, shape: ModelShape, numbers: int) -> int:
    """Bytes of a model's weights, those within its layers in `base_bits` with a 2-byte scale a block of 64."""
    if not w.base_bits:
        return numbers * w.weight_bytes
    inside = shape.layer_matrices
    return (numbers - inside) * w.weight_bytes + inside * w.base_bits // 8 + 2 * (inside // 64)


def adapter_numbers(w: Workload) -> int:
    """Numbers of the adapters: two thin matrices for each matrix within the layers."""
    shapes = [shape for shape in w.policy.trunk().values() if len(shape) == 3]
    return sum(layers * w.adapter * (rows + columns) for layers, rows, columns in shapes)


def _scalar_model(w: Workload, shape: ModelShape) -> int:
    return _frozen(w, shape, shape.trunk_parameters) + (shape.hidden + 1) * FLOAT


def trained(w: Workload) -> int:
    """Numbers that the optimiser moves."""
    own = w.policy.hidden + 1
    if w.value == "backbone":
        shape = w.reward or w.policy
        own = shape.trunk_parameters + shape.hidden + 1
    return (adapter_numbers(w) if w.adapter else w.policy.parameters) + own


def optimizer_state(w: Workload) -> int:
    """AdamW's two moments: in float32, or a byte a number and a scale a block where a matrix is large enough."""
    if w.optimizer_state != "8bit" or w.adapter:
        return 2 * FLOAT * trained(w)
    shapes = [w.policy.trunk() | w.policy.head()]
    if w.value == "backbone":
        shapes.append((w.reward or w.policy).trunk())
    state = 0
    for shape in (one for weights in shapes for one in weights.values()):
        count, numbers = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
        numbers = math.prod(numbers)
        blocks = numbers >= 4096 and numbers % BLOCK_STATE == 0
        state += 2 * count * (numbers + FLOAT * (numbers // BLOCK_STATE) if blocks else FLOAT * numbers)
    return state


def rollout(w: Workload, *, scored: bool) -> int:
    """Tensors of a rollout batch, and with `scored` what the learner reads beside them."""
    tokens, actions = w.rollout_batch * w.length, w.rollout_batch * w.response
    by_action = 1 + 3 * FLOAT + (5 * FLOAT if scored else IDS)
    return tokens * 2 * IDS + actions * by_action


def kv_cache(w: Workload, slots: int) -> int:
    """Keys and values of `slots` sequences, all as long as they may be."""
    slots += -slots % MIN_SLOTS if w.eager else 0
    if w.paged:
        return (slots * _pages(_columns(w)) + 1) * page_bytes(w)
    return slots * _columns(w) * _token_bytes(w)


def least_kv_cache(w: Workload, slots: int) -> int:
    """The fewest of them that `slots` sequences begin with: pages of their prompts and one to grow into.

    One sequence's longest response fits in any case. Where a slot holds a whole sequence, there is nothing to save.
    """
    if not w.paged:
        return kv_cache(w, slots)
    longest = _pages(_columns(w))
    begun = slots * min(longest, _pages(w.prompt) + 1)
    return (max(longest, begun) + 1) * page_bytes(w)


def page_bytes(w: Workload) -> int:
    """One page, of all layers."""
    return PAGE * _token_bytes(w)


def _columns(w: Workload) -> int:
    return -(-w.length // MIN_SLOTS) * MIN_SLOTS


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def _token_bytes(w: Workload) -> int:
    return w.policy.layers * w.policy.key_width * 2 * w.compute_bytes


def generate(w: Workload, slots: int, kv_bytes: int) -> dict[str, Items]:
    """Moments of sampling with `slots` sequences at a time: the first prompts are read, the last token is decoded."""
    policy, rows, columns = w.policy, max(slots, MIN_SLOTS), _columns(w)
    held = {"kv_cache": kv_bytes, "rollout": rollout(w, scored=False)}
    if w.autocast:
        held["rounded_weights"] = rounded_weights(policy)
    logits = rows * policy.vocab * 2 * FLOAT
    width = prompt_width(w.prompt)
    # Shorter prompts come closer to the budget of a pass than the longest do, where their widths do not divide it.
    tokens = min(slots * width, max(width, w.prefill_tokens))
    reading = pass_of(w, policy, -(-tokens // width), width)
    decoding = rows * columns
    if w.paged or w.eager or w.device != "cpu":
        decoding += 2 * rows * policy.heads * columns * w.compute_bytes
    if w.paged and w.device == "cpu":
        # A layer's pages are read into one tensor, and what does not count is zeroed in another.
        decoding += 2 * rows * _pages(columns) * PAGE * policy.key_width * FLOAT
    prefill = {"prefill_workspace": max(reading.forward_room(), logits)}
    if w.device == "cpu" and w.compute_bytes == FLOAT:
        # The head's weight in oneDNN's layout, from the first step to the last (rlhf_engine.rollout.decode.cpu).
        held["reordered_head"] = policy.vocab * policy.hidden * FLOAT
    return {"prefill": held | prefill, "decode": held | {"decode_workspace": decoding + logits}}


def prompt_width(length: int) -> int:
    """Columns of a prompt's prefill: rlhf_engine.rollout.decode.slots's function of the same name."""
    step = MIN_SLOTS
    while step * 4 < length:
        step *= 2
    return -(-length // step) * step


def score(w: Workload) -> dict[str, Items]:
    """Moments of scoring: the reference, the value model and the reward model, one after the other."""
    held = {"rollout": rollout(w, scored=True)}
    tokens, count = w.pass_tokens(w.rollout_batch), w.pass_actions(w.rollout_batch)
    reading = _inputs(w, w.policy, tokens)
    actions = count * w.policy.hidden * w.compute_bytes
    copied = w.policy.vocab * w.policy.hidden * w.compute_bytes if w.autocast else 0
    block = {"head_workspace": head_block(w, count, gradient=False)}
    kept = block if w.device == "cpu" else {}  # the block of logits stays between calls
    last = reading.tokens * w.policy.hidden * w.weight_bytes

    def rounded(
        shape: ModelShape,
    ) -> Items:  # of models whose weights ask for gradients, which autocast keeps while it runs
        return {"rounded_weights": rounded_weights(shape)} if w.autocast else {}

    moments = {
        "reference": held | kept | {"score_workspace": max(reading.forward_room(), last + actions)},
        "reference head": held | block | {"score_workspace": actions + copied},
    }
    if w.reward is not None:
        shape = w.reward
        batch = pass_of(w, shape, min(SCORE_ROWS, w.rollout_batch), w.length + 1)
        moments["reward model"] = held | kept | rounded(shape) | {"score_workspace": batch.forward_room()}
    if w.value == "backbone":
        shape = w.reward or w.policy
        room = _inputs(w, shape, tokens).forward_room()
        moments["values"] = held | kept | rounded(shape) | {"score_workspace": room}
    return moments


def train(w: Workload) -> dict[str, Items]:
    """Moments of an optimiser step: the end of a forward pass, the two ends of its backward pass, the step itself."""
    tokens, actions = w.pass_tokens(w.minibatch), w.pass_actions(w.minibatch)
    moments = _micro_batch(w, tokens, actions, values=w.value == "backbone")
    if w.pretraining:
        # Every token of plain text is an action, and PPO's gradients are there before it.
        tokens = min(w.pretraining, w.train_rows) * (w.length - 1)
        pretraining = _micro_batch(w, tokens, tokens, values=False)
        moments |= {f"pretraining, {name}": items for name, items in pretraining.items()}
    step = {"rollout": rollout(w, scored=True), "gradients": trained(w) * FLOAT}
    return moments | {"optimiser step": step | in_transit(w)}


def _micro_batch(w: Workload, tokens: int, actions: int, *, values: bool) -> dict[str, Items]:
    policy, checkpointed = w.policy, w.gradient_checkpointing
    passes = [_inputs(w, policy, tokens)] + [_inputs(w, w.reward or policy, tokens)] * values
    hidden = actions * policy.hidden
    weight = 0 if w.adapter else policy.vocab * policy.hidden
    block = {"head_workspace": head_block(w, actions, gradient=True)}
    kept = block if w.device == "cpu" else {}
    gradients = {"gradients": trained(w) * FLOAT}  # room of the arena, from the first forward pass on
    held = {"rollout": rollout(w, scored=True)}
    if w.device != "cpu":  # whose stream brings the first buckets while gradients are made
        held |= in_transit(w)
    if w.autocast:
        held["rounded_weights"] = sum(rounded_weights(one.shape) for one in passes)
    saved = {"activations": sum(one.saved(checkpointed=checkpointed) for one in passes)}
    made = {"head_gradients": (weight + hidden) * FLOAT + hidden * w.compute_bytes}
    # A tied weight's gradient waits for the embedding's, to be added to it.
    waiting = {"head_gradients": weight * FLOAT} if policy.tied else {}
    room = max(one.backward_room(checkpointed=checkpointed) for one in passes)
    # The embedding's gradient comes in the weights' type and is there beside its float32 sum.
    embedding = weight * (FLOAT + (w.weight_bytes if w.weight_bytes < FLOAT else 0))
    begins, ends = {"backward_workspace": room}, {"backward_workspace": embedding}
    return {
        "forward": held | saved | made | block | gradients,
        "backward begins": held | saved | waiting | kept | begins | gradients,
        "backward ends": held | waiting | kept | ends | gradients,
    }


def _inputs(w: Workload, shape: ModelShape, tokens: int) -> Pass:
    """A pass over so many inputs of sequences, each as long as it may be or shorter."""
    columns = w.length - 1
    return Pass(shape, -(-tokens // columns), columns, w.eager, w.weight_bytes, w.compute_bytes, tokens)


def pass_of(w: Workload, shape: ModelShape, rows: int, columns: int) -> Pass:
    return Pass(shape, rows, columns, w.eager, w.weight_bytes, w.compute_bytes)


def rounded_weights(shape: ModelShape) -> int:
    """What autocast keeps of a model that learns: its matrices in half precision, the head's among them."""
    return 2 * (shape.layer_matrices + shape.vocab * shape.hidden)


def head_block(w: Workload, actions: int, *, gradient: bool) -> int:
    """The chunk of logits that the fused head works in (rlhf_kernels.ops.products.Plan)."""
    if w.device == "cpu":
        chunk, step = (512, 512) if w.compute_bytes == FLOAT else (2048, 256)
        return max(min(chunk if gradient else step, actions), MIN_SLOTS) * w.policy.vocab * w.compute_bytes
    rows = max(128, min(4096, 2**30 // (FLOAT * w.policy.vocab) // 128 * 128))
    return rows * w.policy.vocab * FLOAT
