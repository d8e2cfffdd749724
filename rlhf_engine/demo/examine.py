"""The evaluation at the end of the demo: a judge compares SFT and PPO on held-out prompts.

Legend: M prompts, A responses per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf_engine.config import RunConfig
from rlhf_engine.data import Codec, PromptRecord, read_prompts
from rlhf_engine.data.records import text_of
from rlhf_engine.demo.config import DemoConfig
from rlhf_engine.demo.judge import WEIGHTS, Verdict, judge
from rlhf_engine.evaluate import WinRate, best_of_n, win_rate
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.ppo.build import make_generator
from rlhf_engine.recipes import computing, load_model, load_reward_model, reward_function
from rlhf_engine.recipes.loading import given
from rlhf_engine.rewards.functions import response_texts
from rlhf_engine.rollout import recompute

_SEEDS = {"sft": 101, "sft again": 102, "ppo": 103}
"""Offsets of the sampling seeds, so that no two policies share random numbers with each other or with a rollout."""


@dataclass(frozen=True)
class Answers:
    """Responses of one policy to the held-out prompts."""

    texts: list[list[str]]
    """M lists of A responses."""
    verdicts: list[list[Verdict]]
    """The judge's verdicts, M lists of A."""
    rewards: Tensor
    """[M, A] float32, scores of the reward model."""
    kl: float
    """Mean per-sequence KL to the SFT model, `mean of sum_t log(pi / pi_SFT)`, in nats."""
    length: float
    """Mean tokens per response, EOS included."""
    ended: float
    """Share of responses that end with EOS."""

    @property
    def scores(self) -> Tensor:
        """Return the judge's marks, [M, A] float64."""
        return torch.tensor([[verdict.score for verdict in row] for row in self.verdicts], dtype=torch.float64)

    def mean_marks(self) -> dict[str, float]:
        """Return the mean share of the marks by criterion."""
        flat = [verdict for row in self.verdicts for verdict in row]
        return {name: sum(verdict.marks[name] for verdict in flat) / len(flat) for name in WEIGHTS}


@dataclass(frozen=True)
class Examination:
    """Results of the demo on held-out prompts."""

    prompts: list[str]
    """M prompts."""
    sft: Answers
    """Responses of the SFT model."""
    ppo: Answers
    """Responses of the policy after PPO."""
    win_rates: dict[str, WinRate]
    """Policy -> win rate over SFT by the judge."""


def examine(config: RunConfig, demo: DemoConfig) -> Examination:
    """Sample responses of SFT (`config.model.path`) and PPO to the test prompts and compare them with the judge."""
    records = list(read_prompts(given(config.data.prompts, "data.prompts"), "test"))
    sft_model, codec = load_model(config)
    ppo_model, _ = load_model(replace(config, model=replace(config.model, path=str(Path(config.output_dir) / "ppo"))))
    reward_model = load_reward_model(config)
    sft = ActorCritic(sft_model, backend=config.backend, **computing(config, learns=False))
    ppo = ActorCritic(ppo_model, backend=config.backend, **computing(config, learns=False))

    def ask(name: str, policy: ActorCritic, count: int) -> Answers:
        generator_seed = config.seed * 1_000 + _SEEDS[name]
        return _answer(config, codec, policy, sft, reward_model, records, count, generator_seed)

    answers = {
        "sft": ask("sft", sft, demo.samples),
        "sft again": ask("sft again", sft, demo.opponents),
        "ppo": ask("ppo", ppo, demo.opponents),
    }
    # best-of-n is compared with a second sample, which it could not choose from.
    again = answers["sft again"].scores
    best = best_of_n(answers["sft"].scores, answers["sft"].rewards)
    rates = {
        "PPO": win_rate(answers["ppo"].scores, answers["sft"].scores),
        f"SFT, best of {demo.samples} by the reward model": win_rate(best, again),
        "SFT against itself, resampled": win_rate(again, answers["sft"].scores),
    }
    return Examination([text_of(record.prompt) for record in records], answers["sft"], answers["ppo"], rates)


def _answer(
    config: RunConfig,
    codec: Codec,
    policy: ActorCritic,
    reference: ActorCritic,
    reward_model: RewardModel,
    records: list[PromptRecord],
    count: int,
    seed: int,
) -> Answers:
    ids = [torch.tensor(codec.encode_prompt(record.prompt)) for record in records for _ in range(count)]
    rollout = make_generator(policy, codec, config, seed).generate(ids, torch.arange(len(ids)))
    texts = response_texts(rollout, codec)
    verdicts = [judge(text_of(records[row // count].prompt), text) for row, text in enumerate(texts)]
    size = {"microbatch": config.rollout.batch_size, "temperature": config.rollout.temperature}
    ref_logprobs = recompute(reference, rollout, ("logprobs",), **size)["logprobs"]
    return Answers(
        texts=[texts[start : start + count] for start in range(0, len(texts), count)],
        verdicts=[verdicts[start : start + count] for start in range(0, len(verdicts), count)],
        rewards=reward_function(reward_model, codec)(rollout).view(len(records), count),
        kl=float((rollout.logprobs - ref_logprobs).sum(1).mean()),
        length=float(rollout.response_lengths.float().mean()),
        ended=float(rollout.ended.float().mean()),
    )
