"""The models of a TRL script in the roles of the engine: policy, value function, reference, reward.

The modules that a script passes are trained in place, as TRL trains them.
Shapes: B sequences, S tokens, N states of a batch, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_engine.errors import foreign_errors
from rlhf_engine.model import ActorCritic, LanguageModel, ValueHead
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.pretrained import write_pretrained
from rlhf_engine.model.reward_model import VALUE_MODEL, RewardModel
from rlhf_engine.model.rope import limit_positions
from rlhf_engine.model.trunk import check_packing, checkpoint_layers, last_hidden, packs, trunk_of
from rlhf_engine.model.upcast import upcast_products


class PolicyAndValue(nn.Module):
    """The trained models as callbacks get them: `model.policy`, `model.value_model` and `model.config`, as in TRL."""

    def __init__(self, policy: nn.Module, value_model: nn.Module) -> None:
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.config: Any = policy.config


class ClassifierValue(nn.Module):
    """A sequence classifier with one label as a value function with a separate trunk.

        V(s) = score(h(s))

    where h is the hidden state of the last token of s, and `score` the classifier's linear layer.

    Args:
        model: the classifier, possibly wrapped by peft. Its parameters are trained in place.
        compute_dtype: dtype of the trunk's matrix products; None is that of the weights.
        gradient_checkpointing: recompute the trunk's layers in the backward pass.

    Raises:
        ValueError: the model has no linear layer `score` with one output.
    """

    shares_trunk = False
    saved_as = f"{VALUE_MODEL}/config.json"

    def __init__(
        self, model: nn.Module, *, compute_dtype: torch.dtype | None = None, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        base = classifier(model, "value_model")
        # Not registered as submodules: they already belong to the model.
        self.__dict__["trunk"], self.__dict__["score"] = trunk_of(base), cast("Any", base).score
        self.compute_dtype = None if compute_dtype == base.dtype else compute_dtype
        upcast_products(self.trunk, self.compute_dtype or base.dtype)
        if gradient_checkpointing:
            checkpoint_layers(self.trunk)
        self.eval()

    trunk: PreTrainedModel
    score: nn.Module

    def train(self, mode: bool = True) -> Self:
        """Keep evaluation mode: TRL trains without dropout."""
        super().train(False)
        return self

    def batch_values(self, batch: TokenBatch, hidden: Tensor | None = None) -> Tensor:  # (N,), float32
        """Return the value of each state of a batch."""
        states = last_hidden(
            self.trunk, batch.input_ids, compute_dtype=self.compute_dtype, cu_inputs=batch.cu_inputs, use_cache=False
        ).flatten(0, 1)
        assert batch.rows is not None
        dtype = next(self.score.parameters()).dtype
        return self.score(states.index_select(0, batch.rows).to(dtype)).squeeze(-1).float()

    def loss_inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the values of a batch's states, with a gradient."""
        return {"values": self.batch_values(batch)}

    @property
    def packs(self) -> bool:
        """Whether micro-batches with a token budget are packed without padding."""
        return packs(self.trunk, self.compute_dtype)

    def check_packing(self) -> None:
        """Raise ValueError if packed sequences affect each other in the trunk."""
        check_packing(self.trunk, self.compute_dtype)

    def limit_positions(self, longest: int | None) -> None:
        """Use the rotary embeddings of a run whose longest sequence has `longest` tokens, in every pass."""
        limit_positions(self.trunk, longest)

    def save_value(self, folder: Path) -> None:
        """Write the classifier, or its adapter, into the folder of a policy."""
        (folder / VALUE_MODEL).mkdir(exist_ok=True)
        write_pretrained(folder / VALUE_MODEL, cast("PreTrainedModel", self.model))


class SeparateReference:
    """A reference that is a model of a script, whose log-probs are computed with the policy's settings."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.model = LanguageModel(model, **settings)

    packs = False

    def shared_states(self, batch: TokenBatch) -> None:
        """Return None: the model shares no computation with the policy."""

    def off(self) -> AbstractContextManager[Any]:
        """Return a context in which the language model is the reference."""
        return torch.no_grad()

    def logprobs(self, batch: TokenBatch, *, temperature: float) -> Tensor:  # (N,), float32
        """Return the log-probs of a batch's actions, without a gradient."""
        with torch.no_grad(), self.off():
            found = self.model(batch, ("logprobs",), temperature=temperature).logprobs
        assert found is not None
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the names and tensors of the language model."""
        return self.model.model.named_parameters()


class AdapterDisabled(SeparateReference):
    """A reference that is the policy without its adapter of peft, as TRL computes it without `ref_model`."""

    def __init__(self, policy: LanguageModel, wrapper: Any) -> None:
        self.model, self.wrapper = policy, wrapper

    def off(self) -> AbstractContextManager[Any]:
        """Disable the adapter inside the context."""
        return self.wrapper.disable_adapter()


def classifier(model: nn.Module, name: str) -> PreTrainedModel:
    """Return the sequence classifier of the argument `name`, without a wrapper of peft.

    Raises:
        ValueError: it has no layer `score` with one output.
    """
    base = cast("Any", model).get_base_model() if is_adapted(model) else model
    score = getattr(base, "score", None)
    outputs = getattr(score, "out_features", None)
    if not isinstance(base, PreTrainedModel) or not isinstance(score, nn.Module) or outputs not in (None, 1):
        got = f"{type(base).__name__} whose score has {outputs} outputs" if outputs else type(base).__name__
        raise ValueError(
            f"{name}: got a {got}, expected a sequence classifier with one label, such as "
            "AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)"
        )
    return base


def reward_of(model: nn.Module) -> RewardModel:
    """Return the reward of a sequence classifier: its score at the last token of a response."""
    base = classifier(model, "reward_model")
    score: Any = cast("Any", base).score
    layer = getattr(score, "base_layer", score)
    bias = 0.0 if getattr(layer, "bias", None) is None else layer.bias.detach()
    return RewardModel(trunk_of(base), ValueHead.from_weights(layer.weight.detach(), bias))


def is_adapted(model: nn.Module) -> bool:
    """Return whether peft wraps the model."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def with_adapter(model: nn.Module, settings: object, name: str, **changes: Any) -> nn.Module:
    """Return the model with a new adapter of peft; `settings` is the argument `name`, of which `changes` replace fields.

    Raises:
        ImportError: peft is not installed.
        TypeError: `settings` is no config of peft.
        ValueError: the model has an adapter, or peft refuses the settings.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError:
        raise ImportError(f"{name}: needs peft; install rlhf-kernels[adapters]") from None
    if not isinstance(settings, PeftConfig):
        raise TypeError(f"{name}: got {type(settings).__name__}, expected a config of peft, such as LoraConfig")
    if is_adapted(model):
        raise ValueError(
            f"{name}: the model already has an adapter; merge it with merge_and_unload(), or leave {name} out"
        )
    settings = copy.deepcopy(settings)
    for key, value in changes.items():
        setattr(settings, key, value)
    with foreign_errors(name):
        return get_peft_model(cast("PreTrainedModel", model), settings)


def adapted_value(model: nn.Module, settings: Any) -> nn.Module:
    """Return the value model with a new adapter; its layer `score` is trained as a whole and saved with the adapter."""
    whole = [*(getattr(settings, "modules_to_save", None) or ()), "score"]
    return with_adapter(model, settings, "value_peft_config", modules_to_save=list(dict.fromkeys(whole)))


def actor_critic(
    policy: nn.Module, value_model: nn.Module, *, compute_dtype: torch.dtype | None, gradient_checkpointing: bool
) -> ActorCritic:
    """Return policy and value model as one model of the engine.

    Raises:
        ValueError: the engine does not support one of them; the message has the argument's name.
    """
    settings: dict[str, Any] = {"compute_dtype": compute_dtype, "gradient_checkpointing": gradient_checkpointing}
    value = ClassifierValue(value_model, **settings)
    return ActorCritic(policy, value, **settings)
