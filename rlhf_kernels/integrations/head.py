"""A module in the place of a model's output layer that gives log-probs and entropies of given tokens instead of logits.

It runs inside the model's own forward, so whatever gathers a sharded weight for that forward (FSDP2's root, ZeRO-3's hooks)
has gathered it, and the results leave through the model's outputs, where those frameworks look for what needs a gradient.

B sequences, T positions, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import checks, linear_token_logprobs
from ..types import TokenLogprobs


class _Wanted(NamedTuple):
    ids: Tensor  # (B, K)
    temperature: float
    mask: Tensor | None  # (B, K), bool
    shifted: bool


class FusedHead(nn.Module):
    """A linear output layer, or peft's LoRA layer around one; install it with `fuse_head`, before FSDP or DeepSpeed wrap.

    Outside `taking` it is the layer it replaced, so that generation works as before. Its weights are that layer's own, under
    the same names in `state_dict`. Of a LoRA layer the active adapters count, their dropout and scale included; variants (DoRA,
    a bias in B) are refused.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        self._wanted: _Wanted | None = None
        if hasattr(head, "lora_A") and hasattr(head, "base_layer"):
            self.lora = head
            self.register_state_dict_post_hook(_without_lora)
            self.register_load_state_dict_pre_hook(_with_lora)
        elif isinstance(head, nn.Linear):
            self.lora = None
            self.weight, self.bias = head.weight, head.bias
        else:
            raise ValueError(
                f"head: got {type(head).__name__}, expected torch.nn.Linear or peft's LoRA layer around one"
            )

    @contextmanager
    def taking(
        self, ids: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None, shifted: bool = False
    ) -> Iterator[None]:
        """Within it the model's `logits` are (B, K, 2): log-prob and entropy of `ids` (B, K), the last K tokens it reads.

        The model must be asked for K + 1 positions or more (`logits_to_keep`). `shifted`: for K positions, `ids` being the
        tokens behind them. Where `mask` is False both are 0.
        """
        if self._wanted is not None:
            raise RuntimeError("taking: the head takes other tokens already")
        self._wanted = _Wanted(ids, temperature, mask, shifted)
        try:
            yield
        finally:
            self._wanted = None

    def forward(self, hidden: Tensor) -> Tensor:  # (B, T, H)
        if self._wanted is None:
            return F.linear(hidden, self.weight, self.bias) if self.lora is None else self.lora(hidden)
        ids, temperature, mask, shifted = self._wanted
        k, t = ids.shape[1], hidden.shape[1]
        if k > t - (not shifted):
            raise ValueError(f"ids: got {k} tokens of {t} positions, expected fewer: row t is the state before token t")
        hidden = hidden[:, t - k :] if shifted else hidden[:, t - k - 1 : t - 1]
        weight, bias = _whole(self if self.lora is None else self.lora.base_layer)
        if self.lora is not None:
            hidden, weight = _widened(self.lora, hidden, weight)
        taken = linear_token_logprobs(hidden, weight, ids, bias=bias, temperature=temperature, mask=mask, entropy=True)
        return torch.stack(taken, -1)


def _whole(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that nothing has left in shards."""
    if hasattr(layer.weight, "placements") or not layer.weight.numel():
        raise ValueError("head: got a sharded weight, expected the head to run inside the forward that gathers it")
    return layer.weight, layer.bias


def _widened(layer: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[h, s A h]` and `[W, B]`, whose product is `W h + s B A h`: no [N, V] tensor for the adapter either."""
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            raise ValueError("head: got merged adapters that are disabled, expected them unmerged first")
        return hidden, weight
    columns, rows = [hidden], [weight]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name], layer.lora_B[name]
        if getattr(layer, "lora_variant", {}).get(name) is not None or b.bias is not None:
            raise ValueError(f"head: got a variant of LoRA in adapter {name!r}, expected plain A and B without a bias")
        low = a(layer.lora_dropout[name](hidden.to(a.weight.dtype))) * layer.scaling[name]
        columns.append(low.to(hidden.dtype))
        rows.append(_whole(b)[0].to(weight.dtype))
    return torch.cat(columns, -1), torch.cat(rows, 1)


def _without_lora(module: nn.Module, state: dict, prefix: str, _: dict) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}lora.")]:
        state[prefix + key.removeprefix(f"{prefix}lora.")] = state.pop(key)


def _with_lora(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        state[f"{prefix}lora.{key.removeprefix(prefix)}"] = state.pop(key)


def fuse_head(model: nn.Module) -> FusedHead:
    """Puts a `FusedHead` in the place of a Hugging Face causal LM's output layer, and gives it; a fused one is found again.

    ValueError for a model that changes its logits behind the layer (softcap, logit scale), found by running one token pair.
    """
    head = model.get_output_embeddings()
    if isinstance(head, FusedHead):
        return head
    fused = FusedHead(head)
    model.set_output_embeddings(fused)
    ids = torch.tensor([[0, 1]], device=head.base_layer.weight.device if fused.lora is not None else head.weight.device)
    made = []
    hook = fused.register_forward_hook(lambda module, inputs, output: made.append(output))
    training = model.training
    try:
        with torch.no_grad(), fused.taking(ids[:, 1:]):
            seen = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        hook.remove()
        model.train(training)
    if len(made) != 1 or not torch.equal(made[0].float(), seen.float()):
        model.set_output_embeddings(head)
        raise ValueError(
            "model: got logits that are not the output layer's own (softcap, logit scale?), expected no transform"
        )
    return fused


def token_logprobs_of(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T)
    keep: int,
    *,
    head: FusedHead,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # (B, keep)
    **inputs: Any,
) -> TokenLogprobs:
    """Log-probs and entropies of the last `keep` tokens by one forward of `model`, wrapped or not; `inputs` go to it."""
    checks.number("keep", keep, least=1, most=input_ids.shape[1] - 1, integer=True)
    with head.taking(input_ids[:, -keep:], temperature=temperature, mask=mask):
        output = model(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep + 1, use_cache=False, **inputs
        )
    return TokenLogprobs(*output.logits.unbind(-1))
