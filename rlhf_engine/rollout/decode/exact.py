"""The check of `rollout.exact`: decoded log-probs have the bits of those of forward passes over whole sequences."""

from __future__ import annotations

import torch

from rlhf_engine.model import LanguageModel, TokenBatch
from rlhf_engine.rollout.decode.protocol import Decoder
from rlhf_kernels import token_logprobs

_PROMPTS, _DECODED = (5, 14, 9), 5
"""Tokens of the prompts, which have one padded width, and tokens that are decoded after each."""


@torch.no_grad()
def check_exact(decoder: Decoder, policy: LanguageModel, *, backend: str) -> None:
    """Decode a few sequences, and compare their log-probs with those of passes over one sequence and over all of them.

    Raises:
        ValueError: the bits of one differ.
    """
    vocabulary, prompts = policy.lm_weight.shape[0], _PROMPTS[: decoder.slots]
    sequences = [
        torch.arange(start, start + 7 * (length + _DECODED + 1), 7).remainder(vocabulary)
        for start, length in enumerate(prompts, 1)
    ]
    found = _decoded(decoder, policy, sequences, backend)
    width = max(map(len, sequences)) - 1
    together = torch.stack([torch.nn.functional.pad(ids, (0, width + 1 - len(ids))) for ids in sequences])
    for row, (ids, length) in enumerate(zip(sequences, prompts, strict=True)):
        for inputs, at in ((ids[None, :-1], 0), (together[:, :-1], row * width)):
            rows = torch.arange(length - 1, length + _DECODED) + at
            batch = TokenBatch(input_ids=inputs, rows=rows, ids=ids[length:])
            whole = policy(batch, ("logprobs",)).logprobs
            if whole is None or not torch.equal(whole, found[row]):
                raise ValueError(
                    f"rollout.exact: got True for {type(policy.model).__name__}, expected False: the bits of its log-probs "
                    "depend on the pass that computes them"
                )


def _decoded(
    decoder: Decoder, policy: LanguageModel, sequences: list[torch.Tensor], backend: str
) -> torch.Tensor:  # (B, decoded + 1)
    """Return the log-probs of the tokens after the prompts, decoded token by token."""
    found = []
    try:
        decoder.open(len(sequences))
        outputs = decoder.prefill([ids[: -_DECODED - 1] for ids in sequences], 0)
        for step in range(_DECODED + 1):
            taken = torch.stack([ids[len(ids) - _DECODED - 1 + step] for ids in sequences])
            assert outputs.logits is not None
            found.append(token_logprobs(outputs.logits[: len(taken)], taken, backend=backend).logprobs)
            if step < _DECODED:
                positions = torch.tensor([len(ids) - _DECODED - 1 + step for ids in sequences])
                outputs = decoder.decode(taken, positions, len(taken), ("logits",))
    finally:
        decoder.close()
    return torch.stack(found, 1)
