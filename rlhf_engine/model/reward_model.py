"""The reward model: a causal LM without its unembedding, and one linear layer to a scalar.

Shapes: B sequences, S tokens, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf_engine.errors import foreign_errors
from rlhf_engine.files import read_json, read_model_config, require, write_json
from rlhf_engine.model.heads import ValueHead
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.pretrained import (
    ADAPTER,
    base_folder,
    is_adapter,
    is_top,
    like,
    load_head,
    load_pretrained,
    write_pretrained,
)
from rlhf_engine.model.quantised import refuse_quantised_layers
from rlhf_engine.model.roles import POLICY, REWARD
from rlhf_engine.model.rope import limit_positions
from rlhf_engine.model.trunk import (
    adapters_of,
    check_packing,
    checkpoint_layers,
    input_layer,
    last_hidden,
    output_layer,
    packs,
    top_of,
    trunk_of,
)
from rlhf_engine.model.upcast import upcast_products

if TYPE_CHECKING:
    from rlhf_engine.model.adapters import Adapters

VALUE_MODEL = "value_model"
"""Folder of a value function with its own trunk, in the policy's folder."""

HEAD_FILE, _INFO_FILE = "reward_head.safetensors", "reward_model.json"


class RewardModel(nn.Module):
    """`r(x, y) = w . h(x, y) + b`, where h is the hidden state of the last token of prompt x followed by response y.

    With `adapters`, the trunk belongs to their model, and the parameters are those of the head and of the adapter `name`,
    which every pass uses.
    """

    trunk: PreTrainedModel

    def __init__(
        self,
        trunk: PreTrainedModel,
        head: ValueHead,
        skipped_id: int | None = None,
        *,
        adapters: Adapters | None = None,
        name: str = POLICY,
    ) -> None:
        super().__init__()
        self.adapters, self.name = adapters, name
        self.saved_as = f"{VALUE_MODEL}/{'config.json' if adapters is None else ADAPTER}"
        if adapters is None:
            self.trunk = trunk
        else:
            self.__dict__["trunk"] = trunk  # not registered as a submodule
            self.own = nn.ParameterDict({_key(key): tensor for key, tensor in adapters.tensors(name).items()})
        self.head = head
        self.skipped_id = skipped_id
        """Token at the end of a row that is not read, as the sequence classifiers of transformers skip their pad_token_id."""
        self.compute_dtype: torch.dtype | None = None
        self.limit_positions(None)
        self.eval()

    @classmethod
    def from_causal_lm(cls, model: PreTrainedModel, seed: int) -> Self:
        """Return a reward model with a copy of the trunk of `model` and a new head drawn from N(0, 1 / (H + 1)).

        If the model has adapters, its trunk is not copied, and the reward model has the adapter `POLICY`.
        """
        hidden_size = output_layer(model).weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(hidden_size, generator=generator) * (hidden_size + 1) ** -0.5
        head = ValueHead.from_weights(weight.to(next(model.parameters()).device))
        adapters = adapters_of(model)
        return cls(copy.deepcopy(trunk_of(model)), head) if adapters is None else cls.sharing(adapters, POLICY, head)

    @classmethod
    def sharing(cls, adapters: Adapters, name: str, head: ValueHead, skipped_id: int | None = None) -> Self:
        """Return a model of an adapter and a head, on the trunk that all roles share."""
        model = adapters.model
        trunk = model if model.get_output_embeddings() is None else trunk_of(model)
        return cls(trunk, head, skipped_id, adapters=adapters, name=name)

    def limit_positions(self, longest: int | None) -> None:
        """Use the rotary embeddings of a run whose longest sequence has `longest` tokens, in every pass (see `rope`)."""
        limit_positions(self.trunk, longest)

    def computing(self, *, compute_dtype: torch.dtype | None = None, gradient_checkpointing: bool = False) -> Self:
        """Set how the trunk computes, and return the model.

        Args:
            compute_dtype: dtype of the matrix products; None is that of the weights.
            gradient_checkpointing: recompute the trunk's layers in the backward pass.
        """
        self.compute_dtype = None if compute_dtype == self.trunk.dtype else compute_dtype
        upcast_products(self.trunk, self.compute_dtype or self.trunk.dtype)
        if gradient_checkpointing:
            checkpoint_layers(self.trunk)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the head. The trunk stays in evaluation mode (no dropout), which does not stop gradients."""
        super().train(mode)
        self.trunk.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device

    def forward(
        self,
        ids: Tensor,  # (B, S), padded on the right
        lengths: Tensor,  # (B,), tokens of each row
    ) -> Tensor:  # (B,) float32
        """Return one score per row, read at its last token. In a causal trunk it depends on the whole row and on no pad."""
        hidden, last = self._hidden(ids), lengths - 1
        if self.skipped_id is not None:
            columns = torch.arange(ids.shape[1], device=ids.device)
            last = (columns * ((ids != self.skipped_id) & (columns <= last[:, None]))).argmax(1)
        return self.head(hidden[torch.arange(len(ids), device=ids.device), last])

    # ---- as a value function with its own trunk ----

    shares_trunk = False

    @property
    def packs(self) -> bool:
        """Whether micro-batches with a token budget are packed without padding."""
        return packs(self.trunk, self.compute_dtype)

    def batch_values(self, batch: TokenBatch, hidden: Tensor | None = None) -> Tensor:  # (N,) float32
        """Return the head's output at the states of a batch: as in InstructGPT, the value starts as the reward."""
        states = self._hidden(batch.input_ids, batch.cu_inputs).flatten(0, 1)
        assert batch.rows is not None
        return self.head(states.index_select(0, batch.rows))

    def loss_inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the values of a batch's states, with a gradient."""
        return {"values": self.batch_values(batch)}

    def save_value(self, folder: Path) -> None:
        """Write the model into the folder of a policy."""
        (folder / VALUE_MODEL).mkdir()
        self.save(folder / VALUE_MODEL)

    def check_packing(self) -> None:
        """Raise ValueError if packed sequences affect each other in the trunk."""
        check_packing(self.trunk, self.compute_dtype)

    def score_rows(
        self,
        ids: Tensor,  # (B, S), padded on the right
        lengths: Tensor,  # (B,)
        chunk: int = 32,
    ) -> Tensor:  # (B,) float32
        """Return the score of every row, computed for `chunk` rows of similar length at a time to reduce padding."""
        order = lengths.argsort()
        scores = [self(ids[part, : int(lengths[part].max())], lengths[part]) for part in order.split(chunk)]
        return torch.cat(scores)[order.argsort()]

    def _hidden(self, ids: Tensor, cu_inputs: Tensor | None = None) -> Tensor:
        with nullcontext() if self.adapters is None else self.adapters.using(self.name):
            return last_hidden(self.trunk, ids, compute_dtype=self.compute_dtype, cu_inputs=cu_inputs, use_cache=False)

    @torch.no_grad()
    def centre(self, mean: float) -> None:
        """Subtract `mean` from all scores, so that scores with that mean get mean 0."""
        self.head.bias.sub_(mean)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the tensors of a checkpoint: all parameters, or those of the head and of the trained top layers."""
        top = top_of(self.trunk)
        if self.adapters is not None or top is None:
            return self.named_parameters()
        kept = {id(tensor) for _, tensor in top.trained_tensors(self.trunk)} | {
            id(one) for one in self.head.parameters()
        }
        return ((name, tensor) for name, tensor in self.named_parameters() if id(tensor) in kept)

    def save(self, folder: str | Path, *, complete: bool = True) -> None:
        """Write the trunk in transformers' format or the adapter in peft's, and the head next to it (safetensors and JSON).

        Unless `complete`, a trunk of which only the top layers are trained is stored without the layers below, if the folder
        of those is known.
        """
        folder, top = Path(folder), top_of(self.trunk)
        if self.adapters is not None:
            self.adapters.save(folder, self.name)
        elif not complete and top is not None and top.base is not None:
            from rlhf_engine.model.top_files import write_top

            write_top(folder, top.trained_tensors(self.trunk), top.base)
        else:
            refuse_quantised_layers(self.trunk)
            write_pretrained(folder, self.trunk)
        save_file({name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}, folder / HEAD_FILE)
        info: dict[str, object] = {"kind": "reward_model", "hidden_size": self.head.weight.numel()}
        if self.skipped_id is not None:
            info["skipped_id"] = self.skipped_id
        write_json(folder / _INFO_FILE, info)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        attention: str | None = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        quant: str = "none",
    ) -> Self:
        """Read what `save` wrote, or a sequence classifier of transformers with one label, which TRL and others save.

        An adapter is read together with the model to which it belongs.

        A classifier's score is transformers' own: that of the linear layer `score` at the last token that is not the config's
        pad_token_id. `trust_remote_code` allows Python code from the folder to run. `quant` is the format of the linear
        layers in the trunk (`model.quant`), in which they are frozen.

        Raises:
            ValueError: a file or a weight is missing or broken, or the classifier has several labels or computes its score
                differently. The message names it.
        """
        folder = Path(folder)
        where = {"attention": attention, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        where["quant"] = quant
        if not (folder / _INFO_FILE).is_file() and _is_classifier(folder):
            return cls._of_classifier(folder, where)
        if is_adapter(folder):
            return cls._of_adapter(folder, where)
        require(folder, "config.json")
        if not (folder / _INFO_FILE).is_file():
            raise ValueError(
                f"{folder} is not a reward model (it has no {_INFO_FILE}); give the folder that rlhf rm wrote, or a sequence "
                "classifier with one label"
            )
        require(folder, HEAD_FILE)
        trunk, info = load_pretrained(AutoModel, folder, **where), read_json(folder / _INFO_FILE)
        head = load_head(folder / HEAD_FILE, info.get("hidden_size")).to(device)
        return cls(trunk, head, _skipped_id(folder, info))

    @classmethod
    def _of_adapter(cls, folder: Path, where: dict[str, Any]) -> Self:
        """Read an adapter with its head, and the model or the reward model to which it belongs."""
        from rlhf_engine.model.adapters import Adapters, read_adapter

        cls._read_head(folder)  # its errors come before a model is loaded, as those of the adapter
        found, base = read_adapter(folder), base_folder(folder)
        scores = (base / _INFO_FILE).is_file() or _is_classifier(base)
        model = cls.load(base, **where).trunk if scores else load_pretrained(AutoModelForCausalLM, base, **where)
        return cls.adding(Adapters.like(model, found), REWARD, folder)

    @classmethod
    def adding(cls, adapters: Adapters, name: str, folder: Path, *, trained: bool = False) -> Self:
        """Add the adapter of a folder to `adapters`, and return the model of it and the folder's head.

        `trained` sets whether the adapter requires gradients.

        Raises:
            ValueError: the adapter belongs to a different model, or the folder has no head.
        """
        head, skipped = cls._read_head(folder)
        found = adapters.read(folder)
        adapters.add(name, found.tensors, trained=trained, source=folder, settings=found.settings)
        return cls.sharing(adapters, name, head.to(adapters.model.device), skipped)

    @staticmethod
    def _read_head(folder: Path) -> tuple[ValueHead, int | None]:
        """Return the head in a folder, and the token that is not read."""
        if not (folder / HEAD_FILE).is_file():
            raise ValueError(
                f"{folder}: got an adapter without the head of a reward model ({HEAD_FILE}); expected a folder that `rlhf rm` "
                "wrote"
            )
        require(folder, _INFO_FILE)
        info = read_json(folder / _INFO_FILE)
        return load_head(folder / HEAD_FILE, info.get("hidden_size")), _skipped_id(folder, info)

    def merged(self, dtype: torch.dtype) -> RewardModel:
        """Return the model without adapters, whose own one is added to the weights of the trunk for good, in `dtype`."""
        if self.adapters is None:
            return self
        self.adapters.merge(self.name)
        trunk: Any = self.trunk
        return RewardModel(trunk.to(dtype), self.head, self.skipped_id)

    def saved_tensors(self, folder: Path) -> Mapping[str, Tensor]:
        """Return the tensors that `save` wrote, by the names of this model's parameters.

        Raises:
            ValueError: a file is missing or broken, or an adapter belongs to a different model.
        """
        if self.adapters is None and not is_top(folder):
            return dict(type(self).load(folder, **like(self.trunk)).named_parameters())
        head, _ = self._read_head(folder)
        if self.adapters is None:
            from rlhf_engine.model.top_files import read_top

            found = {f"trunk.{key}": tensor for key, tensor in read_top(folder).items()}
            return found | {f"head.{key}": tensor for key, tensor in head.named_parameters()}
        own = {f"own.{_key(key)}": tensor for key, tensor in self.adapters.read(folder).tensors.items()}
        return own | {f"head.{key}": tensor for key, tensor in head.named_parameters()}

    @classmethod
    def _of_classifier(cls, folder: Path, where: dict[str, Any]) -> Self:
        config = read_model_config(folder, trust_remote_code=where["trust_remote_code"])
        if config.num_labels != 1:
            raise ValueError(
                f"{folder}: got a sequence classifier with {config.num_labels} labels, expected one, whose score is the reward"
            )
        model = load_pretrained(AutoModelForSequenceClassification, folder, **where)
        layer, trunk = getattr(model, "score", None), model.base_model
        if not isinstance(layer, nn.Linear) or trunk is model:
            raise ValueError(
                f"{folder}: got a {type(model).__name__}, which has no linear layer `score` on the hidden states of a decoder; "
                "expected a decoder with one, such as LlamaForSequenceClassification"
            )
        bias = 0.0 if layer.bias is None else layer.bias.detach()
        head = ValueHead.from_weights(layer.weight.detach(), bias)
        found = cls(cast("PreTrainedModel", trunk), head, config.get_text_config().pad_token_id)
        found._check_scores(model, folder)
        return found

    @torch.no_grad()
    def _check_scores(self, classifier: PreTrainedModel, folder: Path) -> None:
        """Raise ValueError unless the scores of a few tokens are those of the classifier's own forward pass."""
        rows = input_layer(self.trunk).weight.shape[0]
        ids = torch.arange(1, 8, device=self.device)[None] * 7 % rows
        ids[ids == self.skipped_id] = (0 if self.skipped_id else 1) % rows
        with foreign_errors(f"{folder}: {type(classifier).__name__} cannot score tokens"):
            expected = classifier(input_ids=ids, use_cache=False).logits.reshape(-1).float()
            found = self(ids, torch.tensor([ids.shape[1]], device=self.device))
        difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= 64 * torch.finfo(self.trunk.dtype).eps * max(1.0, scale):
            raise ValueError(
                f"{folder}: {type(classifier).__name__} does not compute its score by a linear layer on the last hidden state: "
                f"got {float(expected[0]):.6g}, expected {float(found[0]):.6g}; give a reward.function that calls it"
            )


def _key(name: str) -> str:
    """Return the name of an adapter's tensor as a key of `torch.nn.ParameterDict`, which has no dots."""
    return name.replace(".", "/")


def _skipped_id(folder: Path, info: dict[str, Any]) -> int | None:
    skipped = info.get("skipped_id")
    if skipped is not None and type(skipped) is not int:
        raise ValueError(f"{folder / _INFO_FILE}: skipped_id: got {type(skipped).__name__}, expected the id of a token")
    return skipped


def _is_classifier(folder: Path) -> bool:
    """Return whether the config.json of a folder describes a sequence classifier."""
    if not (folder / "config.json").is_file():
        return False
    names = read_json(folder / "config.json").get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)
