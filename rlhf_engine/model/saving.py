"""A policy as a folder: the causal LM in transformers' format, and its value function."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf_engine.model.actor_critic import ActorCritic
from rlhf_engine.model.heads import VALUE_HEAD
from rlhf_engine.model.pretrained import like, load_head, load_pretrained, write_pretrained
from rlhf_engine.model.reward_model import VALUE_MODEL, RewardModel
from rlhf_engine.model.roles import ValueFunction
from rlhf_engine.model.trunk import output_layer


def load_policy(
    folder: str | Path,
    *,
    attention: str | None = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    backend: str = "auto",
) -> ActorCritic:
    """Read any Hugging Face causal LM as a policy. The value head starts at zero if the folder has no value function.

    `trust_remote_code` allows Python code from the folder to run.

    Raises:
        ValueError: a file or a weight is missing or broken. The message names the folder.
    """
    folder = Path(folder)
    where = {"attention": attention, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    model = load_pretrained(AutoModelForCausalLM, folder, **where)
    value: ValueFunction | None = None
    if (folder / VALUE_MODEL).is_dir():
        value = RewardModel.load(folder / VALUE_MODEL, **where)
    elif (folder / VALUE_HEAD).is_file():
        value = load_head(folder / VALUE_HEAD, output_layer(model).weight.shape[1]).to(device)
    return ActorCritic(model, value, backend=backend)


def save_policy(folder: Path, policy: ActorCritic, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write a policy into an existing folder that `load_policy` and `AutoModelForCausalLM.from_pretrained` can read.

    Raises:
        ValueError: the model has peft adapters, which those functions do not read.
    """
    adapted = [name for name, module in policy.model.named_modules() if hasattr(module, "base_layer")]
    if adapted:
        raise ValueError(
            f"policy: the model has adapters (at {adapted[0]}), which a checkpoint cannot store; save them with the "
            "PeftModel's save_pretrained, or call its merge_and_unload first"
        )
    write_pretrained(folder, policy.model, tokenizer)
    if policy.value is not None:
        policy.value.save_value(folder)


def copy_weights(folder: Path, policy: ActorCritic) -> None:
    """Copy the weights of a saved policy into the tensors of `policy`, which its optimizer already references."""
    copy_parameters(folder, load_policy(folder, **like(policy.model), backend=policy.backend), policy)


@torch.no_grad()
def copy_parameters(folder: Path, saved: nn.Module, model: nn.Module) -> None:
    """Copy the parameters of `saved`, which was read from `folder`, into `model`.

    Raises:
        ValueError: a parameter is missing or has a different shape. The message names the first.
    """
    theirs = dict(saved.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in theirs:
            raise ValueError(f"{folder}: the weight {name} is missing, expected shape {tuple(parameter.shape)}")
        if theirs[name].shape != parameter.shape:
            got = tuple(theirs[name].shape)
            raise ValueError(f"{folder}: got shape {got} for {name}, expected shape {tuple(parameter.shape)}")
        parameter.copy_(theirs[name])
