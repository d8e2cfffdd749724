"""One forward pass of a trunk: the dtype of its products, attention of packed sequences, and gradient checkpointing.

Shapes: B sequences, S positions, N tokens of all sequences, H hidden, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_engine.model import exact
from rlhf_engine.model.exact import is_exact
from rlhf_engine.model.upcast import UpcastAttention, product_dtype, upcasts, weights_rounded_once

if TYPE_CHECKING:
    from rlhf_engine.model.adapters import Adapters
    from rlhf_engine.model.top_layers import TopLayers

ADAPTERS = "rlhf_adapters"
"""Attribute of a model that refers to its `Adapters`."""

TOP = "rlhf_top_layers"
"""Attribute of a trunk that refers to its `TopLayers`."""

PACKED = "rlhf_packed"
_VARLEN = frozenset(inspect.signature(varlen_attn).parameters)


def last_hidden(
    trunk: PreTrainedModel,
    input_ids: Tensor,  # (B, S), or (1, N) packed
    *,
    compute_dtype: torch.dtype | None,
    cu_inputs: Tensor | None = None,  # (B + 1,), int32, start of each packed sequence in N
    router_logits: list[Tensor] | None = None,
    **options: Any,
) -> Tensor:  # (B, S, H), in compute_dtype if that is given, and at most as wide as the weights otherwise
    """Return the hidden states after the final norm; `options` are passed to the trunk.

    If `router_logits` is a list, those of each layer with experts are appended to it.
    """
    with ExitStack() as stack:
        stack.enter_context(products(compute_dtype, input_ids.device))
        config = trunk.config.get_text_config()
        kind = config._attn_implementation if cu_inputs is None else PACKED
        if kind == "sdpa" and is_exact(trunk):
            kind = exact.ATTENTION
        stack.enter_context(attention(config, kind, compute_dtype or trunk.dtype, input_ids.device))
        if cu_inputs is not None:
            options["position_ids"] = positions(cu_inputs, input_ids.shape[1])[None]
            # transformers passes four-dimensional masks to the attention unchanged.
            options["attention_mask"] = cu_inputs[None, None, None]
            options["max_length_q"] = int(cu_inputs.diff().max())
        if torch.is_grad_enabled():
            stack.enter_context(_recomputing(trunk))
        if router_logits is not None:
            options["output_router_logits"] = True
        outputs = trunk(input_ids=input_ids, **options)
        if router_logits is not None:
            router_logits += outputs.router_logits
        hidden = outputs.last_hidden_state
    # Mamba's norm returns float32 from weights in bfloat16; its output layer gets the dtype of the weights.
    dtype = compute_dtype or (trunk.dtype if hidden.dtype.itemsize > trunk.dtype.itemsize else hidden.dtype)
    return hidden.to(dtype)


@contextmanager
def products(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Compute matrix products of float32 factors from copies in `dtype`; each weight is copied once per context.

    None leaves the factors unchanged. The copies do not follow a weight that changes inside the context. Copies created
    while autograd is off carry no gradient, so a pass that needs gradients must not share a context with one that does
    not.
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
    """Use the attention implementation `name` for the models of `config` inside the context.

    With `dtype` and `device`, torch's attention computes float32 products if the device has none of that dtype.
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


# ---- input layer, output layer, trunk ----


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the output layer of a causal LM, `nn.Linear` or peft's layer around one, which has the same attributes."""
    return cast("nn.Linear", model.get_output_embeddings())


def input_layer(model: PreTrainedModel) -> nn.Embedding:
    """Return the input embeddings, which transformers annotates as a plain module."""
    return cast("nn.Embedding", model.get_input_embeddings())


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its output layer, which transformers annotates as a plain module."""
    found = model.base_model if model.base_model is not model else model.get_decoder()
    if found is model:  # Llama 4: its `base_model_prefix` names a module of the multimodal model
        found = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    return cast("PreTrainedModel", found)


_MIXES_TOKENS = ("DogeCDMoE",)
"""Classes of transformers whose router mixes tokens, as their code documents. The effect can be below that of rounding."""


def named(model: PreTrainedModel) -> str:
    """Return a model's class and, if it is known, its folder, for errors."""
    folder = getattr(model, "name_or_path", "")
    return f"model: {type(model).__name__}" + f" of {folder}" * bool(folder)


def check_finite(model: PreTrainedModel, result: Tensor) -> None:
    """Raise ValueError if what a model computed for a few tokens is not finite."""
    if not bool(result.isfinite().all()):
        raise ValueError(
            f"{named(model)}: its results for ordinary tokens are not finite; weights or numbers in its config.json are "
            f"damaged, or too large for {model.dtype}"
        )


@torch.no_grad()
def check_causal(trunk: PreTrainedModel, compute_dtype: torch.dtype | None) -> None:
    """Compare the hidden states of a sequence's first tokens with those of the whole sequence in a batch of two.

    Rounding may send a token to a different expert, so a difference counts if most tokens have it.

    Raises:
        ValueError: they depend on later tokens or on other sequences, so its tokens have no log-probs.
    """
    ids = torch.arange(1, 9, device=trunk.device).remainder(input_layer(trunk).weight.shape[0])
    alone = last_hidden(trunk, ids[None, :5], compute_dtype=compute_dtype, use_cache=False)[0]
    together = last_hidden(trunk, torch.stack([ids, ids.flip(0)]), compute_dtype=compute_dtype, use_cache=False)[0, :5]
    check_finite(trunk, alone)
    check_finite(trunk, together)
    difference = (together - alone).abs().amax(-1) / alone.abs().max()
    mixes = any(type(module).__name__ in _MIXES_TOKENS for module in trunk.modules())
    if mixes or not float(difference.median()) <= (1e-2 if alone.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"model: the hidden states of {named(trunk).removeprefix('model: ')} depend on later tokens or on other "
            "sequences of the batch, so its tokens have no log-probs; expected a causal LM"
        )


# ---- packed sequences ----


def packs(trunk: PreTrainedModel, compute_dtype: torch.dtype | None) -> bool:
    """Return whether micro-batches with a token budget are packed, not padded: where torch has an attention kernel for it."""
    half = (compute_dtype or trunk.dtype) in (torch.bfloat16, torch.float16)
    plain = trunk.config.get_text_config()._attn_implementation == "sdpa"
    return plain and half and trunk.device.type == "cuda" and "window_size" in _VARLEN


@torch.no_grad()
def check_packing(trunk: PreTrainedModel, compute_dtype: torch.dtype | None) -> None:
    """Compare two packed sequences with separate passes over each.

    Raises:
        ValueError: they affect each other, for example through a recurrent state.
    """
    ids = torch.arange(1, 12, device=trunk.device).remainder(input_layer(trunk).weight.shape[0])[None]
    cu_inputs = torch.tensor([0, 6, 11], dtype=torch.int32, device=ids.device)
    both = last_hidden(trunk, ids, compute_dtype=compute_dtype, cu_inputs=cu_inputs, use_cache=False)
    alone = [last_hidden(trunk, part, compute_dtype=compute_dtype, use_cache=False) for part in ids.split([6, 5], 1)]
    expected = torch.cat(alone, 1)
    difference = float((both - expected).abs().max())
    allowed = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if not difference <= allowed:
        raise ValueError(
            f"ppo.microbatch_tokens: {type(trunk).__name__} cannot use a token budget: packing changes its hidden states by "
            f"{difference:.3g} (allowed: {allowed:.3g}); set ppo.microbatch instead"
        )


def positions(cu_inputs: Tensor, count: int) -> Tensor:  # (B + 1,), N -> (N,)
    """Return the position of each token in its packed sequence."""
    starts = cu_inputs[:-1].repeat_interleave(cu_inputs.diff(), output_size=count)
    return torch.arange(count, device=cu_inputs.device) - starts


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,  # (1, groups, N, D)
    value: Tensor,  # (1, groups, N, D)
    attention_mask: Tensor,  # (1, 1, 1, B + 1), int32: start of each sequence
    scaling: float | None = None,  # default: D ** -0.5
    sliding_window: int | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    **unused: object,  # arguments of other implementations: dropout, is_causal
) -> tuple[Tensor, None]:  # (1, N, heads, D)
    """Return causal attention within each packed sequence, through transformers' attention interface."""
    if softcap is not None:
        raise ValueError(
            f"softcap: got {softcap}, expected None, because torch's attention has no softcap; set model.attention=eager"
        )
    cu_inputs = attention_mask.view(-1)
    if query.device.type == "cuda":
        longest = int(cu_inputs.diff().max()) if max_length_q is None else max_length_q
        return varlen_attention(query, key, value, cu_inputs, longest, scaling, sliding_window), None
    parts = (x.split(cu_inputs.diff().tolist(), 2) for x in (query, key, value))
    outputs = [_one_attention(q, k, v, scaling, sliding_window) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)


def varlen_attention(
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,  # (1, groups, N, D)
    value: Tensor,  # (1, groups, N, D)
    cu_inputs: Tensor,  # (B + 1,), int32
    longest: int,
    scaling: float | None,
    window: int | None,
    kernel: Callable[..., Any] = varlen_attn,  # on (N, heads, D); returns one tensor without `return_aux`
) -> Tensor:  # (1, N, heads, D)
    """Return the attention of `torch.nn.attention.varlen`.

    It supports only half precision, and autocast does not convert its inputs, so they are converted here.
    """
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
    """Return causal attention within one sequence, [1, heads, S, D]."""
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
    """Recompute each layer in backward passes from now on, so that forward passes keep only the layers' inputs.

    Raises:
        ValueError: no layer of the trunk is a `GradientCheckpointingLayer` of transformers.
    """
    layers = list(outermost_layers(trunk))
    if not layers:
        raise ValueError(
            f"memory.gradient_checkpointing: got True, expected False for {type(trunk).__name__}, whose layers transformers "
            "cannot recompute"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        run: Any = partial(_recomputed, trunk.config.get_text_config())
        layer._gradient_checkpointing_func = run


def layers_of(trunk: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """Iterate over the layers that transformers can recompute."""
    return (module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer))


def outermost_layers(module: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """Iterate over the layers that transformers can recompute and that are not part of one: those are recomputed with it."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from outermost_layers(child)


@contextmanager
def _recomputing(trunk: nn.Module) -> Iterator[None]:
    """Put checkpointed layers into training mode, without which transformers does not recompute them.

    All other modules of an engine's trunk stay in evaluation mode.
    """
    layers = [layer for layer in layers_of(trunk) if layer.gradient_checkpointing]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _recomputed(config: PreTrainedConfig, run: partial, *inputs: Tensor) -> Any:
    """Run a layer's forward in evaluation mode, with the current attention and adapter, now and in the backward pass."""
    layer, kind, dtype = run.args[0], config._attn_implementation, product_dtype(inputs[0])
    held = held_adapters(layer)

    def forward(*inputs: Tensor) -> Any:
        training, layer.training = layer.training, False
        try:
            with attention(config, kind, dtype, inputs[0].device), restored(held):
                return run(*inputs)
        finally:
            layer.training = training

    # Evaluation mode draws no random numbers, so the generator's state need not be kept.
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


# ---- adapters, trained layers ----


def adapters_of(model: nn.Module) -> Adapters | None:
    """Return the adapters of a model; None if it has none."""
    return model.__dict__.get(ADAPTERS)


def top_of(trunk: nn.Module) -> TopLayers | None:
    """Return the trained layers of a trunk; None if all are trained."""
    return trunk.__dict__.get(TOP)


def held_adapters(module: nn.Module) -> list[tuple[Any, list[str], bool]]:
    """Return the layers of peft in `module` with their state, for `restored`."""
    found: list[Any] = [one for one in module.modules() if hasattr(one, "_active_adapter")]
    return [(one, one._active_adapter, one._disable_adapters) for one in found]


@contextmanager
def restored(held: list[tuple[Any, list[str], bool]]) -> Iterator[None]:
    """Set layers to the state that `held_adapters` found, inside the `with` block."""
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer, *_ in held]
    _set(held)
    try:
        yield
    finally:
        _set(before)


def _set(states: list[tuple[Any, list[str], bool]]) -> None:
    for layer, names, disabled in states:
        layer._active_adapter, layer._disable_adapters = names, disabled
