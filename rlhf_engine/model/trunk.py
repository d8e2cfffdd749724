"""One forward pass of a trunk: in which type its products are, which activations stay, how packed sequences attend.

B sequences, N tokens of all of them, D size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_engine.model.upcast import UpcastAttention, product_dtype, upcasts, weights_rounded_once

PACKED = "rlhf_packed"
_VARLEN = frozenset(inspect.signature(varlen_attn).parameters)


def last_hidden(
    trunk: PreTrainedModel,
    input_ids: Tensor,  # (B, S), or (1, N) packed
    *,
    compute_dtype: torch.dtype | None,
    cu_inputs: Tensor | None = None,  # (B + 1,), int32, where each packed sequence begins in N
    **options: Any,
) -> Tensor:  # (B, S, H), of compute_dtype where that is given
    """Hidden states after the final norm; `options` are the trunk's own."""
    with ExitStack() as stack:
        stack.enter_context(products(compute_dtype, input_ids.device))
        config = trunk.config.get_text_config()
        kind = config._attn_implementation if cu_inputs is None else PACKED
        stack.enter_context(attention(config, kind, compute_dtype or trunk.dtype, input_ids.device))
        if cu_inputs is not None:
            options["position_ids"] = positions(cu_inputs, input_ids.shape[1])[None]
            # Prepared masks are of four dimensions: transformers hands them to the attention as they are.
            options["attention_mask"] = cu_inputs[None, None, None]
            options["max_length_q"] = int(cu_inputs.diff().max())
        if torch.is_grad_enabled():
            stack.enter_context(_recomputing(trunk))
        hidden = trunk(input_ids=input_ids, **options).last_hidden_state
    return hidden if compute_dtype is None else hidden.to(compute_dtype)


@contextmanager
def products(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Matrix products of float32 factors are made of their `dtype` copies; a weight is copied once in a `with`.

    None leaves the factors as they are. The copies do not follow a weight that changes within the `with`, and those made
    while autograd is off carry no gradient: a pass that learns shares no `with` with one that does not.
    """
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype=dtype), weights_rounded_once():
        yield


@contextmanager
def attention(
    config: PreTrainedConfig, name: str | None, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Iterator[None]:
    """The models of `config` attend by the implementation `name`.

    With `dtype` and `device`, torch's attention has float32 products where the device has none of that type.
    """
    kept = config._attn_implementation
    half, product = dtype.itemsize == 2, name in ("sdpa", PACKED)
    upcast = device is not None and half and product and upcasts(dtype, device.type)
    config._attn_implementation = name
    try:
        with UpcastAttention() if upcast else nullcontext():
            yield
    finally:
        config._attn_implementation = kept


# ---- weights at the two ends of a model ----


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the output layer of a causal LM, `nn.Linear` or peft's layer around one, which has the same attributes."""
    return cast("nn.Linear", model.get_output_embeddings())


def input_layer(model: PreTrainedModel) -> nn.Embedding:
    """Return the table of input embeddings; transformers types it as any module."""
    return cast("nn.Embedding", model.get_input_embeddings())


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its output layer; transformers types it as any module."""
    return cast("PreTrainedModel", model.base_model if model.base_model is not model else model.get_decoder())


# ---- packed sequences ----


def packs(trunk: PreTrainedModel, compute_dtype: torch.dtype | None) -> bool:
    """Whether a budget of tokens is packed and not padded: where torch's attention has a kernel for that."""
    half = (compute_dtype or trunk.dtype) in (torch.bfloat16, torch.float16)
    plain = trunk.config.get_text_config()._attn_implementation == "sdpa"
    return plain and half and trunk.device.type == "cuda" and "window_size" in _VARLEN


@torch.no_grad()
def check_packing(trunk: PreTrainedModel, compute_dtype: torch.dtype | None) -> None:
    """Compare two packed sequences with each alone; ValueError where they see each other, as through a recurrent state."""
    ids = torch.arange(1, 12, device=trunk.device).remainder(input_layer(trunk).weight.shape[0])[None]
    cu_inputs = torch.tensor([0, 6, 11], dtype=torch.int32, device=ids.device)
    both = last_hidden(trunk, ids, compute_dtype=compute_dtype, cu_inputs=cu_inputs, use_cache=False)
    alone = [last_hidden(trunk, part, compute_dtype=compute_dtype, use_cache=False) for part in ids.split([6, 5], 1)]
    expected = torch.cat(alone, 1)
    difference = float((both - expected).abs().max())
    allowed = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if not difference <= allowed:
        raise ValueError(
            f"ppo.microbatch_tokens: got a budget for {type(trunk).__name__}, whose sequences differ by {difference:.3g} (at "
            f"most {allowed:.3g} expected) when one lies packed behind another; expected None and ppo.microbatch"
        )


def positions(cu_inputs: Tensor, count: int) -> Tensor:  # (B + 1,), N -> (N,)
    """0, 1, ... of every packed sequence."""
    starts = cu_inputs[:-1].repeat_interleave(cu_inputs.diff(), output_size=count)
    return torch.arange(count, device=cu_inputs.device) - starts


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,  # (1, groups, N, D)
    value: Tensor,  # (1, groups, N, D)
    attention_mask: Tensor,  # (1, 1, 1, B + 1), int32: where each sequence begins
    scaling: float | None = None,  # default: D ** -0.5
    sliding_window: int | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    **unused: object,  # what other implementations are told too: dropout, is_causal
) -> tuple[Tensor, None]:  # (1, N, heads, D)
    """Causal attention of packed sequences, each within itself, in transformers' attention interface."""
    if softcap is not None:
        raise ValueError(
            f"softcap: got {softcap}, expected None: torch's attention has no softcap; model.attention=eager has"
        )
    cu_inputs = attention_mask.view(-1)
    if query.device.type == "cuda":
        longest = int(cu_inputs.diff().max()) if max_length_q is None else max_length_q
        return varlen_attention(query, key, value, cu_inputs, longest, scaling, sliding_window), None
    parts = (x.split(cu_inputs.diff().tolist(), 2) for x in (query, key, value))
    made = [_one_attention(q, k, v, scaling, sliding_window) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(made, 2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)


def varlen_attention(
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,  # (1, groups, N, D)
    value: Tensor,  # (1, groups, N, D)
    cu_inputs: Tensor,  # (B + 1,), int32
    longest: int,
    scaling: float | None,
    window: int | None,
    kernel: Callable[..., Any] = varlen_attn,  # of (N, heads, D); without `return_aux` it returns one tensor
) -> Tensor:  # (1, N, heads, D)
    """`torch.nn.attention.varlen`, which takes half precision only; autocast leaves its factors as they come."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    options = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _VARLEN:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    reach = (-1 if window is None else window - 1, 0)
    return kernel(
        query, key, value, cu_inputs, cu_inputs, longest, longest, scale=scaling, window_size=reach, **options
    )[None]


def _one_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention within one sequence, [1, heads, S, D]."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    mask = None
    if window is not None and window < length:
        column = torch.arange(length, device=query.device)
        distance = column[:, None] - column
        mask = (distance >= 0) & (distance < window)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
    )


# ---- gradient checkpointing ----


def checkpoint_layers(trunk: PreTrainedModel) -> None:
    """From now on a backward pass runs each layer again, and the forward pass keeps the layers' inputs alone.

    ValueError for a trunk none of whose layers are transformers' `GradientCheckpointingLayer`.
    """
    layers = list(layers_of(trunk))
    if not layers:
        raise ValueError(
            f"memory.gradient_checkpointing: got True, expected False for {type(trunk).__name__}, whose layers transformers "
            "cannot run again"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        run: Any = partial(_recomputed, trunk.config.get_text_config())
        layer._gradient_checkpointing_func = run


def layers_of(trunk: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """The layers that transformers marks as such."""
    return (module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer))


@contextmanager
def _recomputing(trunk: nn.Module) -> Iterator[None]:
    """Layers take the checkpointed way in training mode alone, in which nothing else of an engine's trunk ever is."""
    layers = [layer for layer in layers_of(trunk) if layer.gradient_checkpointing]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _recomputed(config: PreTrainedConfig, run: partial, *inputs: Tensor) -> Any:
    """`run(*inputs)`, a layer's forward, in evaluation mode and with today's attention, now and in the backward pass."""
    layer, kind, dtype = run.args[0], config._attn_implementation, product_dtype(inputs[0])

    def forward(*inputs: Tensor) -> Any:
        training, layer.training = layer.training, False
        try:
            with attention(config, kind, dtype, inputs[0].device):
                return run(*inputs)
        finally:
            layer.training = training

    # Evaluation mode draws no random numbers, so there is no state of theirs to keep.
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
