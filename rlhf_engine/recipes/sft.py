"""Demonstrations to a fine-tuned model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlhf_engine.config import RunConfig
from rlhf_engine.data import EXAMPLES, Codec, Example, Stored, read_demonstrations, stored
from rlhf_engine.data.split import split
from rlhf_engine.model import LanguageModel
from rlhf_engine.recipes.loading import (
    check_records,
    computing,
    encode_records,
    load_model,
    plot,
    save_model,
    stage_metrics,
    truncated,
)
from rlhf_engine.supervised.sft import FitReport, fit_language_model


def run_sft(config: RunConfig) -> FitReport:
    """Demonstrations to a fine-tuned model in `output_dir/sft`."""
    check_records(config.data.demonstrations, "data.demonstrations", read_demonstrations)
    model, codec = load_model(config)
    train, validation = split(
        demonstrations(config, codec),
        lambda example: example.prompt,
        config,
        f"data.demonstrations: {config.data.demonstrations}",
        "demonstrations",
    )
    actor = LanguageModel(model, backend=config.backend, **computing(config))
    with stage_metrics(config, "sft") as metrics:
        report = fit_language_model(
            actor,
            train,
            validation,
            config.sft,
            pad_id=codec.pad_id,
            seed=config.seed,
            optimizer_state=config.memory.optimizer_state,
            log=metrics.write,
        )
    save_model(Path(config.output_dir) / "sft", model, codec, dataclasses.asdict(report) | truncated(codec))
    plot(config, "sft", "optimiser step")
    return report


def demonstrations(config: RunConfig, codec: Codec) -> Stored[Example]:
    path = config.data.demonstrations
    return stored(encode_records(path, read_demonstrations(path), codec.example), EXAMPLES, config.output_dir)
