"""Construction of a PPO trainer from a policy, a reward and prompts, without files. The config defines all other parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from rlhf_engine.config import RolloutConfig, RunConfig
from rlhf_engine.data.special_tokens import token_id
from rlhf_engine.data.streams import shuffled_stream
from rlhf_engine.data.tokenize import Codec
from rlhf_engine.distributed.fsdp import make_mesh, shard
from rlhf_engine.distributed.placement import Placement
from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.memory import AnyArena, gradient_bytes, open_arena
from rlhf_engine.memory.arena import room_for
from rlhf_engine.model import ActorCritic, FrozenCopy, LanguageModel, Reference
from rlhf_engine.model.quantised import refuse_quantised_layers
from rlhf_engine.model.references import AdapterOff, Hydra
from rlhf_engine.model.roles import Outputs
from rlhf_engine.model.streamed import StreamedCopy
from rlhf_engine.model.trunk import named, outermost_layers
from rlhf_engine.optim.adamw import Optimizer, Resident
from rlhf_engine.optim.build import build_optimizer
from rlhf_engine.ppo.callbacks import Callback, TextMetrics
from rlhf_engine.ppo.ptx import PretrainStream
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.ppo.update import SurrogateSteps, TrustRegionStep, UpdateRule
from rlhf_engine.rewards.scaling import RewardFunction
from rlhf_engine.rollout import Generator
from rlhf_kernels import head_workspace_bytes

Prompts = Sequence[Tensor | Sequence[int]] | Callable[[int, int], Sequence[Tensor]]
"""Token ids of prompts, used in random order and reshuffled after each pass, or a function of (first, count)."""


class Plan(Protocol):
    """The part of a memory plan that a trainer needs."""

    @property
    def kv_bytes(self) -> int | None:
        """Upper bound of the bytes of keys and values; None for no bound."""
        ...

    def within(self, config: RunConfig) -> RunConfig:
        """Return the config with the number of sequences decoded together limited to the plan's memory."""
        ...


def build_trainer(
    policy: ActorCritic,
    reference: Reference | None,
    reward: RewardFunction,
    prompts: Prompts,
    config: RunConfig,
    *,
    codec: Codec | None = None,
    generator: Generator | None = None,
    optimizer: Optimizer | torch.optim.Optimizer | None = None,
    arena: AnyArena | None = None,
    plan: Plan | None = None,
    pretrain: PretrainStream | None = None,
    callbacks: Sequence[Callback] = (),
    ranks: Ranks = ONE,
) -> PPOTrainer:
    """Return a trainer with the settings of `config.ppo`, `config.rollout` and `config.seed`.

    `config.memory.optimizer_state` is also used if no optimizer is given. Settings that define the models are ignored, because
    the models are arguments: the sections `model` and `reward`, `device`, `dtype`, `compute_dtype`, `backend`,
    `memory.gradient_checkpointing`, `ppo.value_model` and `ppo.value_init`. `memory.budget` is ignored, because it belongs to
    the plan.

    Args:
        policy: the model that is trained and sampled from.
        reference: the model of the KL penalty; by default the one that `config.ppo.reference` selects.
        reward: returns one score per response of a rollout, such as `text_reward` of a Python function.
        prompts: see `Prompts`.
        config: the settings.
        codec: the tokenizer with its prompt format; needed unless `generator` is given. With it, the log has the metrics of
            `TextMetrics`.
        generator: the sampler; by default one with the settings of `config.rollout`.
        optimizer: an optimizer of all parameters that require a gradient; by default AdamW with `config.ppo.optim`.
        arena: the memory that the phases share; by default one of the size that they need.
        plan: a memory plan that bounds the memory of sampling.
        pretrain: text for PPO-ptx, needed if `config.ppo.ptx_coef` is above 0.
        callbacks: called in this order, on every rank.
        ranks: the processes of the run. With several, `policy` and `reference` are sharded in place as in
            `config.distributed`, and `optimizer` must be None.

    Raises:
        ValueError: for neither codec nor generator; a generator of a different policy or together with a plan; an optimizer
            of different parameters; a pretraining stream without `ptx_coef` or the reverse; a prompt that is empty, too long
            or has an id outside the vocabulary; TRPO with an attention that cannot be differentiated twice.
    """
    if generator is not None and generator.policy is not policy:
        raise ValueError("the generator samples from a different model; build it with `policy`")
    if generator is not None and plan is not None:
        raise ValueError("pass `generator` or `plan`, not both; the memory of a generator is already fixed")
    if generator is None:
        if codec is None:
            raise ValueError("pass `codec` or `generator`; a trainer needs one of them to sample responses")
        settings, kv_bytes = (config, None) if plan is None else (plan.within(config), plan.kv_bytes)
        generator = make_generator(policy, codec, settings, config.seed, kv_bytes=kv_bytes)
    if reference is None:
        reference = make_reference(policy, config.ppo.reference, host=config.memory.reference == "host")
    sharded = place(policy, reference, config, ranks)
    if sharded and optimizer is not None:
        raise ValueError("optimizer: its parameters are those of the model before it was sharded; leave it out")
    if optimizer is None:
        optimizer = build_optimizer(policy, config.ppo.optim, config.memory.optimizer_state)
    elif not isinstance(optimizer, Optimizer):
        optimizer = Resident(optimizer)
    if policy.adapters is None:
        refuse_quantised_layers(policy.model)
    _check_parameters(policy, optimizer)
    if arena is None:
        arena = open_arena(policy.device, phase_bytes(policy, generator, optimizer), head_bytes(policy))
    optimizer.allocate_from(arena.take)
    trpo = config.ppo.objective == "trpo"
    rule: UpdateRule = SurrogateSteps(
        policy,
        optimizer,
        config.ppo,
        arena,
        temperature=generator.config.temperature,
        seed=config.seed,
        pretrain=pretrain,
        values_only=trpo,
    )
    return PPOTrainer(
        policy,
        reference,
        generator,
        prompts if callable(prompts) else prompt_stream(prompts, config, policy.lm_weight.shape[0]),
        reward,
        config.ppo,
        TrustRegionStep(rule) if trpo else rule,
        arena,
        seed=config.seed,
        callbacks=callbacks if codec is None else (TextMetrics(codec), *callbacks),
        ranks=ranks,
        sharded=sharded,
    )


def place(policy: ActorCritic, reference: Reference, config: RunConfig, ranks: Ranks) -> list[nn.Module]:
    """Shard the policy and a frozen copy as in `config.distributed`; return the models that are sharded.

    Raises:
        ValueError: `config.distributed` does not fit the number of ranks, or a setting is not supported with several.
    """
    parts = policy.adapters is not None or policy.top is not None
    placement = Placement.of(config, ranks.size, parts=parts)
    if placement.shard == 1:
        return []
    mesh = make_mesh(placement.replicate, placement.shard, policy.device.type)
    models = [policy] + ([reference.model] if isinstance(reference, FrozenCopy) else [])
    for model in models:
        shard(model, outermost_layers(model.trunk), mesh, Outputs)
    return list(models)


def make_reference(policy: ActorCritic, kind: str, *, host: bool = False) -> Reference:
    """Return the reference `kind`, a value of `ppo.reference`, of a policy that no update has changed.

    With `host`, the layers of a frozen copy are in host memory.

    Raises:
        ValueError: the policy does not allow the kind: adapter_off needs adapters, and hydra frozen lower layers; or `host` is
            set and the policy has frozen layers, which its reference shares.
    """
    if host:
        if kind not in ("auto", "frozen_copy"):
            raise ValueError(
                f"memory.reference: got 'host' with ppo.reference {kind!r}, which has no copy; expected 'device'"
            )
        return StreamedCopy(policy)
    if kind == "adapter_off" or (kind == "auto" and policy.adapters is not None):
        return AdapterOff(policy)
    if kind == "hydra" or (kind == "auto" and policy.top is not None):
        return Hydra(policy)
    return FrozenCopy(policy)


def make_generator(
    policy: LanguageModel, codec: Codec, config: RunConfig, seed: int, *, kv_bytes: int | None = None
) -> Generator:
    """Return a sampler with the config's rollout settings; its keys and values use at most `kv_bytes`.

    The codec's `ends` become the ids that end a response, so that no text contains them.
    """
    text, eos = config.rollout.stop_token, end_ids(policy, codec, config.rollout)
    stop = None if text is None else one_token(codec, text, "rollout.stop_token")
    codec.ends.clear()
    codec.ends.update(eos)
    ends = {"eos_token_ids": eos, "pad_token_id": codec.pad_id, "stop_token_id": stop}
    return Generator(policy, config.rollout, seed=seed, tokenizer=codec.tokenizer, kv_bytes=kv_bytes, **ends)


def end_ids(policy: LanguageModel, codec: Codec, config: RolloutConfig) -> list[int]:
    """Return the ids that end a response: the tokenizer's EOS and those of `config.eos_tokens`.

    If that is None: those that the model's config and generation config name, as in transformers' `generate`, and the token
    that ends a turn in the chat template.

    Raises:
        ValueError: an entry of `config.eos_tokens` is not one token, or the model's ids are not integers.
    """
    if config.eos_tokens is not None:
        chosen = [one_token(codec, text, f"rollout.eos_tokens[{at}]") for at, text in enumerate(config.eos_tokens)]
        return list(dict.fromkeys((codec.eos_id, *chosen)))
    model = cast("Any", policy.model)  # not every model has a generation config
    found = [codec.eos_id, codec.turn_end[-1]]
    for source in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        ids: Any = getattr(source, "eos_token_id", None)
        listed = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
        if any(type(one) is not int for one in listed):
            raise ValueError(
                f"{named(policy.model)}: got eos_token_id {ids!r} in its config.json or generation_config.json, expected an "
                "id or a list of ids"
            )
        found += listed
    known = frozenset(codec.tokenizer.get_vocab().values())
    return [token for token in dict.fromkeys(found) if token in known]


def one_token(codec: Codec, text: str, key: str) -> int:
    """Return the id of a text that is one token; raise ValueError that begins with `key` if it is not."""
    if any(text == token.content for token in codec.tokenizer.added_tokens_decoder.values()):
        return token_id(codec.tokenizer, text)
    ids = codec.encode_texts([text])[0]
    if len(ids) != 1:
        raise ValueError(f"{key}: got {text!r}, which is {len(ids)} tokens, expected the text of one token")
    return ids[0]


def prompt_stream(
    prompts: Sequence[Tensor | Sequence[int]], config: RunConfig, vocabulary: int
) -> Callable[[int, int], list[Tensor]]:
    """Return the function of (first, count) of an endless stream of the prompts in random order, reshuffled after each pass.

    Raises:
        ValueError: for no prompts, or for a prompt that is not 1 to `rollout.max_prompt_tokens` ids below `vocabulary`.
    """
    if not len(prompts):
        raise ValueError("prompts: got an empty sequence, expected at least one prompt")
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, config.rollout.max_prompt_tokens, vocabulary)
    take = shuffled_stream(len(prompts), config.seed, "prompts")
    return lambda first, count: [torch.as_tensor(prompts[index]) for index in take(first, count)]


def _check_prompt(index: int, prompt: Tensor | Sequence[int], longest: int, vocabulary: int) -> None:
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"prompts[{index}]: got {type(prompt).__name__}, expected token ids such as those of `Codec.encode_prompt`"
        ) from None
    expected = f"1 to {longest} token ids (rollout.max_prompt_tokens)"
    if ids.dim() != 1 or not 1 <= len(ids) <= longest:
        raise ValueError(f"prompts[{index}]: got shape {tuple(ids.shape)}, expected {expected}")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"prompts[{index}]: got {ids.dtype}, expected {expected}")
    low, high = (int(found) for found in ids.aminmax())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(f"prompts[{index}]: got the id {wrong}, expected ids from 0 to {vocabulary - 1}")


def _check_parameters(policy: ActorCritic, optimizer: Optimizer) -> None:
    """Raise ValueError unless the optimizer has exactly the parameters that require a gradient."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter): name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    if missing := [name for key, name in trained.items() if key not in stepped]:
        raise ValueError(
            f"optimizer: {missing[0]} is missing ({len(missing)} missing in all); add every parameter of the policy that "
            "requires a gradient, or freeze it with requires_grad_(False)"
        )
    if strangers := len(stepped - trained.keys()):
        raise ValueError(
            f"optimizer: {strangers} of its parameters are frozen or not parameters of the policy; remove them"
        )


def head_bytes(policy: ActorCritic) -> int:
    """Return the arena bytes for the fused head's logits: those of the CPU, and 0 on a GPU, whose allocator caches blocks."""
    if policy.device.type != "cpu":
        return 0
    backend = "triton" if policy.backend == "triton" else "cpu"
    return head_workspace_bytes(policy.lm_weight.shape[0], policy.product_dtype, backend=backend)


def phase_bytes(policy: ActorCritic, generator: Generator, optimizer: Optimizer) -> dict[str, int]:
    """Return the arena bytes of each phase.

    generate: keys, values and merged weights. score: logits. train: gradients plus the larger of logits and optimizer state in
    transit, because the state of a step arrives after its gradients are complete, unless it is copied while they are computed.
    """
    head = room_for((head_bytes(policy),), torch.uint8)
    gradients = gradient_bytes(p for group in optimizer.param_groups for p in group["params"])
    return {"generate": generator.phase_bytes, "score": head, "train": gradients + max(head, optimizer.transit_bytes)}
