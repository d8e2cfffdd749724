"""The PPO stage: from prompts and a reward to a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_engine.checkpoint import REWARD_FUNCTION, fingerprint, fingerprint_rows
from rlhf_engine.checkpoint_folders import TRAINER
from rlhf_engine.config import RunConfig
from rlhf_engine.data import Codec, Example, PromptRecord, PromptTexts, RecordCodec, read_prompts, stored, token_rows
from rlhf_engine.distributed.placement import Placement
from rlhf_engine.distributed.ranks import current
from rlhf_engine.metrics import MetricsWriter
from rlhf_engine.model import ActorCritic, ValueHead
from rlhf_engine.model.adapter_files import Base
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.pretrained import load_tokenizer, max_positions
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.roles import POLICY, VALUE
from rlhf_engine.model.top_layers import train_all
from rlhf_engine.model.trunk import adapters_of, input_layer, output_layer
from rlhf_engine.notices import notice
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.ppo.callbacks import Callback, MetricsLog, RanksNotice, SampledResponses, earlier_responses
from rlhf_engine.ppo.ptx import PretrainStream
from rlhf_engine.ppo.repro import ReproFiles
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.recipes.loading import (
    check_packages,
    check_records,
    check_room,
    check_start_model,
    computing,
    dated,
    encode_records,
    given,
    load_reward_model,
    load_start,
    plot,
    truncated,
)
from rlhf_engine.recipes.planning import RunPlan, check_reference, plan_run
from rlhf_engine.recipes.reward_texts import reward_of_texts
from rlhf_engine.recipes.session import TrainingSession, load_newest
from rlhf_engine.recipes.starting import check_start, exclusive
from rlhf_engine.recipes.training_use import skipped_sft
from rlhf_engine.recipes.trial import check_disk, try_output, try_reward
from rlhf_engine.rewards.calls import Parameters
from rlhf_engine.rewards.scaling import RewardFunction
from rlhf_engine.rewards.user_code import import_function, source_fingerprint
from rlhf_engine.rollout import Rollout
from rlhf_engine.supervised.reward_model import score_examples

SAMPLES = "samples.jsonl"
"""File in OUTPUT_DIR with the first responses of every update."""

_PROMPTS: RecordCodec[Tensor] = RecordCodec(Tensor.tolist, lambda row: torch.from_numpy(row).long())


@exclusive
def run_ppo(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, callbacks: Sequence[Callback] = ()
) -> list[dict[str, float]]:
    """Train a policy on prompts and write it to `output_dir/ppo`; return the metrics of every update of this call.

    `resume` continues from the checkpoint in that folder and gives the numbers of an uninterrupted run. `overwrite` replaces
    an earlier run when the first update is finished. The `callbacks` are called before those that log and save.

    Raises:
        ValueError: an earlier run exists, and neither `resume` nor `overwrite` is set; or a setting or a file is wrong.
    """
    check_start(Path(config.output_dir) / "ppo", TRAINER, resume=resume, overwrite=overwrite)
    earlier_responses(Path(config.output_dir) / SAMPLES, after=0, damaged=resume)
    notice(*skipped_sft(config))
    check_reference(config)
    check_start_model(config)
    config.check_training()
    ranks = current()
    parts = bool(config.adapter.rank) or config.model.train_layers is not None
    Placement.of(config, ranks.size, parts=parts)
    config = dated(config)
    function = None
    if config.reward.function is not None:
        function = import_function(config.reward.function, "reward.function")
    by_text = config.reward.by_text
    columns = _check_prompts(config, function)
    check_packages(config)  # their modules count as memory before the run
    plan = plan_run(config)
    model, codec = load_start(config, reference=True)
    reward_model = None if by_text else load_reward_model(config, model)
    data = {} if reward_model is None else {"reward.path": fingerprint(reward_model.named_parameters())}
    _check_fit(config, model, codec, reward_model)
    texts = PromptTexts(columns) if by_text else None
    prompts = encode_prompts(config, codec, texts)
    policy = make_policy(config, model, reward_model)
    if ranks.size > 1:
        ranks.check_equal({"model.path": fingerprint(policy.named_parameters())})
    if reward_model is not None:
        reward = reward_function(reward_model, codec)
    else:
        assert texts is not None
        reward = reward_of_texts(config, function, codec, texts, columns)
    pretrain = pretrain_stream(config, codec)
    trainer = build_trainer(
        policy,
        None,
        reward,
        prompts,
        config,
        codec=codec,
        plan=plan,
        pretrain=pretrain,
        callbacks=callbacks,
        ranks=ranks,
    )
    data["data.prompts"] = fingerprint_rows(prompts)
    if pretrain is not None:
        data["data.pretrain"] = fingerprint_rows(pretrain.sequences)
    if config.reward.function is not None:
        data[REWARD_FUNCTION] = source_fingerprint(config.reward.function)
    ranks.check_equal(data)
    check_disk(trainer, config, Path(config.output_dir) / "ppo")
    with trainer.gathered(Path(config.output_dir) / "ppo.parts") if ranks.size > 1 else nullcontext():
        if ranks.first:
            try_output(trainer, codec.tokenizer, config)
    try_reward(trainer, codec.eos_id)
    loaded = load_newest(Path(config.output_dir) / "ppo", trainer, config, data) if resume else None
    return _train(config, trainer, codec, data, plan, loaded, overwrite=overwrite)


def _check_prompts(config: RunConfig, function: Callable[..., object] | None) -> tuple[str, ...]:
    """Check the training prompts; return their columns that the reward function receives, or all for `reward.url`.

    Raises:
        ValueError: as `check_records`, or the reward function has a parameter for which there is no column.
    """
    parameters = None if function is None else Parameters.of(function)
    names = () if parameters is None else (*parameters.required, *parameters.optional)
    every = config.reward.url is not None or (parameters is not None and parameters.every)
    allow = None if every else config.data.allowed_columns(*names)
    reading = read_prompts(given(config.data.prompts, "data.prompts"), "train", allow=allow)
    check_records(reading, "data.prompts")
    try:
        columns = tuple(reading.columns) if every else parameters.columns(reading.columns) if parameters else ()
    except ValueError as error:
        raise ValueError(f"reward.function {config.reward.function}: {error} ({reading.path})") from None
    notice(*reading.notes(columns))
    return columns


class SessionCheckpoints(Callback):
    """Callback with which the session saves checkpoints, at intervals and at the end, and stops after a signal."""

    def __init__(self, session: TrainingSession) -> None:
        self.session = session

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Save if a checkpoint is due."""
        self._call(self.session.after, trainer)

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Save the last updates, unless an error has ended the training: then the session decides what to save."""
        if error is None:
            self._call(self.session.save, trainer)

    def _call(self, saving: Callable[[], None], trainer: PPOTrainer) -> None:
        saved = self.session.saved
        saving()
        if self.session.saved != saved:
            trainer.notify("on_checkpoint", self.session.folder)


class Plots(Callback):
    """Callback that plots the curves of a complete run, including those of the run that it resumed."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Plot the curves, unless an error has ended the training."""
        if error is None:
            plot(self.config, trainer.stage, trainer.unit)


def _train(
    config: RunConfig,
    trainer: PPOTrainer,
    codec: Codec,
    data: dict[str, str],
    plan: RunPlan,
    loaded: Path | None,
    *,
    overwrite: bool,
) -> list[dict[str, float]]:
    """Run the updates after those of the checkpoint `loaded` in a `TrainingSession`, which saves them; return their metrics."""
    ranks = trainer.ranks
    if ranks.first:
        plan.write(config.output_dir)
    folder, every = Path(config.output_dir) / "ppo", config.ppo.checkpoint_every
    replaces = (folder,) if overwrite else ()
    with (
        MetricsWriter(
            config.output_dir, "ppo", resume_after=trainer.done, history=loaded, tracking=config.tracking
        ) as metrics,
        TrainingSession(
            trainer,
            folder,
            codec.tokenizer,
            config,
            data,
            metrics,
            every=every,
            loaded=loaded,
            replaces=replaces,
            ranks=ranks,
        ) as session,
    ):
        # A plan is that of one rank which has the whole model and rollout.
        log = MetricsLog(session, extra=lambda: truncated(codec) | (plan.metrics() if ranks.size == 1 else {}))
        history, count = None if loaded is None else loaded / SAMPLES, config.ppo.log_samples
        path = Path(config.output_dir) / SAMPLES
        samples = SampledResponses(
            path,
            codec,
            count,
            after=trainer.done,
            history=history,
            table=metrics.table,
            table_every=config.tracking.samples_every,
        )
        session.logs[SAMPLES] = samples
        if (update := config.ppo.profile_update) is not None and ranks.first:
            from rlhf_engine.ppo.profile import FOLDER, UpdateProfile

            trainer.callbacks.append(UpdateProfile(Path(config.output_dir) / FOLDER, update))
        checkpoints = SessionCheckpoints(session)
        trainer.callbacks += [samples, log, checkpoints, Plots(config)] if ranks.first else [checkpoints]
        if ranks.size == 1:
            trainer.callbacks.append(ReproFiles(config))
        elif ranks.first:
            trainer.callbacks.append(RanksNotice())
        trainer.train()
    return log.history


def make_policy(config: RunConfig, model: PreTrainedModel, reward_model: RewardModel | None) -> ActorCritic:
    """Return the policy with the value function that `ppo.value_model` and `ppo.value_init` select.

    Its loss has the balancing loss of a mixture of experts only with `model.router_aux_loss`.

    Raises:
        ValueError: the value function cannot start from the reward model, because there is none or its hidden size differs.
    """
    policy = _with_values(config, model, reward_model)
    if not config.model.router_aux_loss:
        policy.balance = None
    return policy


def _with_values(config: RunConfig, model: PreTrainedModel, reward_model: RewardModel | None) -> ActorCritic:
    ppo, settings = config.ppo, computing(config)
    from_reward = ppo.baseline == "value" and ppo.value_init == "reward_model"
    start = reward_model if from_reward else None
    if from_reward and start is None:
        raise ValueError(
            "ppo.value_init: got 'reward_model' with a reward.function, expected 'zero': a function has no weights"
        )
    if ppo.value_model == "backbone":
        value_model = _value_model(config, model, start)
        return ActorCritic(model, value_model.computing(**settings), backend=config.backend, **settings)
    if start is None:
        return ActorCritic(model, backend=config.backend, **settings)
    head = start.head
    theirs, ours = head.weight.numel(), output_layer(model).weight.shape[1]
    if theirs != ours:
        raise ValueError(
            f"ppo.value_init: got 'reward_model', whose hidden size is {theirs}, for a head on the policy's trunk, whose "
            f"hidden size is {ours}; expected ppo.value_init 'zero' or ppo.value_model 'backbone'"
        )
    value_head = ValueHead.from_weights(head.weight.detach(), head.bias.detach())
    return ActorCritic(model, value_head, backend=config.backend, **settings)


def _value_model(config: RunConfig, model: PreTrainedModel, start: RewardModel | None) -> RewardModel:
    """Return a value function with its own trunk, or with `adapter.rank` its own adapter, that starts as `start`.

    None starts it as the policy with a head of zeros. The adapter is on the trunk of the reward model, which is that of the
    policy if the reward model is an adapter on it too.
    """
    adapters = adapters_of(model)
    if adapters is None:
        if start is not None:
            return copy.deepcopy(start)
        value_model = RewardModel.from_causal_lm(model, config.seed)
        if config.model.train_layers is not None:
            train_all(value_model)
        nn.init.zeros_(value_model.head.weight)
        return value_model
    if start is None:
        adapters.add(VALUE, adapters.tensors(POLICY), trained=True)
        return RewardModel.sharing(adapters, VALUE, ValueHead(output_layer(model).weight.shape[1], model.device))
    theirs = start.adapters
    if theirs is None:
        theirs = Adapters(start.trunk, config.adapter, Base.of(given(config.reward.path, "reward.path")))
        theirs.add(VALUE, config.seed, trained=True)
    else:
        settings = theirs.settings_of[start.name]
        theirs.add(VALUE, theirs.tensors(start.name), trained=True, settings=settings)
    head = ValueHead.from_weights(start.head.weight.detach(), start.head.bias.detach())
    return RewardModel.sharing(theirs, VALUE, head, start.skipped_id)


def encode_prompts(config: RunConfig, codec: Codec, texts: PromptTexts | None = None) -> Sequence[Tensor]:
    """Return the token ids of the training prompts, in a temporary file on the disk of `output_dir`.

    If `texts` is given, add the text of each prompt to it, for rewards that read text.
    """
    path = given(config.data.prompts, "data.prompts")

    def encode(record: PromptRecord) -> Tensor:
        ids = codec.encode_prompt(record.prompt)
        if texts is not None:
            texts.add(ids, record)
        return torch.tensor(ids)

    return stored(encode_records(path, read_prompts(path, "train"), encode), _PROMPTS, config.output_dir)


def pretrain_stream(config: RunConfig, codec: Codec) -> PretrainStream | None:
    """Return the text of `data.pretrain` in sequences as long as the longest prompt and response; None without PPO-ptx."""
    if config.ppo.ptx_coef == 0.0:
        return None
    path = given(config.data.pretrain, "data.pretrain")
    length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    try:
        return PretrainStream(token_rows(path, codec, length, config.output_dir), config.seed)
    except ValueError as error:
        raise ValueError(f"data.pretrain: {error}") from None


def reward_function(model: RewardModel, codec: Codec) -> RewardFunction:
    """Return a reward function that scores whole responses, each followed by EOS, with a reward model.

    The tokenizer's EOS replaces the token that ended a response, because the reward model was trained with EOS. A response that
    reached the token limit is scored as if it ended there. A response that a stop string ended is scored with that string.
    """

    def scores(rollout: Rollout) -> Tensor:
        return score_examples(model, rollout_examples(rollout, codec), codec.pad_id)

    return scores


def rollout_examples(rollout: Rollout, codec: Codec) -> list[Example]:
    """Return prompt and response of every sequence of a rollout, each response with the tokenizer's EOS at its end."""
    rows = zip(rollout.prompts(), rollout.responses(), strict=True)
    return [Example(tuple(prompt), (*codec.content(response), codec.eos_id)) for prompt, response in rows]


def _check_fit(config: RunConfig, model: PreTrainedModel, codec: Codec, reward_model: RewardModel | None) -> None:
    """Raise ValueError unless the reward model reads the policy's token ids and both models hold the longest sequence."""
    rooms = [(max_positions(model), 0)]
    if reward_model is not None:
        _check_ids(config, model, codec, reward_model)
        # A response that reaches the token limit is scored with an additional EOS.
        rooms.append((max_positions(reward_model.trunk), 1))
    room = min((positions - spare for positions, spare in rooms if positions is not None), default=None)
    check_room(config, room, "the models' positions")


def _check_ids(config: RunConfig, model: PreTrainedModel, codec: Codec, reward_model: RewardModel) -> None:
    trusted, ours = config.model.trust_remote_code, codec.tokenizer
    theirs = load_tokenizer(given(config.reward.path, "reward.path"), trust_remote_code=trusted)
    folders = f"{config.reward.path} (reward.path) and {config.model.path} (model.path)"
    if theirs.get_vocab() != ours.get_vocab() or theirs.eos_token_id != ours.eos_token_id:
        raise ValueError(f"the tokenizers of {folders} differ; give a reward model that reads the policy's token ids")
    rows = [input_layer(found).weight.shape[0] for found in (reward_model.trunk, model)]
    if rows[0] < rows[1]:
        raise ValueError(
            f"{folders} have {rows[0]} and {rows[1]} embeddings; give a reward model with at least as many as the policy"
        )
