"""Policy and value function on one trunk, from any Hugging Face causal language model.

The trunk runs once per pass. The fused ops of `rlhf_kernels` read its hidden states and the weight of the
language-model head. The head itself is called only for the logits of a decode step. Therefore no [B, T, V] tensor
exists, and positions without an action cost no logits. On a processor without half-precision instructions the linear
layers become `UpcastLinear`s.
Shapes: B sequences, S input positions, T or N actions, V vocabulary, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_engine.errors import foreign_errors
from rlhf_engine.model.balance import RouterBalance
from rlhf_engine.model.exact import MIN_ROWS, is_exact, make_exact
from rlhf_engine.model.heads import OutputHead, ValueHead, check_head
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.roles import POLICY, Outputs, ValueFunction, Want
from rlhf_engine.model.rope import limit_positions
from rlhf_engine.model.trunk import (
    adapters_of,
    check_causal,
    check_packing,
    checkpoint_layers,
    last_hidden,
    named,
    output_layer,
    packs,
    products,
    top_of,
    trunk_of,
)
from rlhf_engine.model.upcast import upcast_products
from rlhf_kernels import PPOLoss, TokenLogprobs

if TYPE_CHECKING:
    from rlhf_engine.model.adapters import Adapters
    from rlhf_engine.model.top_layers import TopLayers

Model = TypeVar("Model", bound="LanguageModel")

_WANTS = frozenset(get_args(Want))


class LanguageModel(nn.Module):
    """A causal language model: its trunk, and the fused ops of `rlhf_kernels` on its output layer.

    Weights are read only inside a call, so that code that gathers or switches them runs once per pass. Construction
    compares the log-probs of a few tokens with those of the wrapped model. The trunk stays in evaluation mode: dropout
    would make the ratio of a policy to itself differ from 1.

    Args:
        model: any Hugging Face causal LM, or one that peft wrapped or injected adapters into.
        backend: backend of the kernels.
        compute_dtype: dtype of the matrix products; None is that of the weights. Log-probs, values and gradients keep
            their dtype.
        gradient_checkpointing: recompute the trunk's layers in the backward pass.

    Raises:
        ValueError: `model` has no output embeddings, its log-probs differ, it has no trunk, its adapter adds tokens, or
            its layers cannot be recomputed.
    """

    head: OutputHead
    """Fused ops on the output layer, which is a `torch.nn.Linear` of the model or peft's layer around one."""

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        model = _without_wrapper(model)
        if model.get_output_embeddings() is None:
            raise ValueError(f"model: got {type(model).__name__}, which has no output embeddings; expected a causal LM")
        self.model = model
        self.trunk_name = _trunk_name(model)
        # Not registered as a submodule: the layer already belongs to the model.
        self.__dict__["head"] = OutputHead.of(model, backend=backend)
        self.balance = RouterBalance.of(model)
        """The balancing loss of experts that the config asks for; None turns it off."""
        self.value: ValueFunction | None = None
        self.backend = backend
        self.compute_dtype: torch.dtype | None = None
        limit_positions(self.trunk, None)
        self.eval()
        place = f"{model.dtype} on {self.device}"
        with foreign_errors(f"{named(model)} cannot run in {place}; set a different dtype", ValueError):
            check_head(self)
        check_causal(self.trunk, self.compute_dtype)
        self.compute_dtype = None if compute_dtype == model.dtype else compute_dtype
        upcast_products(model, self.product_dtype)
        if gradient_checkpointing:
            checkpoint_layers(self.trunk)
        self.packs = packs(self.trunk, self.compute_dtype)

    @property
    def trunk(self) -> PreTrainedModel:
        """The model without its language-model head."""
        return cast("PreTrainedModel", self.model.get_submodule(self.trunk_name))

    @property
    def adapters(self) -> Adapters | None:
        """The adapters of the roles, of which a call uses one; None if the weights of the model itself are trained."""
        return adapters_of(self.model)

    @property
    def top(self) -> TopLayers | None:
        """The layers that are trained, if those below are frozen; None if all are trained."""
        return top_of(self.trunk)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the tensors of a checkpoint: all, or the value's and those of the policy's adapter or top layers."""
        if self.adapters is not None:
            kept = {id(tensor) for tensor in self.adapters.tensors(POLICY).values()}
        elif self.top is not None:
            kept = {id(tensor) for _, tensor in self.top.trained_tensors(self.model)}
        else:
            yield from self.named_parameters()
            return
        kept |= set() if self.value is None else {id(tensor) for tensor in self.value.parameters()}
        yield from ((name, tensor) for name, tensor in self.named_parameters() if id(tensor) in kept)

    @property
    def lm_weight(self) -> Tensor:  # (V, H)
        """The weight of the output layer, for its shape, dtype and device."""
        return output_layer(self.model).weight

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the matrix products, and of keys and values."""
        return self.compute_dtype or self.lm_weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.lm_weight.device

    def restrict(self, known: Collection[int]) -> int:
        """Give ids that are not in `known` probability 0 in sampling, log-probs and loss; return their number.

        `known` are the ids of a tokenizer. `Generator` calls this if it has the tokenizer.
        """
        return self.head.restrict(known)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the heads. Trunks stay in evaluation mode (no dropout), which does not stop gradients."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        batch: TokenBatch,
        want: Collection[Want],
        *,
        temperature: float = 1.0,
        loss: Mapping[str, Any] | None = None,
        project: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
        adapter: str | None = POLICY,
    ) -> Outputs:
        """Run the trunk once and return what `want` names, for the N states `batch.rows`.

        Row s of the hidden states belongs to the state in which token s + 1 is the action.

        Args:
            batch: the tokens; `ids` are needed for log-probs and loss.
            want: names of `Outputs`.
            temperature: divides the logits of log-probs, entropy and loss.
            loss: for "loss", the arguments of `linear_ppo_loss` from `old_logprobs` on; with `returns` it trains the
                values.
            project: for "logits", computes `hidden @ weight.T + bias` in place of the output layer.
            adapter: name of the adapter that the whole call uses, if the model has `adapters`; None uses none.

        Raises:
            ValueError: `want` has a name that `Outputs` does not have, or "values" without a value function; or
                `batch.ids` or `loss` does not match `want`.
        """
        if isinstance(want, str):
            raise ValueError(f"want: got the string {want!r}, expected a collection of names, such as ({want!r},)")
        want = frozenset(want)
        if unknown := want - _WANTS:
            raise ValueError(f"want: got {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(_WANTS))}")
        value = self.value if "values" in want else None
        if "values" in want and value is None:
            raise ValueError(
                "want: 'values' needs a value function, which this model does not have; use an ActorCritic"
            )
        if want & {"logprobs", "entropy", "loss"} and batch.ids is None:
            raise ValueError(f"batch.ids is not set; give the actions for {', '.join(sorted(want))}")
        if ("loss" in want) != (loss is not None):
            got = "loss is not set" if loss is None else f"loss is set for the outputs {sorted(want)}"
            raise ValueError(f"{got}; pass the arguments of the loss if and only if want has 'loss'")
        if value is not None and want == {"values"} and not value.shares_trunk:
            return Outputs(values=value.batch_values(batch, None))
        with nullcontext() if self.adapters is None else self.adapters.using(adapter):
            return self._outputs(batch, want, temperature, loss, project)

    def _outputs(
        self,
        batch: TokenBatch,
        want: frozenset[str],
        temperature: float,
        loss: Mapping[str, Any] | None,
        project: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None,
    ) -> Outputs:
        value = self.value if "values" in want else None
        routers: list[Tensor] | None = [] if "balance" in want and self.balance is not None else None
        hidden = self._states(batch, routers)
        logprobs = entropy = None
        if want & {"logprobs", "entropy"}:
            logprobs, entropy = self._logprobs(hidden, batch, temperature, entropy="entropy" in want)
        return Outputs(
            hidden=hidden if "hidden" in want else None,
            logits=self._logits(hidden, project) if "logits" in want else None,
            logprobs=logprobs if "logprobs" in want else None,
            entropy=entropy,
            values=None if value is None else value.batch_values(batch, hidden),
            loss=self._loss(hidden, batch, temperature, loss) if "loss" in want else None,
            balance=self.balance(tuple(routers), batch.real) if routers and self.balance is not None else None,
        )

    @property
    def exact(self) -> bool:
        """Whether the log-probs of every pass have the bits of those that are sampled (`be_exact`)."""
        return is_exact(self.trunk)

    def be_exact(self) -> None:
        """Compute all later passes of the trunk with the layers of decode steps (`rlhf_engine.model.exact`).

        Raises:
            ValueError: as `make_exact`, and for top layers, whose passes begin with stored states.
        """
        if self.top is not None:
            raise ValueError("rollout.exact: got True with model.train_layers, expected False")
        make_exact(self.trunk)

    def limit_positions(self, longest: int | None) -> None:
        """Use the rotary embeddings of a run whose longest sequence has `longest` tokens, in every pass (see `rope`)."""
        limit_positions(self.trunk, longest)

    @torch.no_grad()
    def states_below(self, batch: TokenBatch) -> Tensor:  # (B, S, H)
        """Return the input of the first trained layer for every token of a batch, as `TokenBatch.states` needs it."""
        assert self.top is not None
        return self.top.states_below(self.trunk, lambda: self._states(batch))

    def products(self) -> AbstractContextManager[None]:
        """Compute matrix products in `compute_dtype` inside the context; weights are rounded once for all passes in it."""
        return products(self.compute_dtype, self.device)

    def check_packing(self) -> None:
        """Raise ValueError if micro-batches are packed and packed sequences affect each other."""
        if self.packs:
            check_packing(self.trunk, self.compute_dtype)

    def _states(self, batch: TokenBatch, router_logits: list[Tensor] | None = None) -> Tensor:  # (N, H)
        positions, mask = batch.position_ids, batch.attention_mask
        if positions is None and isinstance(mask, Tensor) and mask.dim() == 2:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -batch.input_ids.shape[1] :]
        top, ids, spare = self.top, batch.input_ids, 0
        if self.exact and batch.cache is None:  # columns at the end change nothing but the number of rows
            spare = max(0, -(-MIN_ROWS // len(ids)) - ids.shape[1])
            ids = nn.functional.pad(ids, (0, spare))
        assert batch.states is None or top is not None
        with top.starting_from(self.trunk, batch.states) if top and batch.states is not None else nullcontext():
            hidden = last_hidden(
                self.trunk,
                ids,
                compute_dtype=self.compute_dtype,
                cu_inputs=batch.cu_inputs,
                router_logits=router_logits,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=batch.cache,
                use_cache=batch.cache is not None,
            )
            hidden = hidden[:, : ids.shape[1] - spare].flatten(0, 1)
        return hidden if batch.rows is None else hidden.index_select(0, batch.rows)

    def _logits(
        self, hidden: Tensor, project: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None
    ) -> Tensor:  # (N, V)
        with self.products():
            if project is not None:
                return self.head.masked(self.head.transform(self.head.matrices(hidden).product(project)))
            return self.head.logits(hidden)

    def _logprobs(self, hidden: Tensor, batch: TokenBatch, temperature: float, *, entropy: bool) -> TokenLogprobs:
        assert batch.ids is not None
        with self.products():
            return self.head.logprobs(hidden, batch.ids, temperature=temperature, entropy=entropy)

    def _loss(self, hidden: Tensor, batch: TokenBatch, temperature: float, loss: Mapping[str, Any] | None) -> PPOLoss:
        assert batch.ids is not None and loss is not None
        options = dict(loss)
        if self.value is not None and "returns" in options:
            options |= self.value.loss_inputs(batch)
        with self.products():
            return self.head.ppo_loss(hidden, batch.ids, temperature=temperature, **options)


class ActorCritic(LanguageModel):
    """A policy and its value function: a head on the policy's hidden states, or a separate model.

    Args:
        model: the policy's causal LM.
        value: the value function; None creates a `ValueHead` of zeros.
        settings: keyword arguments of `LanguageModel`. They do not apply to a value model.

    Raises:
        ValueError: `value` is no value function or a head of a different hidden size, or `LanguageModel` rejects
            `model`.
    """

    def __init__(self, model: nn.Module, value: ValueFunction | None = None, **settings: Any) -> None:
        super().__init__(model, **settings)
        hidden_size = self.lm_weight.shape[1]
        value = ValueHead(hidden_size, self.lm_weight.device) if value is None else value
        if not isinstance(value, ValueFunction):
            raise ValueError(f"value: got {type(value).__name__}, expected a ValueFunction, such as a ValueHead")
        if isinstance(value, ValueHead) and value.weight.shape != (hidden_size,):
            got = tuple(value.weight.shape)
            raise ValueError(
                f"value: got a head with a weight of shape {got}, expected ({hidden_size},), the hidden size"
            )
        self.value = value
        self.packs = self.packs and value.packs

    def limit_positions(self, longest: int | None) -> None:
        """Use the rotary embeddings of a run whose longest sequence has `longest` tokens, also in a separate value model."""
        super().limit_positions(longest)
        if (limit := getattr(self.value, "limit_positions", None)) is not None:
            limit(longest)

    def check_packing(self) -> None:
        """Raise ValueError if micro-batches are packed and packed sequences affect each other in a trunk."""
        super().check_packing()
        if self.packs:
            assert self.value is not None
            self.value.check_packing()


def _without_wrapper(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a peft wrapper, including its adapters; return other models unchanged."""
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return cast("PreTrainedModel", model)
    wrapper: Any = model  # peft may not be installed, so its type is not named
    for name, config in wrapper.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: got the peft adapter {name!r}, a {type(config).__name__}, which adds virtual tokens to every input; "
                "expected one that changes layers, such as LoRA"
            )
    return wrapper.get_base_model()


def _trunk_name(model: PreTrainedModel) -> str:
    """Return the attribute path of the module that computes the last hidden states."""
    trunk = trunk_of(model)
    for name, module in model.named_modules():
        if module is trunk and name:
            return name
    raise ValueError(
        f"model: {type(model).__name__} has no trunk; its base_model or get_decoder() must be one of its submodules"
    )


def frozen_copy(policy: ActorCritic) -> ActorCritic:
    """Return a deep copy of a policy that requires no gradients; a value function with its own trunk is left out."""
    value = policy.value
    return frozen(policy, without=None if value is None or value.shares_trunk else value)


def frozen(policy: Model, *, without: ValueFunction | None, copies: Mapping[int, nn.Parameter] | None = None) -> Model:
    """Return a deep copy without gradients, which shares the weights that are frozen below or under what is trained.

    `copies` has weights by the `id` of those that they replace in the copy.
    """
    memo: dict[int, object] = {} if without is None else {id(without): None}
    memo |= copies or {}
    if policy.adapters is not None or policy.top is not None:
        memo |= {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}
    return copy.deepcopy(policy, memo).requires_grad_(False)
