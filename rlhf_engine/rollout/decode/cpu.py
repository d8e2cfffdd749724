"""Decoding on CPU: layers whose bits do not depend on the batch, and a faster matrix product for the output layer.

Attention: torch's fused kernel on CPU gives each thread a scratch block whose alignment depends on the thread, and BLAS rounds
by alignment. With one query per sequence the bits then depend on the thread that computed it. `decode_attention` avoids this: a
row reads only the columns of its sequence.

Activations: torch's loops for SiLU, GELU and sigmoid on CPU end in scalar code, which rounds differently from the vector code,
at the end of each thread's share of the tensor. The loops for exp, erf and tanh do not (`rlhf_engine.model.exact`).
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rlhf_engine.model import LanguageModel
from rlhf_engine.model.exact import (
    MIN_ROWS,
    exact_gelu,
    exact_gelu_tanh,
    exact_silu,
    invariant_activation,
    is_exact,
    row_attention,
)
from rlhf_engine.model.trunk import attention
from rlhf_engine.model.upcast import product_dtype, upcasts

ATTENTION = "rlhf_slots"

_log = logging.getLogger(__name__)


def slot_attention(
    module: nn.Module,
    query: Tensor,  # (R, heads, 1, D)
    key: Tensor,  # (slots, groups, W, D), slots <= R
    value: Tensor,  # (slots, groups, W, E), head size E
    attention_mask: Tensor,  # (R, 1, 1, W), bool
    scaling: float | None = None,  # default: D ** -0.5
    **unused: object,  # arguments of other implementations: dropout, sliding_window, is_causal
) -> tuple[Tensor, None]:  # (R, 1, heads, E)
    """Compute `decode_attention` in transformers' attention interface; rows without a slot get zeros."""
    slots = len(key)
    out = row_attention(query[:slots, :, 0], key, value, attention_mask[:slots, 0, 0], scaling)
    if slots < len(query):
        out = nn.functional.pad(out, (0, 0, 0, 0, 0, len(query) - slots))
    return out[:, None], None


AttentionInterface.register(ATTENTION, slot_attention)


# ---- experts ----
# A mixture of experts computes a product per expert, with as many rows as there are tokens that chose the expert. BLAS computes
# products with few rows differently, so the bits of a token would depend on the other sequences.


EXPERTS = "rlhf_experts"
_ALL_TOKENS = ("Llama4TextExperts",)
"""Classes in which every expert computes all tokens, so that its products have as many rows as the step."""


def invariant_experts(
    module: Any,  # an experts module of transformers
    hidden_states: Tensor,  # (N, H)
    top_k_index: Tensor,  # (N, K), int64
    top_k_weights: Tensor,  # (N, K)
) -> Tensor:  # (N, H)
    """Return the weighted sum of each token's K experts, in transformers' experts interface, with padded products."""
    outputs = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1])
    inside = "gate_up_proj" if module.has_gate else "up_proj"
    for expert in top_k_index.unique().tolist():
        token, place = (top_k_index == expert).nonzero(as_tuple=True)
        rows = nn.functional.pad(hidden_states[token], (0, 0, 0, max(0, MIN_ROWS - len(token))))
        rows = _expert_product(module, inside, expert, rows)
        rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        rows = _expert_product(module, "down_proj", expert, rows)
        if module.has_post_expert_norm:
            rows = module.post_expert_norm(rows)
        outputs[token, place] = rows[: len(token)].to(outputs.dtype)
    weighted = (outputs * top_k_weights[..., None]).float()
    return sum(weighted.unbind(1), torch.zeros(())).to(hidden_states.dtype)


def _expert_product(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    weight = weight.t() if module.is_transposed else weight
    dtype = product_dtype(rows)
    if not upcasts(dtype, "cpu"):
        return nn.functional.linear(rows, weight, bias)
    with torch.autocast("cpu", enabled=False):
        wide = rows.to(dtype).float() @ weight.to(dtype).float().t()
        return (wide if bias is None else wide + bias.to(dtype)).to(dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, invariant_experts)


_CALLED = re.compile(r"\bsigmoid\(|(\bF|functional)\.(silu|gelu)\(")


def _calls_activations(model: nn.Module) -> bool:
    """Return whether a model's code calls sigmoid, SiLU or GELU as a function, for example in a router or a gate."""
    try:
        return _CALLED.search(inspect.getsource(sys.modules[type(model).__module__])) is not None
    except OSError:  # no source, so it may
        return True


def other_experts(trunk: nn.Module) -> str | None:
    """Return the name of a class of experts whose products are not those of `invariant_experts`, or None."""
    names = {type(module).__name__ for module in trunk.modules() if not hasattr(module, "has_post_expert_norm")}
    return next((name for name in sorted(names) if "Experts" in name and name not in _ALL_TOKENS), None)


class InvariantLayers:
    """Context managers `prefill` and `decode`, which replace layers of the policy's trunk; eager attention is not replaced."""

    def __init__(self, policy: LanguageModel) -> None:
        self.config = policy.model.config.get_text_config()
        on_cpu = policy.device.type == "cpu"
        self.has_experts = on_cpu and any(hasattr(module, "has_post_expert_norm") for module in policy.trunk.modules())
        if on_cpu and (kind := other_experts(policy.trunk)):
            _log.warning(
                "%s: the experts of %s are not computed through transformers' interface, so the bits of a sequence may depend "
                "on rollout.batch_size",
                type(policy.model).__name__,
                kind,
            )
        self.math = InvariantFunctions if on_cpu and _calls_activations(policy.model) else nullcontext
        others = (module for module in policy.trunk.modules() if on_cpu and not is_exact(module))
        found = ((module, invariant_activation(module)) for module in others)
        self.activations = [(module, formula) for module, formula in found if formula is not None]

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """Replace the activations inside the `with` block."""
        kept = getattr(self.config, "_experts_implementation", None)
        for module, formula in self.activations:
            module.forward = formula
        if self.has_experts:
            self.config._experts_implementation = EXPERTS
        try:
            with self.math():
                yield
        finally:
            if self.has_experts:
                self.config._experts_implementation = kept
            for module, _ in self.activations:
                del module.forward

    @contextmanager
    def decode(self, *, eager: bool) -> Iterator[None]:
        """Replace the activations and, unless `eager`, the attention inside the `with` block."""
        with attention(self.config, "eager" if eager else ATTENTION), self.prefill():
            yield


def _sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20, x, x.exp().log1p_())


_FUNCTIONS: dict[Callable[..., Any], Callable[[Tensor], Tensor]] = {
    nn.functional.silu: exact_silu,
    nn.functional.gelu: exact_gelu,
    nn.functional.sigmoid: _sigmoid,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    nn.functional.softplus: _softplus,
}


class InvariantFunctions(TorchFunctionMode):
    """`with InvariantFunctions():` computes activations on the CPU, called as functions of one argument, by the formulas above.

    Layers with a recurrent state call them as functions, so no module can be replaced.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        plain = len(args) == 1 and not options.pop("inplace", False)
        approximate = options.pop("approximate", "none") == "tanh"
        formula = exact_gelu_tanh if func is nn.functional.gelu and approximate else _FUNCTIONS.get(func)
        if formula is None or not plain or options or args[0].device.type != "cpu":
            return func(*args, **kwargs or {})
        return formula(args[0])


# ---- the language-model head ----
# The weight of the language-model head is reordered into oneDNN's layout once per rollout, for the matrix product of each step.
# The [V, H] weight is larger than the CPU cache, so a product with few rows is bound by memory bandwidth and reads the weight
# out of order. With a reordered copy, logits take about two thirds of the time. The operations are private to torch and are
# looked up by name. If they are missing, the output layer is called instead.


_ROWS = 64
"""Number of rows for which the layout is optimised; products with any number of rows can use it."""


def reorders(device: str, dtype: torch.dtype) -> bool:
    """Return whether torch has oneDNN's packed product for weights of `dtype` on a device of type `device`."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    here = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return here and device == "cpu" and dtype == torch.float32


def head_product(policy: LanguageModel) -> ReorderedHead | None:
    """Return the matrix product of the output layer for the decode steps of one rollout; None selects the layer itself."""
    weight = policy.lm_weight
    return ReorderedHead() if policy.compute_dtype is None and reorders(weight.device.type, weight.dtype) else None


class ReorderedHead:
    """Computes `hidden @ weight.T + bias`. The first call reorders the weight, and all later calls use that copy."""

    def __init__(self) -> None:
        self.reordered: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (rows, H) -> (rows, V)
        """Return `hidden @ weight.T + bias`."""
        if self.reordered is None:
            self.reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.reordered, bias, "none", [], "")
