"""Training of only the top layers of a trunk, and passes over the layers below them or from there on.

The embedding and the layers below are frozen, so the input of the first trained layer is a function of the tokens only. It is
computed once per rollout for the policy and its reference, and every later pass starts from it.
Shapes: B sequences, S positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_engine.errors import foreign_errors
from rlhf_engine.model.trunk import TOP, adapters_of, input_layer, last_hidden, top_of, trunk_of

if TYPE_CHECKING:
    from rlhf_engine.model.adapter_files import Base


class _InPlaceOf(nn.Module):
    """A module in place of a layer, which is skipped; other attributes are those of the layer."""

    seen: Tensor
    """The hidden states that the layer would have read."""

    def __init__(self, layer: nn.Module, length: int | None, states: Tensor | None = None) -> None:
        super().__init__()
        # Not registered as a submodule: code that iterates over the layers of a trunk must not find a skipped one.
        self.__dict__["layer"], self.length, self.states = layer, length, states

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Keep the hidden states that the layer would read, and return them or `states` in the form of its output."""
        self.seen = inputs[0] if inputs else options["hidden_states"]
        hidden = self.seen if self.states is None else self.states
        return hidden if self.length is None else (hidden, *[None] * (self.length - 1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


@dataclass(frozen=True)
class TopLayers:
    """The trained layers of a trunk. All names are relative to the trunk."""

    layers: str
    """Name of the list of layers."""
    lower: int
    """Number of frozen layers below the trained ones."""
    after: tuple[str, ...]
    """Names of the modules with weights that run after the last layer, such as the final norm."""
    trained: frozenset[str]
    """Names of the weights that are trained, unless the model has adapters."""
    base: Base | None
    """The folder with the frozen weights. With it a checkpoint holds only the trained ones."""
    outputs: tuple[int | None, ...]
    """Length of the tuple or list that each layer returns; None if a layer returns a tensor."""

    def trained_tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the trained weights of a causal LM or its trunk; those of a copy have the same names."""
        trunk = _trunk(model)
        kept = {id(weight) for name, weight in trunk.named_parameters() if name in self.trained}
        output = model.get_output_embeddings()
        if output is not None and not _shares(output, trunk):
            kept |= {id(weight) for weight in output.parameters()}
        return ((name, weight) for name, weight in model.named_parameters() if id(weight) in kept)

    # ---- passes over a part of the trunk ----

    @contextmanager
    def starting_from(self, trunk: nn.Module, states: Tensor) -> Iterator[None]:  # (B, S, H)
        """Let passes inside the context begin with the first trained layer, whose input is `states`."""
        with self._replaced(trunk, range(self.lower), states):
            yield

    @torch.no_grad()
    def states_below(self, trunk: nn.Module, run: Callable[[], object]) -> Tensor:  # (B, S, H)
        """Return the input of the first trained layer in the pass `run()` of the trunk, which skips the trained layers."""
        with self._replaced(trunk, range(self.lower, len(self.outputs))) as stand_ins:
            run()
        return stand_ins[0].seen

    @torch.no_grad()
    def check_split(self, trunk: PreTrainedModel, compute_dtype: torch.dtype | None) -> None:
        """Compare a pass over the whole trunk with one below the trained layers followed by one from there on.

        Raises:
            ValueError: the bits differ, for example because a trained layer reads keys of a frozen one.
        """
        ids, advice = _ids(trunk), "set ppo.reference to frozen_copy"

        def run(ids: Tensor = ids) -> Tensor:
            return last_hidden(trunk, ids, compute_dtype=compute_dtype, use_cache=False)

        what = f"ppo.reference: got 'hydra', or 'auto' with model.train_layers, for {type(trunk).__name__}, whose top layers"
        with foreign_errors(f"{what} cannot run without those below; {advice}"):
            whole, states = run(), self.states_below(trunk, run)
            run(ids.flip(1))  # what a layer kept of the tokens is replaced
            again = None
            if states.shape[:-1] == ids.shape:
                with self.starting_from(trunk, states):
                    again = run()
        if again is None or not torch.equal(whole, again):
            raise ValueError(f"{what} read more than one vector per token from those below; {advice}")

    @contextmanager
    def _replaced(self, trunk: nn.Module, span: range, states: Tensor | None = None) -> Iterator[list[_InPlaceOf]]:
        """Skip the layers of `span` inside the context; the first of them returns `states`, if they are given."""
        layers = cast("nn.ModuleList", trunk.get_submodule(self.layers))
        kept = {number: layers[number] for number in span}
        stand_ins = [
            _InPlaceOf(layer, self.outputs[number], states if number == span.start else None)
            for number, layer in kept.items()
        ]
        try:
            for number, stand_in in zip(span, stand_ins, strict=True):
                layers[number] = stand_in
            yield stand_ins
        finally:
            for number, layer in kept.items():
                layers[number] = layer


def top_of_model(model: PreTrainedModel) -> TopLayers | None:
    """Return the trained layers of a causal LM; None if all are trained."""
    return top_of(_trunk(model))


def check_layers(count: int, layers: int, whose: object) -> None:
    """Raise ValueError unless a model with `layers` layers has `count` to train."""
    if count > layers:
        raise ValueError(f"model.train_layers: got {count}, expected at most {layers}, the number of layers of {whose}")


def train_top(model: PreTrainedModel, count: int, base: Base | None = None) -> None:
    """Train only the top `count` layers of a causal LM, the modules after them, and an output layer that is not tied.

    The other weights no longer require gradients. If the model gets adapters later, these are trained instead, in the top
    layers only; adapters that it has already stay where they are. `base` is the folder of the model.

    Raises:
        ValueError: the model has fewer layers, or its top layers are trained already; its layers cannot be found; or a trained
            layer shares a weight with the rest.
    """
    trunk = trunk_of(model)
    if top_of(trunk) is not None:
        raise ValueError(f"model: got a {type(model).__name__} of which only the top layers are trained already")
    name, layers = _layers_of(trunk)
    check_layers(count, len(layers), type(model).__name__)
    lower = len(layers) - count
    after, outputs = _probe(trunk, layers)
    names = {module: place for place, module in trunk.named_modules()}
    top: list[nn.Module] = [*layers[lower:], *after]
    ours = {id(weight): weight for module in top for weight in module.parameters()}
    output = model.get_output_embeddings()
    if output is not None and not _shares(output, trunk):
        ours |= {id(weight): weight for weight in output.parameters()}
    listed = {id(module) for one in (layers, *after) for module in one.modules()}
    below = [module for one in layers[:lower] for module in one.modules()]
    below += [module for module in trunk.modules() if id(module) not in listed]
    for module in below:
        shared = next((key for key, weight in module.named_parameters(recurse=False) if id(weight) in ours), None)
        if shared is not None:
            raise ValueError(
                f"model.train_layers: got {count}, but the top layers of {type(model).__name__} share the weight "
                f"{names[module]}.{shared} with those below, which are frozen; set model.train_layers to null"
            )
    for weight in model.parameters():
        if id(weight) not in ours and adapters_of(model) is None:
            weight.requires_grad_(False)
    trained = frozenset(key for key, weight in trunk.named_parameters() if id(weight) in ours and weight.requires_grad)
    places = tuple(names[module] for module in after)
    trunk.__dict__[TOP] = TopLayers(name, lower, places, trained, base, outputs)


def in_top(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return those names of a causal LM's modules that are in its trained layers, after them, or the output layer."""
    trunk = _trunk(model)
    top = top_of(trunk)
    if top is None:
        return list(names)
    layers = cast("nn.ModuleList", trunk.get_submodule(top.layers))
    roots = [*layers[top.lower :], *(trunk.get_submodule(place) for place in top.after)]
    inside = {id(module) for root in roots for module in root.modules()}
    output = model.get_output_embeddings()
    inside |= set() if output is None else {id(module) for module in output.modules()}
    return [name for name in names if id(model.get_submodule(name)) in inside]


def _trunk(model: PreTrainedModel) -> PreTrainedModel:
    return model if model.get_output_embeddings() is None else trunk_of(model)


def _shares(module: nn.Module, trunk: nn.Module) -> bool:
    """Return whether a module shares a weight with the trunk, as a tied output layer does."""
    theirs = {id(weight) for weight in trunk.parameters()}
    return any(id(weight) in theirs for weight in module.parameters())


def _layers_of(trunk: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the list of a trunk's layers and its name: the largest one with as many entries as the config has layers."""
    count = trunk.config.get_text_config().num_hidden_layers
    found = [(n, m) for n, m in trunk.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise ValueError(
            f"model.train_layers: the {count} layers of {type(trunk).__name__} are not in one list, so the top ones cannot be "
            "selected; set model.train_layers to null"
        )
    return max(found, key=lambda one: sum(weight.numel() for weight in one[1].parameters()))


@torch.no_grad()
def _probe(trunk: PreTrainedModel, layers: nn.ModuleList) -> tuple[list[nn.Module], tuple[int | None, ...]]:
    """Return the modules with weights that run only after the last layer, and `TopLayers.outputs`, from a short pass."""
    inside = {id(module) for module in layers.modules()}
    before: dict[nn.Module, None] = {}
    after: dict[nn.Module, None] = {}
    forms: dict[int, int | None] = {}
    handles = []

    def began(module: nn.Module, _: Any) -> None:
        (after if len(layers) - 1 in forms else before)[module] = None

    def ended(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            forms[number] = len(output) if isinstance(output, tuple | list) else None

        return hook

    for module in trunk.modules():
        if id(module) not in inside and module._parameters:
            handles.append(module.register_forward_pre_hook(began))
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(ended(number)))
    try:
        last_hidden(trunk, _ids(trunk)[:1, :5], compute_dtype=None, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [module for module in after if module not in before], tuple(forms.get(n) for n in range(len(layers)))


def _ids(trunk: PreTrainedModel) -> Tensor:  # (2, 8)
    ids = torch.arange(1, 9, device=trunk.device).remainder(input_layer(trunk).weight.shape[0])
    return torch.stack([ids, ids.flip(0)])


def train_all(model: nn.Module) -> None:
    """Let all weights of a copy of a model's trunk require gradients again."""
    model.requires_grad_(True)
    for module in model.modules():
        module.__dict__.pop(TOP, None)
