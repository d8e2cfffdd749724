"""The supervised fine-tuning stage: from demonstrations to a fine-tuned model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import chain

from transformers import PreTrainedModel

from rlhf_engine.checkpoint import fingerprint
from rlhf_engine.config import RunConfig
from rlhf_engine.data import EXAMPLES, Codec, Demonstration, Example, Stored, read_demonstrations, stored
from rlhf_engine.data.split import split
from rlhf_engine.distributed.placement import check_whole
from rlhf_engine.distributed.ranks import Ranks, current
from rlhf_engine.model import LanguageModel
from rlhf_engine.notices import notice
from rlhf_engine.recipes.loading import (
    REPORT,
    check_trained_records,
    computing,
    dated,
    encode_records,
    fingerprint_records,
    finished_report,
    given,
    load_start,
    plot,
    save_result,
    stage_folders,
    truncated,
)
from rlhf_engine.recipes.session import run_session
from rlhf_engine.recipes.starting import check_start, exclusive
from rlhf_engine.recipes.trial import check_disk, try_output
from rlhf_engine.supervised.sft import FitReport, SFTTrainer


@exclusive
def run_sft(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> FitReport:
    """Train on demonstrations; write the model with the lowest validation loss to `output_dir/sft` and return the history.

    During training, and after a run that ended early, the state is in `output_dir/sft.checkpoint`, which is deleted when
    `output_dir/sft` is complete. `resume` continues from it and gives the numbers of an uninterrupted run; for a finished run
    with the same settings, it returns the saved history. `overwrite` replaces an earlier run.

    Raises:
        ValueError: an earlier run exists, and neither `resume` nor `overwrite` is set; or a setting or a file is wrong.
    """
    folder, unfinished = stage_folders(config, "sft")
    check_start(folder, REPORT, unfinished, resume=resume, overwrite=overwrite)
    config.check_training()
    ranks = current()
    check_whole(config, config.sft.batch_size, "sft.batch_size", ranks.size)
    config = dated(config)
    if resume and (report := finished_report(config, "sft")) is not None:
        return FitReport.from_json(report)
    check_trained_records(config, "demonstrations", read_demonstrations)
    model, codec = load_start(config)
    data = {"model.path": fingerprint(model.named_parameters())}
    train, validation = split(
        demonstrations(config, codec),
        lambda example: example.origin or example.prompt,
        config,
        f"data.demonstrations: {config.data.demonstrations}",
        "demonstrations",
    )
    data["data.demonstrations"] = fingerprint_records((train, validation), EXAMPLES)
    ranks.check_equal(data)
    trainer = _trainer(config, model, codec, train, validation, ranks)
    check_disk(trainer, config, unfinished, folder)
    if ranks.first:
        try_output(trainer, codec.tokenizer, config)

    def write_result() -> FitReport:
        if not ranks.first:
            return trainer.finish()
        plot(config, "sft", "optimizer step")  # first, because a result is the end of a run
        report = trainer.finish()
        saved = dataclasses.asdict(report) | truncated(codec)
        save_result(folder, lambda new: trainer.write_model(new, codec.tokenizer, complete=True), saved, config)
        return report

    report = run_session(
        trainer,
        folder,
        unfinished,
        codec.tokenizer,
        config,
        data,
        write_result,
        every=config.sft.checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        ranks=ranks,
    )
    warn_of_no_learning(report, len(codec.tokenizer))
    return report


def _trainer(
    config: RunConfig,
    model: PreTrainedModel,
    codec: Codec,
    train: Sequence[Example],
    validation: Sequence[Example],
    ranks: Ranks,
) -> SFTTrainer:
    actor = LanguageModel(model, backend=config.backend, **computing(config))
    if not config.model.router_aux_loss:
        actor.balance = None
    return SFTTrainer(
        actor,
        train,
        validation,
        config.sft,
        pad_id=codec.pad_id,
        seed=config.seed,
        optimizer_state=config.memory.optimizer_state,
        ranks=ranks,
    )


def warn_of_no_learning(report: FitReport, vocabulary: int) -> None:
    """Log a notice if the best loss is not below that of a uniform distribution over the vocabulary, `log V` nats."""
    best, uniform = report.best.validation_loss, math.log(vocabulary)
    if best >= uniform:
        notice(
            f"sft: the validation loss {best:.2f} is not below {uniform:.2f} nats, that of a model that gives every token the "
            "same probability; raise sft.optim.lr (small models need 1e-4 to 1e-3) or sft.epochs"
        )


def demonstrations(config: RunConfig, codec: Codec) -> Stored[Example]:
    """Return the token ids of the demonstrations, in a temporary file on the disk of `output_dir`.

    With `sft.turns` "all", a conversation may have several rows (`Codec.examples`).
    """
    path = given(config.data.demonstrations, "data.demonstrations")

    def encode(record: Demonstration) -> list[Example]:
        return codec.examples(record) if config.sft.turns == "all" else [codec.example(record)]

    rows = chain.from_iterable(encode_records(path, read_demonstrations(path), encode))
    return stored(rows, EXAMPLES, config.output_dir)
