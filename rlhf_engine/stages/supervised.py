"""The first two stages: demonstrations to a fine-tuned model, rankings to a reward model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlhf_engine.config import RunConfig
from rlhf_engine.data import read_comparisons, read_demonstrations
from rlhf_engine.files import with_new_folder, write_json
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.plots import plot_calibration
from rlhf_engine.stages.loading import (
    computing,
    encode_records,
    load_model,
    plot,
    read_records,
    save_model,
    split,
    stage_metrics,
    truncated,
)
from rlhf_engine.train.reward_model import (
    RankingEvaluation,
    centre_on_demonstrations,
    encode_comparison,
    fit_reward_model,
)
from rlhf_engine.train.sft import FitReport, fit_language_model


def run_sft(config: RunConfig) -> FitReport:
    """Demonstrations to a fine-tuned model in `output_dir/sft`."""
    demonstrations = read_records(config.data.demonstrations, "data.demonstrations", read_demonstrations)
    model, codec = load_model(config)
    examples = encode_records(config.data.demonstrations, demonstrations, codec.example)
    train, validation = split(examples, lambda example: example.prompt, config)
    actor = ActorCritic(model, backend=config.backend, **computing(config))
    with stage_metrics(config, "sft") as metrics:
        report = fit_language_model(
            actor, train, validation, config.sft, pad_id=codec.pad_id, seed=config.seed, log=metrics.write
        )
    save_model(Path(config.output_dir) / "sft", model, codec, dataclasses.asdict(report) | truncated(codec))
    plot(config, "sft", "optimiser step")
    return report


def run_rm(config: RunConfig) -> tuple[RankingEvaluation, ...]:
    """Rankings to a reward model in `output_dir/rm`, its bias such that the demonstrations score 0 on average."""
    comparisons = read_records(config.data.comparisons, "data.comparisons", read_comparisons)
    demonstrations = read_records(config.data.demonstrations, "data.demonstrations", read_demonstrations)
    model, codec = load_model(config)
    examples = encode_records(config.data.demonstrations, demonstrations, codec.example)
    ranked = encode_records(
        config.data.comparisons, comparisons, lambda comparison: encode_comparison(comparison, codec)
    )
    kept = [prompt for prompt in ranked if prompt is not None]
    train, validation = split(kept, lambda one: one.completions[0].prompt, config)
    reward_model = RewardModel.from_causal_lm(model, config.seed).computing(**computing(config))
    with stage_metrics(config, "rm") as metrics:
        history = fit_reward_model(
            reward_model, train, validation, config.reward, pad_id=codec.pad_id, seed=config.seed, log=metrics.write
        )
    shift = centre_on_demonstrations(reward_model, examples, codec.pad_id)

    def write(folder: Path) -> None:
        reward_model.save(folder)
        codec.tokenizer.save_pretrained(folder)
        write_json(
            folder / "report.json",
            {"history": [dataclasses.asdict(found) for found in history], "bias_shift": shift} | truncated(codec),
        )

    with_new_folder(Path(config.output_dir) / "rm", write)
    plot(config, "rm", "optimiser step")
    plot_calibration(history[-1].bins, history[-1].accuracy, Path(config.output_dir) / "plots" / "rm_calibration.png")
    return history
