"""Replacement of a model's output layer by a `FusedHead`, so that the model's forward returns log-probs and entropies.

The head runs inside the forward, where FSDP2 and ZeRO-3 have gathered its weight.

B sequences, T positions, K tokens of actions, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..launch_args import TokenLogprobs
from ..modules import FusedHead
from ..ops import checks
from ..output_layer import CausalLM, is_wrapper, run_two_tokens, transform_of, transforms_alike, why_unlike


def fuse_head(model: nn.Module, *, float32: bool = False) -> FusedHead:
    """Replace the output layer of a Hugging Face causal LM by a `FusedHead` and return the head.

    If the output layer is a `FusedHead` already, return it. Softcap and logit scale are read from the model's config.
    The function runs the model on two tokens, once to check that the logits have this softcap and scale and once to
    check that log-probs pass through its forward unchanged. A layer that peft wrapped because of `modules_to_save` or
    `trainable_token_indices` stays in the model, and the head replaces its forward. `float32` computes the head's
    product in float32.

    Raises:
        ValueError: the model transforms its logits in a different way; its output layer is not replaced then.
    """
    lm = cast(CausalLM, model)
    layer = lm.get_output_embeddings()
    present = FusedHead.installed_in(layer)
    if present is not None:
        return present
    transform = transform_of(model)
    head = FusedHead.replacing(layer, **transform, float32=float32)
    stays = is_wrapper(layer)
    head.install() if stays else lm.set_output_embeddings(head)
    fused = False
    try:
        fused = transforms_alike(model, head, transform) and _scores_tokens(model, head)
    finally:
        if not fused:
            head.uninstall() if stays else lm.set_output_embeddings(layer)
    if not fused:
        raise ValueError(why_unlike(transform))
    return head


@torch.no_grad()
def _scores_tokens(model: nn.Module, head: FusedHead) -> bool:
    """Return whether log-probs pass through the model's forward unchanged, in evaluation mode."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output)

    hook = head.register_forward_hook(keep)
    ids = torch.tensor([[1]], device=next(head.parameters()).device)
    training = model.training
    model.eval()
    try:
        with head.taking(ids) as taken:
            logits = run_two_tokens(model, head)
    finally:
        hook.remove()
        model.train(training)
    expected = taken.result(outputs[0] * head.logit_scale)
    got = taken.result(logits)
    assert got.entropy is not None and expected.entropy is not None
    return torch.equal(got.logprobs, expected.logprobs) and torch.equal(got.entropy, expected.entropy)


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
