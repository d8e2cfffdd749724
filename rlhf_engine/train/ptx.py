"""PPO-ptx: pretraining gradients in the optimiser step of PPO (Ouyang et al. 2022, equation 2).

    L = L_PPO - gamma E_{x ~ pretraining}[log pi(x)]

The second term has a backward of its own straight after its forward, so that the activations of the two never coexist. It is
not a loss of the rollout's distribution: its logits are never divided by the rollout's temperature.
Shapes: M sequences in all, B of a step, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_engine.model import ActorCritic
from rlhf_engine.train.streams import shuffled_stream


class PretrainStream:
    """Sequences of plain text in a random order, a new one each time all have been used; `position` counts those taken."""

    def __init__(self, sequences: Tensor, seed: int) -> None:  # (M, L), int64
        self.sequences, self.position = sequences, 0
        self._take = shuffled_stream(len(sequences), seed)

    def take(self, count: int) -> Tensor:  # (B, L)
        """The next `count` sequences."""
        rows = self._take(self.position, count)
        self.position += count
        return self.sequences[rows]


def ptx_backward(policy: ActorCritic, sequences: Tensor, *, coef: float, microbatch: int) -> dict[str, Tensor]:
    """Add the gradient of `-coef` times the mean log-prob of the sequences' tokens; returns the loss in nats a token.

    The first token of a sequence has no state before it and does not count. The denominator is that of all `sequences`, so
    the gradient does not depend on the micro-batches.
    """
    num_tokens = sequences[:, 1:].numel()
    loss = torch.zeros((), device=policy.device)
    for part in sequences.to(policy.device).split(microbatch):
        nll = policy.language_model_loss(part, num_tokens=num_tokens)
        (coef * nll).backward()
        loss += nll.detach()
    return {"ptx_loss": loss}


def pack_text(path: str | Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:  # (M, L)
    """The documents of a text file, which blank lines part, one after the other and cut every `length` tokens.

    Each document ends with EOS; what is left at the file's end and fills no sequence is not used. Raises ValueError naming
    a file that is missing, is not UTF-8 or has fewer than `length` tokens.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    pieces = [torch.empty(0, dtype=torch.int64)]
    try:
        documents = _documents(path)
        while part := list(islice(documents, 1024)):
            encoded = tokenizer(part, add_special_tokens=False)["input_ids"]
            pieces.append(torch.tensor(list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in encoded))))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    tokens = torch.cat(pieces)
    if len(tokens) < length:
        raise ValueError(f"{path}: got {len(tokens)} tokens, expected at least {length}, one sequence of pretraining")
    return tokens[: len(tokens) // length * length].view(-1, length)


def _documents(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in chain(file, [""]):
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).strip()
                lines.clear()
