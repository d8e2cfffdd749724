"""Sampling: our generator, transformers' `generate` and its continuous batching, in alternation in one process.

Setup: two Llamas of 7.3M and 48M parameters (random weights), 64 prompts of 32 tokens, float32, temperature 1, no filter.
"Equal lengths": 64 response tokens each; the end token is outside the vocabulary. "Geometric lengths": a sixteenth of the
vocabulary are end tokens, so with random weights a response continues with a probability of about 15/16 per token and has 16
tokens on average, a quarter of its budget. Figures are seconds per sampled token, in wall-clock time and in processor time;
processor time is useful when other programs run on the machine. Ours also computes log-probs and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.bench_ppo_step import MODEL
from benchmarks.harness import Check, Row, report
from rlhf_engine.config import RolloutConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.rollout import Generator

NAME = "rollout"
SMALL = MODEL
LARGE = MODEL | {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 64, 32, 64
OURS, GENERATE, GREEDY, BATCHED = (
    "ours",
    "transformers generate",
    "transformers generate, greedy",
    "transformers generate_batch",
)


def cases(model: dict, *, geometric: bool, tokens: int = RESPONSE_TOKENS) -> dict[str, Callable[[], int]]:
    """Return calls that sample responses to the same prompts; each call returns the number of sampled tokens."""
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(LlamaConfig(**model)).eval()
    vocabulary = model["vocab_size"]
    prompts = torch.randint(vocabulary // 16, vocabulary, (PROMPTS, PROMPT_TOKENS))
    ends = list(range(vocabulary // 16)) if geometric else [vocabulary]
    rollout = RolloutConfig(
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=tokens,
        batch_size=PROMPTS,
        prefill_tokens=1024,  # so that activations stay in the processor's cache
    )
    generator = Generator(ActorCritic(language_model), rollout, eos_token_ids=ends, pad_token_id=0, seed=0)
    calls = iter(range(10**9))
    options = {"max_new_tokens": tokens, "eos_token_id": ends, "pad_token_id": vocabulary - 1}

    sampled = GenerationConfig(**options, do_sample=True, top_k=0)

    def ours() -> int:
        numbers = torch.arange(PROMPTS) + next(calls) * PROMPTS
        return int(generator.generate(list(prompts), numbers).mask.sum())

    @torch.no_grad()
    def generate(*, greedy: bool = False) -> int:
        config = GenerationConfig(**options, do_sample=False) if greedy else sampled
        said = language_model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)[
            :, PROMPT_TOKENS:
        ]
        ended = torch.isin(said, torch.tensor(ends))
        # Count the end token, but not the padding after it.
        return int((ended.cumsum(1) - ended.long() == 0).sum())

    def batched() -> int:
        pages = ContinuousBatchingConfig(
            page_size=32, num_blocks=PROMPTS * 4, max_batch_tokens=PROMPTS * PROMPT_TOKENS, use_cuda_graph=False
        )
        said = language_model.generate_batch(
            prompts.tolist(), generation_config=sampled, continuous_batching_config=pages, warmup=False
        )
        if len(said) != PROMPTS:
            raise RuntimeError(f"generate_batch returned responses to {len(said)} of {PROMPTS} prompts")
        return sum(len(one.generated_tokens) for one in said.values())

    found = {OURS: ours, GENERATE: generate, BATCHED: batched}
    return found if geometric else found | {GREEDY: lambda: generate(greedy=True)}


def alternate(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, tuple[list[int], dict[str, list[float]]]]:
    """Run the cases in alternation; return, per case, the tokens of each round and its seconds on both clocks."""
    found = {name: ([], {"wall": [], "processor": []}) for name in runs}
    for number in range(rounds + 1):  # the first one warms up
        for name, run in runs.items():
            start, busy = time.perf_counter(), time.process_time()
            tokens = run()
            spent = time.perf_counter() - start, time.process_time() - busy
            if number:
                found[name][0].append(tokens)
                for clock, seconds in zip(found[name][1].values(), spent, strict=True):
                    clock.append(seconds)
    return found


def measure(
    name: str, model: dict, bound: float, *, geometric: bool, rounds: int, tokens: int = RESPONSE_TOKENS
) -> None:
    """Report both clocks, and check our tokens per second against those of `generate` and of continuous batching.

    The checks divide the tokens of all rounds by their seconds, because with geometric lengths the number of tokens varies
    by a sixth between rounds.
    """
    lengths = f"geometric lengths of at most {tokens}" if geometric else f"{tokens} tokens each"
    found = alternate(cases(model, geometric=geometric, tokens=tokens), rounds)
    for clock in ("wall", "processor"):
        speed = {case: sum(counts) / sum(clocks[clock]) for case, (counts, clocks) in found.items()}
        rows = [
            Row(case, [seconds / count for count, seconds in zip(counts, clocks[clock], strict=True)])
            for case, (counts, clocks) in found.items()
        ]
        checks = [
            Check(f"tokens/s, ours / {other}", speed[OURS] / speed[other], least, at_least=True)
            for other, least in ((GENERATE, bound), (BATCHED, 1.0))
        ]
        report(NAME, f"{name}, {PROMPTS} prompts, {lengths}: {clock} seconds a token", rows, checks=checks)


def main(*, quick: bool = False) -> None:
    """Measure equal and geometric lengths with the small model, and equal lengths with the large one."""
    if quick:
        measure("7.3M", SMALL, 1.3, geometric=False, rounds=1, tokens=16)
        return
    measure("7.3M", SMALL, 1.3, geometric=False, rounds=3)
    measure("7.3M", SMALL, 2.5, geometric=True, rounds=12)
    measure("48M", LARGE, 1.2, geometric=False, rounds=2)


def test_rollout(benchmark) -> None:
    benchmark(cases(MODEL | {"vocab_size": 512, "hidden_size": 64}, geometric=True, tokens=8)[OURS])
