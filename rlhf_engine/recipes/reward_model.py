"""The reward-model stage: from rankings to a reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf_engine.checkpoint import fingerprint
from rlhf_engine.config import RunConfig
from rlhf_engine.data import EXAMPLES, Codec, Demonstration, Example, read_comparisons, read_demonstrations, stored
from rlhf_engine.data.split import split
from rlhf_engine.distributed.placement import check_whole
from rlhf_engine.distributed.ranks import current
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.plots import plot_calibration
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
from rlhf_engine.supervised.reward_model import (
    RANKED_PROMPTS,
    RankedPrompt,
    RankingEvaluation,
    RewardTrainer,
    centre_on_demonstrations,
    encode_comparison,
)


@exclusive
def run_rm(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> tuple[RankingEvaluation, ...]:
    """Train a reward model on rankings and write it to `output_dir/rm`; return its evaluations on held-out rankings.

    The written bias gives the demonstrations a mean score of 0. During training, and after a run that ended early, the state
    is in `output_dir/rm.checkpoint`, which is deleted when `output_dir/rm` is complete. `resume` continues from it and gives
    the numbers of an uninterrupted run; for a finished run, it returns the saved evaluations. `overwrite` replaces an earlier
    run.

    Raises:
        ValueError: an earlier run exists, and neither `resume` nor `overwrite` is set; or a setting or a file is wrong.
    """
    folder, unfinished = stage_folders(config, "rm")
    check_start(folder, REPORT, unfinished, resume=resume, overwrite=overwrite)
    config.check_training()
    ranks = current()
    check_whole(config, config.reward.batch_size, "reward.batch_size", ranks.size)
    config = dated(config)
    if resume and (report := finished_report(config, "rm")) is not None:
        return tuple(RankingEvaluation.from_json(found) for found in report["history"])
    check_trained_records(config, "comparisons", read_comparisons)
    check_trained_records(config, "demonstrations", read_demonstrations)
    model, codec = load_start(config)
    data = {"model.path": fingerprint(model.named_parameters())}
    examples = _demonstrations(config, codec)
    train, validation = _rankings(config, codec)
    data["data.comparisons"] = fingerprint_records((train, validation), RANKED_PROMPTS)
    data["data.demonstrations"] = fingerprint_records((examples,), EXAMPLES)
    reward_model = RewardModel.from_causal_lm(model, config.seed).computing(**computing(config))
    trainer = RewardTrainer(
        reward_model,
        train,
        validation,
        config.reward,
        pad_id=codec.pad_id,
        seed=config.seed,
        optimizer_state=config.memory.optimizer_state,
        ranks=ranks,
    )
    ranks.check_equal(data)
    check_disk(trainer, config, unfinished, folder)
    if ranks.first:
        try_output(trainer, codec.tokenizer, config)

    def write_result() -> None:
        if not ranks.first:
            return
        plot(config, "rm", "optimizer step")  # first, because a result is the end of a run
        last = trainer.history[-1]
        plot_calibration(last.bins, last.accuracy, Path(config.output_dir) / "plots" / "rm_calibration.png")
        _write_centred(folder, trainer, codec, examples, config)

    run_session(
        trainer,
        folder,
        unfinished,
        codec.tokenizer,
        config,
        data,
        write_result,
        every=config.reward.checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        ranks=ranks,
    )
    return tuple(trainer.history)


def _demonstrations(config: RunConfig, codec: Codec) -> Sequence[Example]:
    """Return the demonstrations as the reward model reads them."""
    path = given(config.data.demonstrations, "data.demonstrations")

    def encode(record: Demonstration) -> Example:
        return codec.join(codec.encode_prompt(record.prompt), record.response)

    return stored(encode_records(path, read_demonstrations(path), encode), EXAMPLES, config.output_dir)


def _rankings(config: RunConfig, codec: Codec) -> tuple[Sequence[RankedPrompt], Sequence[RankedPrompt]]:
    """Return the rankings that are not all ties, as token ids, for training and for validation."""
    path = given(config.data.comparisons, "data.comparisons")
    ranked = encode_records(path, read_comparisons(path), lambda comparison: encode_comparison(comparison, codec))
    kept = stored((prompt for prompt in ranked if prompt is not None), RANKED_PROMPTS, config.output_dir)
    return split(
        kept,
        lambda one: one.completions[0].prompt,
        config,
        f"data.comparisons: {path}",
        "rankings that are not all ties",
    )


def _write_centred(
    folder: Path, trainer: RewardTrainer, codec: Codec, examples: Sequence[Example], config: RunConfig
) -> None:
    """Write the model with the bias that gives the demonstrations a mean score of 0; restore the trainer's bias afterwards.

    If the write fails, the session saves the uncentred model, and a resumed run centres it again.
    """
    bias = trainer.model.head.bias
    before = bias.detach().clone()
    try:
        shift = centre_on_demonstrations(trainer.model, examples, codec.pad_id)
        report = {"history": [dataclasses.asdict(found) for found in trainer.history], "bias_shift": shift}
        report |= truncated(codec)
        save_result(folder, lambda new: trainer.write_model(new, codec.tokenizer, complete=True), report, config)
    finally:
        with torch.no_grad():
            bias.copy_(before)
