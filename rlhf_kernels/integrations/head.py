"""Replacement of a model's output layer by a `FusedHead`, so that the model's forward returns log-probs and entropies.

The head runs inside the forward, where FSDP2 and ZeRO-3 have gathered its weight.

B sequences, T positions, K tokens of actions, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..launch_args import TokenLogprobs
from ..modules import CausalLM, FusedHead, transform_of
from ..ops import checks

LARGEST = 100.0
"""Largest logit of the probe in `fuse_head`, large enough to reveal any softcap."""


def fuse_head(model: nn.Module) -> FusedHead:
    """Replace the output layer of a Hugging Face causal LM by a `FusedHead` and return the head.

    If the output layer is a `FusedHead` already, return it. Softcap and logit scale are read from the model's config.
    The function runs the model on two tokens, once to check that the logits have this softcap and scale and once to
    check that log-probs pass through its forward unchanged.

    Raises:
        ValueError: the model transforms its logits in a different way; its output layer is not replaced then.
    """
    lm = cast(CausalLM, model)
    layer = lm.get_output_embeddings()
    if isinstance(layer, FusedHead):
        return layer
    head = FusedHead.replacing(layer, **transform_of(model))
    lm.set_output_embeddings(head)
    training, fused = model.training, False
    model.eval()
    try:
        fused = _transforms_logits_alike(model, head) and _scores_tokens(model, head)
    finally:
        model.train(training)
        if not fused:
            lm.set_output_embeddings(layer)
    if not fused:
        raise ValueError(
            f"model: the logits are not those of the output layer with softcap={head.softcap} and "
            f"logit_scale={head.logit_scale}, which are in the config; a different transform of the logits is not supported"
        )
    return head


@torch.no_grad()
def _transforms_logits_alike(model: nn.Module, head: FusedHead) -> bool:
    """Return whether the model transforms a probe, in place of the layer's output, into the same logits as the head."""
    calls: list[Tensor] = []

    def probe(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        calls.append(torch.linspace(-LARGEST, LARGEST, output.shape[-1], device=output.device).to(output.dtype))
        return calls[-1].expand_as(output)

    hook = head.register_forward_hook(probe)
    try:
        seen = _run(model, head).float()
    finally:
        hook.remove()
    if len(calls) != 1:
        return False
    expected = head.transform(calls[0].float())
    eps = torch.finfo(calls[0].dtype).eps
    # The model may round to its dtype after each of its three operations.
    return seen.shape[-1] == len(expected) and torch.allclose(
        seen, expected.expand_as(seen), rtol=4 * eps, atol=4 * eps
    )


@torch.no_grad()
def _scores_tokens(model: nn.Module, head: FusedHead) -> bool:
    """Return whether log-probs pass through the model's forward unchanged."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output)

    hook = head.register_forward_hook(keep)
    ids = torch.tensor([[1]], device=next(head.parameters()).device)
    try:
        with head.taking(ids) as taken:
            logits = _run(model, head)
    finally:
        hook.remove()
    expected = taken.result(outputs[0] * head.logit_scale)
    got = taken.result(logits)
    assert got.entropy is not None and expected.entropy is not None
    return torch.equal(got.logprobs, expected.logprobs) and torch.equal(got.entropy, expected.entropy)


def _run(model: nn.Module, head: FusedHead) -> Tensor:
    device = next(head.parameters()).device
    ids = torch.tensor([[0, 1]], device=device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


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
    """Return log-probs and entropies (B, keep) of the last `keep` tokens, with one forward of `model`.

    `model` contains `head` and may be wrapped (FSDP, DeepSpeed). `inputs` are passed to its forward. Results are 0
    where `mask` is False.

    Raises:
        ValueError: `keep` is not in [1, T - 1].
    """
    checks.number("keep", keep, least=1, most=input_ids.shape[1] - 1, integer=True)
    with head.taking(input_ids[:, -keep:], temperature=temperature, mask=mask) as taken:
        output = model(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep + 1, use_cache=False, **inputs
        )
    return taken.result(output.logits)
