"""Demonstrations to a fine-tuned model."""

from __future__ import annotations

import dataclasses

from rlhf_engine.checkpoint import fingerprint
from rlhf_engine.checkpoint import resume as resume_trainer
from rlhf_engine.config import RunConfig
from rlhf_engine.data import EXAMPLES, Codec, Example, Stored, read_demonstrations, stored
from rlhf_engine.data.split import split
from rlhf_engine.files import read_json, remove
from rlhf_engine.model import LanguageModel
from rlhf_engine.recipes.loading import (
    REPORT,
    check_records,
    computing,
    encode_records,
    fingerprint_records,
    given,
    load_model,
    plot,
    save_model,
    stage_folders,
    stage_metrics,
    truncated,
)
from rlhf_engine.recipes.session import TrainingSession, check_start
from rlhf_engine.supervised.sft import FitReport, SFTTrainer


def run_sft(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> FitReport:
    """Train on demonstrations; write the model of the lowest validation loss to `output_dir/sft` and return the history.

    While it trains, and where it ends early, its state is in `output_dir/sft.checkpoint`, which is deleted as soon as
    `output_dir/sft` is complete. `resume` continues from it with the numbers of an unbroken run; it returns the history of a
    finished one.
    Raises ValueError over an earlier run without `resume` or `overwrite`, which replaces it.
    """
    folder, unfinished = stage_folders(config, "sft")
    check_start(folder, REPORT, unfinished, resume=resume, overwrite=overwrite)
    if resume and not unfinished.exists() and (folder / REPORT).is_file():
        return FitReport.from_json(read_json(folder / REPORT))
    check_records(config.data.demonstrations, "data.demonstrations", read_demonstrations)
    model, codec = load_model(config)
    data = {"model.path": fingerprint(model.named_parameters())}
    train, validation = split(
        demonstrations(config, codec),
        lambda example: example.prompt,
        config,
        f"data.demonstrations: {config.data.demonstrations}",
        "demonstrations",
    )
    data["data.demonstrations"] = fingerprint_records((train, validation), EXAMPLES)
    actor = LanguageModel(model, backend=config.backend, **computing(config))
    trainer = SFTTrainer(
        actor,
        train,
        validation,
        config.sft,
        pad_id=codec.pad_id,
        seed=config.seed,
        optimizer_state=config.memory.optimizer_state,
    )
    if resume:
        resume_trainer(unfinished, trainer, config, data)
    every = config.sft.checkpoint_every
    with (
        stage_metrics(config, "sft", trainer.done) as metrics,
        TrainingSession(
            trainer, unfinished, codec.tokenizer, config, data, metrics, every=every, overwrites=overwrite
        ) as session,
    ):
        trainer.log = session.write
        trainer.train(session.after, session.interruptible)
        session.hold_signals()
        report = trainer.finish()
        save_model(folder, model, codec, dataclasses.asdict(report) | truncated(codec))
    remove(unfinished)
    plot(config, "sft", "optimiser step")
    return report


def demonstrations(config: RunConfig, codec: Codec) -> Stored[Example]:
    """Return the token ids of the demonstrations, in a file next to `output_dir`."""
    path = given(config.data.demonstrations, "data.demonstrations")
    return stored(encode_records(path, read_demonstrations(path), codec.example), EXAMPLES, config.output_dir)
