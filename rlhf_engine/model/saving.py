"""A policy as a folder: the causal LM in transformers' format, its adapter in peft's, or its top layers; and the values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_engine.distributed.fsdp import assign
from rlhf_engine.distributed.ranks import is_sharded
from rlhf_engine.files import require
from rlhf_engine.model.actor_critic import ActorCritic, LanguageModel
from rlhf_engine.model.heads import VALUE_HEAD
from rlhf_engine.model.pretrained import (
    ADAPTER,
    TOP_RECORD,
    base_folder,
    is_adapter,
    is_top,
    like,
    load_head,
    load_pretrained,
    write_pretrained,
)
from rlhf_engine.model.quantised import refuse_quantised_layers
from rlhf_engine.model.reward_model import VALUE_MODEL, RewardModel
from rlhf_engine.model.roles import POLICY, VALUE, ValueFunction
from rlhf_engine.model.trunk import adapters_of, output_layer


def load_policy(
    folder: str | Path,
    *,
    attention: str | None = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    quant: str = "none",
    backend: str = "auto",
) -> ActorCritic:
    """Read any Hugging Face causal LM as a policy. The value head starts at zero if the folder has no value function.

    An adapter, or the top layers in the checkpoint of an unfinished run, are read together with the model to which they
    belong. `trust_remote_code` allows Python code from the folder to run. `quant` is the format of the linear layers in the
    trunk (`model.quant`), in which they are frozen.

    Raises:
        ValueError: a file or a weight is missing or broken, or an adapter's model has changed. The message names the folder.
    """
    folder = Path(folder)
    where = {"attention": attention, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    where["quant"] = quant
    model = load_causal_lm(folder, **where)
    value: ValueFunction | None = None
    if (folder / VALUE_MODEL).is_dir():
        value = _load_value_model(folder / VALUE_MODEL, model, where)
    elif (folder / VALUE_HEAD).is_file():
        value = load_head(folder / VALUE_HEAD, output_layer(model).weight.shape[1]).to(device)
    return ActorCritic(model, value, backend=backend)


def load_causal_lm(folder: Path, **where: Any) -> PreTrainedModel:
    """Return the causal LM of a folder, or of the base of a folder with its adapter or top layers.

    `where`: see `load_pretrained`. An adapter is active and requires gradients; the other weights do not.

    Raises:
        ValueError: as `load_pretrained`, `read_adapter` and `read_top`.
    """
    if is_top(folder):
        from rlhf_engine.model.top_files import read_top

        if where.get("quant", "none") != "none":
            raise ValueError(
                f"model.quant: got {where['quant']!r}, expected 'none' for {folder}, the checkpoint of an unfinished run with "
                "only its top layers; run rlhf merge on it first"
            )
        tensors, model = read_top(folder), load_pretrained(AutoModelForCausalLM, base_folder(folder), **where)
        weights = dict(model.named_parameters())
        if unknown := sorted(tensors.keys() - weights.keys()):
            raise ValueError(f"{folder}: got the weight {unknown[0]}, which {type(model).__name__} does not have")
        copy_tensors(folder, tensors, ((name, weights[name]) for name in tensors))
        return model
    if not is_adapter(folder):
        return load_pretrained(AutoModelForCausalLM, folder, **where)
    from rlhf_engine.model.adapters import Adapters, read_adapter

    found = read_adapter(folder)
    model = load_pretrained(AutoModelForCausalLM, base_folder(folder), **where)
    adapters = Adapters.like(model, found)
    adapters.add(POLICY, found.tensors, trained=True, source=folder)
    adapters.make_default(POLICY)
    return model


def _load_value_model(folder: Path, model: PreTrainedModel, where: dict[str, Any]) -> RewardModel:
    """Return a value function with its own trunk, or with an adapter on the trunk of the policy."""
    adapters = adapters_of(model)
    if adapters is not None and is_adapter(folder) and adapters.has_base(folder):
        return RewardModel.adding(adapters, VALUE, folder, trained=True)
    return RewardModel.load(folder, **where)


def save_policy(
    folder: Path, policy: ActorCritic, tokenizer: PreTrainedTokenizerBase | None, *, complete: bool = True
) -> None:
    """Write a policy into an existing folder that `load_policy` can read.

    It holds the model as `AutoModelForCausalLM.from_pretrained` reads it, or only the adapter of the policy, in peft's
    format. The value function and the tokenizer are in the same folder. Unless `complete`, a policy of which only the top
    layers are trained is stored without the layers below, if the folder of those is known.

    Raises:
        ValueError: the model has adapters that this engine did not add, or quantised layers without adapters.
    """
    save_language_model(folder, policy, tokenizer, complete=complete)
    if policy.value is not None:
        policy.value.save_value(folder)


def save_language_model(
    folder: Path, policy: LanguageModel, tokenizer: PreTrainedTokenizerBase | None, *, complete: bool = True
) -> None:
    """Write the model, the adapter or the top layers, as `save_policy` does."""
    if policy.adapters is not None:
        policy.adapters.save(folder, POLICY)
        write_pretrained(folder, None, tokenizer)
        return
    if not complete and policy.top is not None and policy.top.base is not None:
        from rlhf_engine.model.top_files import write_top

        write_top(folder, policy.top.trained_tensors(policy.model), policy.top.base)
        write_pretrained(folder, None, tokenizer)
        return
    adapted = [name for name, module in policy.model.named_modules() if hasattr(module, "base_layer")]
    if adapted:
        raise ValueError(
            f"policy: the model has adapters (at {adapted[0]}), which a checkpoint cannot store; save them with the "
            "PeftModel's save_pretrained, or call its merge_and_unload first"
        )
    refuse_quantised_layers(policy.model)
    write_pretrained(folder, policy.model, tokenizer)


def check_saved(folder: Path, policy: LanguageModel) -> None:
    """Raise ValueError unless a folder has the files that `save_policy` writes for `policy`."""
    whole = TOP_RECORD if policy.top is not None and is_top(folder) else "config.json"
    require(
        folder,
        whole if policy.adapters is None else ADAPTER,
        *([] if policy.value is None else [policy.value.saved_as]),
    )


def copy_weights(folder: Path, policy: LanguageModel) -> None:
    """Copy the weights of a saved policy into the tensors of `policy`, which its optimizer already references.

    Of sharded tensors, this rank copies its part; the whole ones are in host memory meanwhile.
    """
    sharded = any(is_sharded(tensor) for _, tensor in policy.stored())
    copy_tensors(folder, saved_tensors(folder, policy, **({"device": "cpu"} if sharded else {})), policy.stored())


def saved_tensors(folder: Path, policy: LanguageModel, **where: Any) -> Mapping[str, Tensor]:
    """Return the tensors that `save_policy` wrote, by the names of `policy.stored()`.

    They have the dtype and the device of the policy, which `where` may replace, unless only adapters are stored.

    Raises:
        ValueError: a file is missing or broken, or an adapter belongs to a different model.
    """
    if policy.adapters is None and is_top(folder):
        from rlhf_engine.model.top_files import read_top

        found = {f"model.{name}": tensor for name, tensor in read_top(folder).items()}
        return found | _saved_value(folder, policy)
    if policy.adapters is None:
        # An average is wider than the frozen weights that it shares with the policy.
        where = like(policy.model) | {"dtype": next(policy.stored())[1].dtype} | where
        if policy.value is None:
            model = load_pretrained(AutoModelForCausalLM, folder, **where)
            return {f"model.{name}": tensor for name, tensor in model.named_parameters()}
        return dict(load_policy(folder, **where, backend=policy.backend).named_parameters())
    ours = policy.adapters.tensors(POLICY)
    names = {id(tensor): name for name, tensor in policy.named_parameters()}
    found = {
        names[id(ours[key])]: tensor for key, tensor in policy.adapters.read(folder).tensors.items() if key in ours
    }
    return found | _saved_value(folder, policy)


def _saved_value(folder: Path, policy: LanguageModel) -> dict[str, Tensor]:
    """Return the tensors of the value function that `save_policy` wrote, by their names in `policy`."""
    value: Any = policy.value  # a module
    if value is None:
        return {}
    if (folder / VALUE_MODEL).is_dir():
        theirs = value.saved_tensors(folder / VALUE_MODEL)
    else:
        theirs = dict(load_head(folder / VALUE_HEAD, output_layer(policy.model).weight.shape[1]).named_parameters())
    names, own = {id(tensor): name for name, tensor in policy.named_parameters()}, dict(value.named_parameters())
    return {names[id(own[key])]: tensor for key, tensor in theirs.items() if key in own}


@torch.no_grad()
def copy_tensors(folder: Path, saved: Mapping[str, Tensor], ours: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors that were read from `folder` into `ours`.

    Raises:
        ValueError: a tensor is missing or has a different shape. The message names the first.
    """
    for name, tensor in ours:
        if name not in saved:
            raise ValueError(f"{folder}: the weight {name} is missing, expected shape {tuple(tensor.shape)}")
        if saved[name].shape != tensor.shape:
            got = tuple(saved[name].shape)
            raise ValueError(f"{folder}: got shape {got} for {name}, expected shape {tuple(tensor.shape)}")
        assert tensor.is_floating_point(), name  # a copy into integer codes would truncate
        assign(tensor, saved[name])
