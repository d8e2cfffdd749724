"""Training steps of OpenRLHF, verl and TRL's GRPOTrainer, unmodified and with only their head and loss replaced by ours.

Setup: a Llama of 20M parameters (random weights, a vocabulary of 32,768), sequences of 32 + 128 tokens, float32, AdamW. The
two variants of a trainer run in alternation, each in a separate process. Memory is peak RSS above the RSS after the imports.
The first step of each variant is a warm-up. Requires the environment of `make test-peers`.
"""

from __future__ import annotations

from benchmarks.harness import Check, Worker, alternate_workers, ratio, report

NAME = "integrations"
MODEL = {
    "vocab_size": 32_768,
    "hidden_size": 256,
    "intermediate_size": 672,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
BATCH = {"sequences": 8, "prompt_tokens": 32, "response_tokens": 128}
LOOPS = {"OpenRLHF": "openrlhf", "verl": "verl", "TRL GRPOTrainer": "trl_grpo"}


def compare(peer: str, loop: str, batch: dict, rounds: int, *, results: str, **options: object) -> None:
    """Measure one trainer unmodified and with our head and loss, and report it in the file `results`."""
    target = f"benchmarks.peers.integration_loops:{loop}"
    sides = {f"{peer} with our head and loss": True, peer: False}
    workers = [
        Worker(name, target, {"batch": batch, "fused": fused, **options}, start_limit=300, step_limit=300)
        for name, fused in sides.items()
    ]
    ours, theirs = alternate_workers(workers, rounds=rounds, slow=60)
    memory = None if ours.error or theirs.error else ours.extra_mb / theirs.extra_mb
    checks = [Check("seconds, ours / theirs", ratio(ours, theirs), 1.0), Check("extra MB, ours / theirs", memory, 0.75)]
    title = f"{peer}, a step of {{sequences}} x ({{prompt_tokens}}+{{response_tokens}}) tokens"
    report(results, title.format(**batch), [ours, theirs], checks=checks)


def main(*, quick: bool = False) -> None:
    batch = BATCH | ({"sequences": 4, "response_tokens": 32} if quick else {})
    for peer in LOOPS:
        compare(peer, LOOPS[peer], batch, rounds=1 if quick else 5, results=NAME, model=MODEL)


def test_integrations(benchmark) -> None:
    """Time only the loss with its gradient, which needs no peer."""
    import torch

    from rlhf_kernels.integrations.openrlhf import PolicyLoss

    x = torch.randn(8, 128)
    benchmark(lambda: PolicyLoss()(x.clone().requires_grad_(), x, x)[0].backward())
