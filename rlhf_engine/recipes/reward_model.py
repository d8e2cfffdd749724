"""Rankings to a reward model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlhf_engine.config import RunConfig
from rlhf_engine.data import read_comparisons, read_demonstrations, stored
from rlhf_engine.data.split import split
from rlhf_engine.files import with_new_folder, write_json
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.plots import plot_calibration
from rlhf_engine.recipes.loading import (
    check_records,
    computing,
    encode_records,
    load_model,
    plot,
    stage_metrics,
    truncated,
)
from rlhf_engine.recipes.sft import demonstrations
from rlhf_engine.supervised.reward_model import (
    RANKED_PROMPTS,
    RankingEvaluation,
    centre_on_demonstrations,
    encode_comparison,
    fit_reward_model,
)


def run_rm(config: RunConfig) -> tuple[RankingEvaluation, ...]:
    """Rankings to a reward model in `output_dir/rm`, its bias such that the demonstrations score 0 on average."""
    path = config.data.comparisons
    check_records(path, "data.comparisons", read_comparisons)
    check_records(config.data.demonstrations, "data.demonstrations", read_demonstrations)
    model, codec = load_model(config)
    examples = demonstrations(config, codec)
    ranked = encode_records(path, read_comparisons(path), lambda comparison: encode_comparison(comparison, codec))
    kept = stored((prompt for prompt in ranked if prompt is not None), RANKED_PROMPTS, config.output_dir)
    train, validation = split(
        kept,
        lambda one: one.completions[0].prompt,
        config,
        f"data.comparisons: {path}",
        "rankings that are not all ties",
    )
    reward_model = RewardModel.from_causal_lm(model, config.seed).computing(**computing(config))
    with stage_metrics(config, "rm") as metrics:
        history = fit_reward_model(
            reward_model,
            train,
            validation,
            config.reward,
            pad_id=codec.pad_id,
            seed=config.seed,
            optimizer_state=config.memory.optimizer_state,
            log=metrics.write,
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
