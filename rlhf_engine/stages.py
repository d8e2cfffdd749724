"""The three stages of InstructGPT as functions from a config and files to a folder that the next stage can start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_engine.checkpoint import resume as resume_trainer
from rlhf_engine.checkpoint import save_checkpoint
from rlhf_engine.config import RunConfig
from rlhf_engine.data import (
    Codec,
    Comparison,
    Demonstration,
    Example,
    PromptRecord,
    read_comparisons,
    read_demonstrations,
    read_prompts,
)
from rlhf_engine.files import with_new_folder, write_json
from rlhf_engine.metrics import MetricsWriter, progress, read_metrics
from rlhf_engine.model import ActorCritic, ValueHead, frozen_copy
from rlhf_engine.model.pretrained import load_pretrained, load_tokenizer, max_positions
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.plots import PANELS, plot_calibration, plot_stage
from rlhf_engine.rollout import Generator, Rollout
from rlhf_engine.train.ppo import PPOTrainer, RewardFunction
from rlhf_engine.train.reward_model import (
    RankingEvaluation,
    centre_on_demonstrations,
    encode_comparison,
    fit_reward_model,
    score_examples,
)
from rlhf_engine.train.sft import FitReport, fit_language_model

Item = TypeVar("Item", Demonstration, Comparison, PromptRecord)
Made = TypeVar("Made")


def run_sft(config: RunConfig) -> FitReport:
    """Demonstrations to a fine-tuned model in `output_dir/sft`."""
    demonstrations = _read(config.data.demonstrations, "data.demonstrations", read_demonstrations)
    model, codec = load_model(config)
    examples = _encode(config.data.demonstrations, demonstrations, codec.example)
    train, validation = _split(examples, config)
    actor = ActorCritic(model, backend=config.backend)
    with stage_metrics(config, "sft") as metrics:
        report = fit_language_model(
            actor, train, validation, config.sft, pad_id=codec.pad_id, seed=config.seed, log=metrics.write
        )
    save_model(Path(config.output_dir) / "sft", model, codec, dataclasses.asdict(report) | _truncated(codec))
    _plot(config, "sft", "optimiser step")
    return report


def run_rm(config: RunConfig) -> tuple[RankingEvaluation, ...]:
    """Rankings to a reward model in `output_dir/rm`, its bias such that the demonstrations score 0 on average."""
    comparisons = _read(config.data.comparisons, "data.comparisons", read_comparisons)
    demonstrations = _read(config.data.demonstrations, "data.demonstrations", read_demonstrations)
    model, codec = load_model(config)
    examples = _encode(config.data.demonstrations, demonstrations, codec.example)
    ranked = _encode(config.data.comparisons, comparisons, lambda comparison: encode_comparison(comparison, codec))
    train, validation = _split([prompt for prompt in ranked if prompt is not None], config)
    reward_model = RewardModel.from_causal_lm(model, config.seed)
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
            {"history": [dataclasses.asdict(found) for found in history], "bias_shift": shift} | _truncated(codec),
        )

    with_new_folder(Path(config.output_dir) / "rm", write)
    _plot(config, "rm", "optimiser step")
    plot_calibration(history[-1].bins, history[-1].accuracy, Path(config.output_dir) / "plots" / "rm_calibration.png")
    return history


def run_ppo(config: RunConfig, *, resume: bool = False) -> list[dict[str, float]]:
    """Prompts and a reward model to a policy in `output_dir/ppo`; returns the numbers of every update of this call.

    With `resume` it goes on from the checkpoint in that folder, drawing the numbers that an unbroken run would draw.
    """
    records = _read(config.data.prompts, "data.prompts", lambda path: read_prompts(path, "train"))
    reward_model = load_reward_model(config)
    model, codec = load_model(config)
    _check_fit(config, model, codec, reward_model)
    prompts = _encode(config.data.prompts, records, lambda record: torch.tensor(codec.encode_prompt(record.prompt)))
    value_head = ValueHead.from_weights(reward_model.head.weight.detach(), reward_model.head.bias.detach())
    policy = ActorCritic(model, value_head, backend=config.backend)
    trainer = PPOTrainer(
        policy,
        frozen_copy(policy),
        make_generator(policy, codec, config, config.seed),
        _prompt_stream(prompts, config.seed),
        reward_function(reward_model, codec),
        config.ppo,
        seed=config.seed,
    )
    folder = Path(config.output_dir) / "ppo"
    if resume:
        resume_trainer(folder, trainer, config)
    history: list[dict[str, float]] = []
    done, updates = trainer.updates_done, config.ppo.updates
    with stage_metrics(config, "ppo", done) as metrics, progress(updates, "ppo", unit="update", done=done) as bar:

        def on_update(number: int, log: dict[str, float]) -> None:
            log |= _truncated(codec)
            metrics.write(number, log)
            history.append(log)
            bar.update()
            bar.set_postfix(score=f"{log['score_mean']:.2f}", kl=f"{log['kl']:.2f}")
            if number == updates or (config.ppo.checkpoint_every and number % config.ppo.checkpoint_every == 0):
                save_checkpoint(folder, trainer, codec.tokenizer, config)

        trainer.train(on_update)
    _plot(config, "ppo", "update")
    return history


def load_model(config: RunConfig) -> tuple[PreTrainedModel, Codec]:
    """The causal LM and the tokenizer of `config.model.path`.

    Raises ValueError for no path, a file or a weight that is missing or broken, or a tokenizer with more tokens than the
    model has embeddings.
    """
    folder = Path(_given(config.model.path, "model.path"))
    placement = _placement(config)
    try:
        model = load_pretrained(AutoModelForCausalLM, folder, **placement)
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None
    _check_vocabulary(model, tokenizer, folder)
    data = config.data
    limits = (config.rollout.max_prompt_tokens, data.max_response_tokens, max_positions(model))
    codec = Codec(tokenizer, data.prompt_template, *limits, data.long_prompts)
    return model, codec


def load_reward_model(config: RunConfig) -> RewardModel:
    """The reward model of `config.reward.path`; ValueError if there is none, or a file of it is missing or broken."""
    folder = _given(config.reward.path, "reward.path")
    placement = _placement(config)
    try:
        return RewardModel.load(folder, **placement)
    except ValueError as error:
        raise ValueError(f"reward.path: {error}") from None


def save_model(folder: Path, model: PreTrainedModel, codec: Codec, report: dict[str, Any]) -> None:
    """Writes what `AutoModelForCausalLM` and `AutoTokenizer` read, and report.json beside it; whole or not at all."""

    def write(new: Path) -> None:
        model.save_pretrained(new)
        codec.tokenizer.save_pretrained(new)
        write_json(new / "report.json", report)

    with_new_folder(folder, write)


def make_generator(policy: ActorCritic, codec: Codec, config: RunConfig, seed: int) -> Generator:
    """A sampler with the config's rollout settings."""
    return Generator(policy, config.rollout, eos_token_ids=codec.eos_id, pad_token_id=codec.pad_id, seed=seed)


def reward_function(model: RewardModel, codec: Codec) -> RewardFunction:
    """Scores whole answers as a labeler sees them: one that ran out of budget is read as ending where it breaks off."""

    def scores(rollout: Rollout) -> Tensor:
        return score_examples(model, rollout_examples(rollout, codec), codec.pad_id)

    return scores


def rollout_examples(rollout: Rollout, codec: Codec) -> list[Example]:
    """Prompt and response of every sequence of a rollout, each response with EOS at its end."""
    prompt_lengths, lengths = rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist()
    prompts, responses = rollout.prompt_ids.tolist(), rollout.response_ids.tolist()
    examples = []
    for row, ended in enumerate(rollout.ended.tolist()):
        prompt = prompts[row][len(prompts[row]) - prompt_lengths[row] :]
        response = responses[row][: lengths[row]] + ([] if ended else [codec.eos_id])
        examples.append(Example(tuple(prompt), tuple(response)))
    return examples


def stage_metrics(config: RunConfig, stage: str, done: int = 0) -> MetricsWriter:
    """The writer of one stage's numbers in `output_dir`; those after step `done` of an earlier run are replaced."""
    return MetricsWriter(config.output_dir, stage, resume_after=done)


def _plot(config: RunConfig, stage: str, x_label: str) -> None:
    """The curves of a stage, those of the run that it resumed among them, as `output_dir/plots/<stage>.png`."""
    rows = [row for row in read_metrics(config.output_dir) if row["stage"] == stage]
    plot_stage(rows, PANELS[stage], Path(config.output_dir) / "plots" / f"{stage}.png", x_label=x_label)


def _placement(config: RunConfig) -> dict[str, Any]:
    """Arguments of loading that say where and how a model lives."""
    try:
        # A device that cannot hold and give back a number fails here, not in the middle of a stage.
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {config.device!r}, which torch cannot use here: {reason}") from None
    return {"attention": config.model.attention, "dtype": getattr(torch, config.dtype), "device": config.device}


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Every token has an embedding; spare embeddings, which fill a matrix up to a round size, are no mistake."""
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"{folder}: got token id {largest} in its tokenizer, expected ids below {rows}, its embeddings"
        )


def _check_fit(config: RunConfig, model: PreTrainedModel, codec: Codec, reward_model: RewardModel) -> None:
    """The reward model reads the policy's token ids, and both have room for the longest response."""
    theirs, ours = load_tokenizer(config.reward.path), codec.tokenizer
    folders = f"{config.reward.path} (reward.path) and {config.model.path} (model.path)"
    if theirs.get_vocab() != ours.get_vocab() or theirs.eos_token_id != ours.eos_token_id:
        raise ValueError(
            f"the tokenizers of {folders} differ; expected a reward model that reads the policy's token ids"
        )
    rows = [found.get_input_embeddings().weight.shape[0] for found in (reward_model.trunk, model)]
    if rows[0] < rows[1]:
        raise ValueError(f"{folders}: got {rows[0]} and {rows[1]} embeddings, expected no fewer in the reward model")
    # A response that runs out of budget is scored with an EOS behind it.
    rollout, rooms = config.rollout, [(max_positions(model), 0), (max_positions(reward_model.trunk), 1)]
    room = min((positions - spare for positions, spare in rooms if positions is not None), default=None)
    if room is not None and rollout.max_prompt_tokens + rollout.max_response_tokens > room:
        raise ValueError(
            f"rollout: got max_prompt_tokens {rollout.max_prompt_tokens} and max_response_tokens "
            f"{rollout.max_response_tokens}, expected at most {room} together, the models' positions"
        )


def _truncated(codec: Codec) -> dict[str, int]:
    """How many prompts lost their beginning, for reports and metrics."""
    return {"truncated_prompts": codec.truncated.count}


def _given(value: str | None, key: str) -> str:
    if value is None:
        raise ValueError(f"{key}: got nothing, expected a path")
    return value


def _read(path: str | None, key: str, reader: Callable[[str], Iterator[Item]]) -> list[Item]:
    records = list(reader(_given(path, key)))
    if not records:
        raise ValueError(f"{key}: got no records to train on in {path}, expected at least one")
    return records


def _encode(path: str | None, records: Sequence[Item], encode: Callable[[Item], Made]) -> list[Made]:
    encoded = []
    for record in records:
        try:
            encoded.append(encode(record))
        except ValueError as error:
            raise ValueError(f"{path}:{record.line}: {error}") from None
    return encoded


def _split(items: Sequence[Made], config: RunConfig) -> tuple[list[Made], list[Made]]:
    """Training and validation parts, drawn by the seed; both have at least one item if there are two."""
    order = list(range(len(items)))
    Random(config.seed).shuffle(order)
    if len(items) < 2:
        raise ValueError(
            f"data: got {len(items)} usable records, expected at least 2, to train on one and validate on one"
        )
    held_out = min(len(items) - 1, max(1, round(config.data.validation_share * len(items))))
    return [items[i] for i in order[held_out:]], [items[i] for i in order[:held_out]]


def _prompt_stream(prompts: list[Tensor], seed: int) -> Callable[[int, int], list[Tensor]]:
    """Prompts in a new random order each time all of them have been used; any part of the stream can be asked for."""

    @cache
    def order(passes: int) -> list[int]:
        stream = torch.Generator().manual_seed((seed * 1_000_003 + passes) % 2**63)
        return torch.randperm(len(prompts), generator=stream).tolist()

    def take(first: int, count: int) -> list[Tensor]:
        places = (divmod(number, len(prompts)) for number in range(first, first + count))
        return [prompts[order(passes)[place]] for passes, place in places]

    return take
