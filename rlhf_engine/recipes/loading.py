"""Functions that the stages share: loading of models and records, folders, metrics and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_engine.checkpoint import CONFIG, check_settings, fingerprint_rows
from rlhf_engine.config import RunConfig, save_config
from rlhf_engine.data import Codec, Comparison, Demonstration, PromptRecord, RecordCodec
from rlhf_engine.data.chat import READS_DATE, ChatTemplate
from rlhf_engine.data.loading import Reading
from rlhf_engine.distributed.ranks import current
from rlhf_engine.files import read_json, read_model_config, with_new_file, with_new_folder, write_json
from rlhf_engine.manifest import write_manifest
from rlhf_engine.metrics import MetricsWriter, read_metrics
from rlhf_engine.model.adapter_files import Base, trained_on
from rlhf_engine.model.adapters import Adapters, import_peft
from rlhf_engine.model.pretrained import base_folder, is_adapter, is_top, load_tokenizer, max_positions
from rlhf_engine.model.quantised import import_quant
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.roles import POLICY, REFERENCE, REWARD
from rlhf_engine.model.rope import limit_positions
from rlhf_engine.model.saving import load_causal_lm
from rlhf_engine.model.top_layers import check_layers, train_top
from rlhf_engine.model.trunk import adapters_of, input_layer
from rlhf_engine.notices import notice
from rlhf_engine.plots import PANELS, plot_stage
from rlhf_engine.trackers import import_trackers

REPORT = "report.json"
"""File in the folder of every finished model of `rlhf sft` and `rlhf rm`."""

_WANTED = {
    "model.path": "the folder of a causal LM",
    "reward.path": "the folder of a reward model (rlhf rm writes one), or set reward.function or url and ppo.value_init=zero",
    "data.demonstrations": "a file of demonstrations",
    "data.comparisons": "a file of comparisons",
    "data.prompts": "a file of prompts",
    "data.pretrain": "a file of pretraining text",
}
"""What to give for a setting that a stage needs."""

_TEMPLATE_DATE = "chat_template.json"
"""File in `output_dir` with the date that chat templates see."""

Item = TypeVar("Item", Demonstration, Comparison, PromptRecord)
Made = TypeVar("Made")


def load_model(config: RunConfig, *, strict: bool = True) -> tuple[PreTrainedModel, Codec]:
    """Return the causal LM of `model.path`, with its adapter if it is an adapter's folder, and a codec with its tokenizer.

    Raises:
        ValueError: `model.path` is not set, a file or a weight is missing or broken, or the tokenizer has more tokens than
            the model has embeddings; with `strict`, its chat template does not read an argument of the config.
    """
    return _with_codec(config, lambda folder: load_causal_lm(folder, **placement(config)), strict=strict)


def load_start(config: RunConfig, *, reference: bool = False) -> tuple[PreTrainedModel, Codec]:
    """Return the model that a stage trains, with the adapter of `config.adapter`, and its codec, as `load_model` does.

    An adapter in `model.path` goes on being trained, and with `reference` a second, frozen one keeps what it was at the start.
    Without `adapter.rank` it is merged into the weights, which are then trained.

    Raises:
        ValueError: as `load_model`; or an adapter in `model.path` has other settings than `config.adapter`.
    """
    return _with_codec(config, lambda folder: _start(config, folder, reference=reference), strict=True)


def check_packages(config: RunConfig) -> None:
    """Import the packages of trackers, adapters and quantised weights if the run has them, before anything is loaded.

    Raises:
        ValueError: a package is not installed, the weights are quantised and there is no adapter to train, or there is none to
            merge.
    """
    config.check_training()
    import_trackers(config.tracking)
    if config.adapter.rank or is_adapter(given(config.model.path, "model.path")):
        import_peft()
    elif config.rollout.merge_adapters == "always":
        raise ValueError(
            "rollout.merge_adapters: got 'always' with adapter.rank 0 and a model without adapters, expected 'auto' or 'never'"
        )
    import_quant(config.model.quant)


def check_start_model(config: RunConfig) -> None:
    """Check `model.path` against what is trained of it, before any weight is read.

    Raises:
        ValueError: it has fewer layers than `model.train_layers`, or weights that would be frozen are not in a complete model.
    """
    count, folder = config.model.train_layers, Path(given(config.model.path, "model.path"))
    if is_top(folder) and (count is not None or config.adapter.rank):
        raise ValueError(
            f"model.path: got {folder}, the checkpoint of an unfinished run with only its top layers, expected a complete "
            "model, which has the frozen weights; run rlhf merge on it first, or resume that run"
        )
    if count is None:
        return
    if is_adapter(folder) and not config.adapter.rank:
        raise ValueError(
            f"model.path: got the adapter {folder} with model.train_layers {count} and adapter.rank 0, expected a model: the "
            "frozen layers must be those of a folder; run rlhf merge first, or set adapter.rank to train the adapter"
        )
    base = base_folder(folder)
    if (base / "config.json").is_file():  # loading reports a missing one in more detail
        found = read_model_config(base, trust_remote_code=config.model.trust_remote_code).get_text_config()
        check_layers(count, found.num_hidden_layers, folder)


def _start(config: RunConfig, folder: Path, *, reference: bool) -> PreTrainedModel:
    settings, count = config.adapter, config.model.train_layers
    check_start_model(config)
    check_packages(config)
    model = load_causal_lm(folder, **placement(config))
    if count is not None:
        train_top(model, count, Base.of(base_folder(folder)))
    adapters = adapters_of(model)
    if adapters is None:
        if settings.rank:
            Adapters.start(model, settings, config.seed, Base.of(folder))
        return model
    if not settings.rank:
        adapters.merge(POLICY)
        return model
    adapters.go_on(settings, folder)
    if reference:
        adapters.add(REFERENCE, adapters.tensors(POLICY), trained=False)
    return model


def _with_codec(
    config: RunConfig, load: Callable[[Path], PreTrainedModel], *, strict: bool
) -> tuple[PreTrainedModel, Codec]:
    """Return the model that `load` reads from `model.path`, and a codec with the tokenizer of that folder."""
    folder = Path(given(config.model.path, "model.path"))
    try:
        model = load(folder)
        tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    except ValueError as error:
        # An error that names a setting.
        own = str(error).startswith(("device: ", "adapter.", "model.path: ", "model.train_layers: ", "model.quant"))
        raise ValueError(str(error) if own else f"model.path: {error}") from None
    _notice_quant(config, "model.path", folder)
    _check_vocabulary(model, tokenizer, folder)
    limit_positions(model, longest_sequence(config))
    data = config.data
    limits = (config.rollout.max_prompt_tokens, data.max_response_tokens, max_positions(model))
    more: dict[str, Any] = template_settings(config, tokenizer, strict=strict)
    more["keep_special_tokens"] = data.keep_special_tokens
    try:
        codec = Codec(tokenizer, data.prompt_template, *limits, data.long_prompts, config.rollout.stop, **more)
    except ValueError as error:
        where = f"model.path: {folder}: " if str(error).startswith("tokenizer") else ""
        raise ValueError(f"{where}{error}") from error
    return model, codec


def template_settings(config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, strict: bool) -> dict[str, Any]:
    """Return the arguments of a codec for the chat template: its variables and its date.

    Variables that the template does not read are an error with `strict`, and are left out otherwise.

    Raises:
        ValueError: the template does not read an argument of the config.
    """
    chat = ChatTemplate(tokenizer, config.data.chat_template_kwargs)
    if strict:
        try:
            chat.check_arguments()
        except ValueError as error:
            raise ValueError(f"data.chat_template_kwargs: {error}") from None
    today = config.data.chat_template_date or _stored_date(config) or date.today().isoformat()
    return {"template_arguments": {k: v for k, v in chat.arguments.items() if chat.reads(k)}, "today": today}


def dated(config: RunConfig) -> RunConfig:
    """Return the config with the date of chat templates, if the template of `model.path` reads the date.

    The date is that of the first call for `output_dir`, which stores it there, so that a run that is resumed on a later day has
    the same prompts.
    """
    if config.data.chat_template_date is not None or not _reads_date(config.model.path):
        return config
    today = _stored_date(config)
    if today is None:
        today = date.today().isoformat()
        if current().first:
            with_new_file(Path(config.output_dir) / _TEMPLATE_DATE, lambda new: write_json(new, {"date": today}))
    return replace(config, data=replace(config.data, chat_template_date=current().each(today)[0]))


def _stored_date(config: RunConfig) -> str | None:
    path = Path(config.output_dir) / _TEMPLATE_DATE
    return str(read_json(path).get("date")) if path.is_file() else None


def _reads_date(folder: str | None) -> bool:
    """Return whether a tokenizer's folder has a chat template that reads the date."""
    if folder is None:
        return False
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    files = [*(Path(folder) / name for name in names), *(Path(folder) / "additional_chat_templates").glob("*.jinja")]
    return any(READS_DATE.encode() in file.read_bytes() for file in files if file.is_file())


def load_reward_model(config: RunConfig, policy: PreTrainedModel | None = None) -> RewardModel:
    """Return the reward model of `reward.path`. If it is an adapter of the base of `policy`, it shares those weights.

    Raises:
        ValueError: `reward.path` is not set, or a file of the model is missing or broken.
    """
    folder = given(config.reward.path, "reward.path")
    adapters = None if policy is None else adapters_of(policy)
    where = placement(config)
    try:
        if adapters is not None and is_adapter(folder) and adapters.has_base(folder):
            model = RewardModel.adding(adapters, REWARD, Path(folder))
        else:
            model = RewardModel.load(folder, **where)
        model = model.computing(**computing(config))
    except ValueError as error:
        raise ValueError(f"reward.path: {error}") from None
    _notice_quant(config, "reward.path", folder)
    model.limit_positions(longest_sequence(config))
    return model


def _notice_quant(config: RunConfig, key: str, folder: str | Path) -> None:
    """Log a notice if the adapter in a folder was trained on weights of a different format."""
    before = trained_on(folder) if is_adapter(folder) else None
    if before not in (None, config.model.quant):
        notice(
            f"{key}: the adapter in {folder} was trained with model.quant={before} and is used with "
            f"model.quant={config.model.quant}, so that its outputs differ"
        )


def save_result(folder: Path, write_model: Callable[[Path], None], report: dict[str, Any], config: RunConfig) -> None:
    """Write a finished model, report.json, the config of the run and a manifest to a new folder, complete or absent."""

    def write(new: Path) -> None:
        write_model(new)
        write_json(new / REPORT, report)
        save_config(config, new / CONFIG)
        write_manifest(new, {})

    with_new_folder(folder, write)


def finished_report(config: RunConfig, stage: str) -> dict[str, Any] | None:
    """Return the report of a finished stage, for `--resume`; None if there is something left to do.

    Raises:
        ValueError: a setting differs from that of the finished run; the message names it.
    """
    folder, unfinished = stage_folders(config, stage)
    if unfinished.exists() or not (folder / REPORT).is_file():
        return None
    check_settings(folder, config, stage)
    return read_json(folder / REPORT)


def check_room(config: RunConfig, positions: int | None, whose: str) -> None:
    """Raise ValueError unless the longest prompt and the longest response together fit into `positions` (None: no limit).

    `whose` describes the limit in the message.
    """
    rollout = config.rollout
    if positions is not None and rollout.max_prompt_tokens + rollout.max_response_tokens > positions:
        raise ValueError(
            f"rollout: got max_prompt_tokens {rollout.max_prompt_tokens} and max_response_tokens "
            f"{rollout.max_response_tokens}, expected at most {positions} together, {whose}"
        )


def stage_folders(config: RunConfig, stage: str) -> tuple[Path, Path]:
    """Return the folder of a stage's finished model and the folder of its checkpoint."""
    root = Path(config.output_dir)
    return root / stage, root / f"{stage}.checkpoint"


def fingerprint_records(sets: Iterable[Iterable[Made]], codec: RecordCodec[Made]) -> str:
    """Return the SHA-256 of several sets of records; it depends on their order and on the boundaries between sets."""
    return fingerprint_rows(
        torch.as_tensor(codec.encode(record)) if record is not None else torch.empty(0)
        for records in sets
        for record in chain(records, (None,))
    )


def stage_metrics(config: RunConfig, stage: str, done: int = 0) -> MetricsWriter:
    """Return the writer of a stage's metrics in `output_dir`; it replaces those of an earlier run after step `done`."""
    return MetricsWriter(config.output_dir, stage, resume_after=done, tracking=config.tracking)


def plot(config: RunConfig, stage: str, x_label: str) -> None:
    """Plot the curves of a stage, including those of the run that it resumed, to `output_dir/plots/<stage>.png`."""
    rows = [row for row in read_metrics(config.output_dir) if row["stage"] == stage]
    plot_stage(rows, PANELS[stage], Path(config.output_dir) / "plots" / f"{stage}.png", x_label=x_label)


def placement(config: RunConfig) -> dict[str, Any]:
    """Return the arguments for loading a model: attention, dtype, device and whether code from its folder may run.

    Raises:
        ValueError: torch cannot use the device.
    """
    try:
        # A device that cannot store and return a number fails here and not in the middle of a stage.
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {config.device!r}, which torch cannot use here: {reason}") from None
    return {
        "attention": config.model.attention,
        "quant": config.model.quant,
        "dtype": getattr(torch, config.dtype),
        "device": config.device,
        "trust_remote_code": config.model.trust_remote_code,
    }


def computing(config: RunConfig, *, learns: bool = True) -> dict[str, Any]:
    """Return a model's arguments for computation: the dtype of its products and, if it `learns`, gradient checkpointing."""
    dtype = None if config.compute_dtype == "float32" else getattr(torch, config.compute_dtype)
    return {"compute_dtype": dtype, "gradient_checkpointing": learns and config.memory.gradient_checkpointing}


def longest_sequence(config: RunConfig) -> int:
    """Return the tokens of the longest sequence of any stage, for which all stages choose their rotary embeddings."""
    return config.rollout.max_prompt_tokens + max(config.rollout.max_response_tokens, config.data.max_response_tokens)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Raise ValueError unless every token has an embedding; extra rows, which pad the matrix to a round size, are allowed."""
    largest, rows = max(tokenizer.get_vocab().values()), input_layer(model).weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"{folder}: got token id {largest} in its tokenizer, expected ids below {rows}, the model's number of embeddings"
        )


def truncated(codec: Codec) -> dict[str, int]:
    """Return the numbers of prompts that were cut on the left, and of responses that the tokenizer changed, for reports."""
    changed = codec.truncated
    return {"truncated_prompts": changed.count} | ({"inexact_responses": changed.inexact} if changed.inexact else {})


def given(value: str | None, key: str) -> str:
    """Return the path `value` of the setting `key`; raise ValueError if it is not set, or if a data file does not exist."""
    if value is None:
        raise ValueError(f"{key} is not set; give {_WANTED[key]}")
    if key.startswith("data.") and not (Path(value).is_file() or Path(value).is_dir()):
        raise ValueError(f"{key}: {value}: no such file")
    return value


def check_records(reading: Reading[Any], key: str) -> None:
    """Read every record of the file at `key` and keep none, so that a bad line is reported before a model is loaded.

    Raises:
        ValueError: the file has no records, or a line is bad (named as `file:line`).
    """
    if not sum(1 for _ in reading):
        raise ValueError(f"{key}: got no records to train on in {reading.path}, expected at least one")


def check_trained_records(config: RunConfig, name: str, reader: Callable[..., Reading[Item]]) -> None:
    """Check the records of the file `data.<name>` with `check_records`, and log the columns that are ignored.

    Raises:
        ValueError: as `check_records`; the setting is not set; or a column is unknown and `data.unknown_columns` refuses it.
    """
    key = f"data.{name}"
    reading = reader(given(getattr(config.data, name), key), allow=config.data.allowed_columns())
    check_records(reading, key)
    notice(*reading.notes())


def encode_records(path: str | None, records: Iterable[Item], encode: Callable[[Item], Made]) -> Iterator[Made]:
    """Yield `encode(record)` for each record; a ValueError of `encode` is raised again with the record's `file:line`."""
    for record in records:
        try:
            encoded = encode(record)
        except ValueError as error:
            raise ValueError(f"{path}:{record.line}: {error}") from None
        yield encoded
