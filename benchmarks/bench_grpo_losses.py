"""TRL's GRPOTrainer with each of its loss types, unmodified and with our mixin; generation and optimizer are included.

The setup is that of `bench_integrations`: the two variants of a loss type run in alternation, each in a separate process, and
memory is peak RSS above the RSS after the imports. Requires the environment of `make test-peers`. With the current release:

    PYTHONPATH=.venv-peers/sources/trl-current .venv-peers/bin/python -m benchmarks grpo_losses
"""

from __future__ import annotations

from benchmarks.bench_integrations import BATCH, MODEL, compare

NAME = "grpo_losses"
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OTHER = {"luspo": {"importance_sampling_level": "sequence"}, "cispo": {"epsilon_high": 5.0}}
"""Options that TRL recommends with a loss type."""


def main(*, quick: bool = False) -> None:
    batch = BATCH | ({"sequences": 4, "response_tokens": 16} if quick else {})
    model = MODEL | ({"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96} if quick else {})
    for loss_type in LOSS_TYPES:
        compare(
            f"GRPOTrainer, {loss_type}",
            "trl_grpo",
            batch,
            rounds=1 if quick else 5,
            results=NAME,
            model=model,
            settings={"loss_type": loss_type, **OTHER.get(loss_type, {})},
        )


def test_loss_types(benchmark) -> None:
    """Time only the loss with its gradient, for the objectives of the loss types, which needs no peer."""
    import torch

    from rlhf_kernels import ppo_loss

    x, mask = torch.randn(8, 128), torch.ones(8, 128, dtype=torch.bool)

    def losses() -> None:
        for objective in ("clip", "cispo", "sapo"):
            ppo_loss(x.clone().requires_grad_(), x, x, mask, objective=objective)[0].backward()

    benchmark(losses)
