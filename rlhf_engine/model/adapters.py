"""Low-rank adapters of several roles on one frozen model, through peft. A switch selects the active one without a copy.

An adapter changes the product of a linear layer to `W x + s B A x`, where A (R, I) and B (O, R) are trained and W (O, I) is
frozen. A and B have the dtype of W. At most one adapter is active; adapters may differ in their ranks and layers.
Legend: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_engine.config import AdapterConfig
from rlhf_engine.model.adapter_files import Base, StoredAdapter, read_adapter, write_adapter
from rlhf_engine.model.adapter_targets import linear_layers, target_layers, top_targets
from rlhf_engine.model.merging import merged_bytes, sums_in_place
from rlhf_engine.model.pretrained import ADAPTER, base_folder
from rlhf_engine.model.quantised import quant_of
from rlhf_engine.model.roles import POLICY
from rlhf_engine.model.top_layers import top_of_model
from rlhf_engine.model.trunk import ADAPTERS, adapters_of


class Adapters:
    """The adapters of one model. `default` names the one that is active outside of `using`; None: none.

    The model is changed: its weights are frozen, and the linear layers that `settings.targets` names become peft's layers.

    `settings.lr_scale` is that of all adapters. `base` is needed to save them.

    Raises:
        ValueError: the rank is 0, the model has adapters already, peft is not installed, or the targets match no linear layer.
    """

    default: str | None = None

    def __init__(self, model: PreTrainedModel, settings: AdapterConfig, base: Base | None = None) -> None:
        if settings.rank == 0:
            raise ValueError("adapter.rank: got 0, expected at least 1")
        if adapters_of(model) is not None:
            raise ValueError(f"model: got a {type(model).__name__} that has adapters already; add roles to those")
        self.model, self.settings, self.base = model, settings, base
        target_layers(model, settings.targets)
        self.places: dict[str, list[str]] = {}
        """Names of the layers of every adapter."""
        self.settings_of: dict[str, AdapterConfig] = {}
        """Settings of every adapter."""
        self.layers: list[Any] = []
        self.active: str | None = None
        self._applied: str | None = None
        self._trained: set[str] = set()
        model.requires_grad_(False)
        model.__dict__[ADAPTERS] = self

    @classmethod
    def like(cls, model: PreTrainedModel, found: StoredAdapter) -> Self:
        """Return adapters for `model` with the settings of a stored one; ValueError names the file with the settings."""
        try:
            return cls(model, found.settings, found.base)
        except ValueError as error:
            raise ValueError(f"{found.folder / ADAPTER}: {error}") from None

    @classmethod
    def start(
        cls, model: PreTrainedModel, settings: AdapterConfig, seed: int, base: Base | str | Path | None = None
    ) -> Self:
        """Add a new adapter of the policy to `model`, which is trained from here on, and return the model's adapters.

        `base` is the folder of the model, which is needed to save the adapter. After `train_top`, only the top layers have
        adapters, of all roles.
        """
        if top_of_model(model) is not None:
            settings = replace(settings, targets=tuple(top_targets(model, settings.targets)))
        adapters = cls(model, settings, Base.of(base) if isinstance(base, str | Path) else base)
        adapters.add(POLICY, seed, trained=True)
        adapters.make_default(POLICY)
        return adapters

    # ---- roles ----

    @property
    def names(self) -> Collection[str]:
        """Names of the adapters."""
        return self.places.keys()

    def add(
        self,
        name: str,
        start: Mapping[str, Tensor] | int,
        *,
        trained: bool,
        source: object = "start",
        settings: AdapterConfig | None = None,
    ) -> None:
        """Add the adapter of a role.

        Args:
            name: name of the role.
            start: its first tensors, or the seed of a new adapter, with which the model computes what it did without.
            trained: whether the adapter requires gradients.
            source: where `start` comes from, for errors.
            settings: rank, scale and targets; None: those of the adapters.
        """
        assert name not in self.names
        self._inject(name, settings or self.settings)
        if trained:
            self._trained.add(name)
        for one in self.names:
            for tensor in self.tensors(one).values():
                tensor.requires_grad_(one in self._trained)
        if isinstance(start, int):
            self._initialise(name, start)
        else:
            self.copy(name, start, source)
        self.active = ""  # of no role, so that the next line switches every layer
        self._switch(self.default)

    def make_default(self, name: str | None) -> None:
        """Let an adapter be active outside of `using`; None: none."""
        self.default = name
        self._switch(name)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Use one adapter inside the `with` block; None uses the model without adapters."""
        before = self.active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """Return the matrices of an adapter by their names in peft's files without the prefix."""
        ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
        return {
            f"{full.removesuffix(f'.{name}.weight')}.weight": tensor
            for full, tensor in self.model.named_parameters()
            if full.endswith(ends)
        }

    @torch.no_grad()
    def copy(self, name: str, tensors: Mapping[str, Tensor], source: object) -> None:
        """Copy `tensors` into an adapter.

        Raises:
            ValueError: a tensor is missing, unknown or has a different shape. The message names `source` and the tensor.
        """
        ours = self.tensors(name)
        for key in sorted(ours.keys() | tensors.keys()):
            expected = tuple(ours[key].shape) if key in ours else None
            got = tuple(tensors[key].shape) if key in tensors else None
            if got != expected:
                raise ValueError(f"{source}: got {got} for {key} of the adapter, expected {expected}")
        for key, tensor in ours.items():
            tensor.copy_(tensors[key])

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Add an adapter to the weights for good, remove all adapters from the model, and let all weights require gradients.

        The sum is rounded once to the dtype of the weights.

        Raises:
            ValueError: the weights are quantised.
        """
        if (quant := quant_of(self.model)) != "none":
            raise ValueError(
                f"model.quant: got {quant!r}, expected 'none' to merge an adapter: quantised weights cannot be changed; "
                "`rlhf merge` adds it to the weights of the model's folder"
            )
        for place in dict.fromkeys(place for places in self.places.values() for place in places):
            layer: Any = self.model.get_submodule(place)
            if place in self.places[name]:
                layer.merge(adapter_names=[name])
            parent, _, last = place.rpartition(".")
            setattr(self.model.get_submodule(parent), last, layer.get_base_layer())
        del self.model.__dict__[ADAPTERS]
        self.model.__dict__.pop("peft_config", None)
        self.model.requires_grad_(True)

    def go_on(self, settings: AdapterConfig, source: object) -> None:
        """Train an adapter of the policy that was read from the folder `source` with the learning rate of `settings`.

        Raises:
            ValueError: its rank, scale or targets are others than those of `settings`.
        """
        self.settings = replace(self.settings, lr_scale=settings.lr_scale)
        self._scale_rate(POLICY)
        for key in ("rank", "alpha", "rslora"):
            got, expected = getattr(settings, key), getattr(self.settings_of[POLICY], key)
            if got != expected:
                raise ValueError(f"adapter.{key}: got {got}, expected {expected}, that of the adapter in {source}")
        if top_targets(self.model, settings.targets) != self.places[POLICY]:
            got, expected = (", ".join(names) for names in (settings.targets, self._shortest_targets(POLICY)))
            where = "" if top_of_model(self.model) is None else " in the layers of model.train_layers"
            raise ValueError(
                f"adapter.targets: got {got}{where}, expected {expected}, those of the adapter in {source}"
            )

    # ---- sampling ----

    def merged_bytes(self, name: str) -> int:
        """Return the bytes that `merged` allocates; raise ValueError if the weights of a layer are quantised."""
        return merged_bytes(self._layers_of(name), name)

    @contextmanager
    def merged(
        self, name: str, allocate: Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
    ) -> Iterator[None]:
        """Use the sums `W + s B A` of an adapter, in memory from `allocate`, as the weights inside the `with` block.

        The adapter counts as active there, and a switch to a different one raises RuntimeError.
        """
        before = self.active
        with sums_in_place(self._layers_of(name), name, allocate):
            self._applied, self.active = name, ""
            try:
                self._switch(name)
                yield
            finally:
                self._applied, self.active = None, ""
                self._switch(before)

    def _layers_of(self, name: str) -> dict[str, Any]:
        return {place: self.model.get_submodule(place) for place in self.places[name]}

    # ---- files ----

    def save(self, folder: Path, name: str) -> None:
        """Write an adapter into an existing folder in peft's format.

        Raises:
            ValueError: the folder of the model is not known.
        """
        if self.base is None:
            raise ValueError("adapters: the folder of their model is not known; pass it to Adapters.start as base")
        settings = replace(self.settings_of[name], targets=self._shortest_targets(name))
        transposed, quant = self._transposed(name), quant_of(self.model)
        write_adapter(folder, settings, self.tensors(name), self.base, fan_in_fan_out=transposed, quant=quant)

    def has_base(self, folder: str | Path) -> bool:
        """Return whether the adapter in a folder belongs to this model."""
        return self.base is not None and self.base.fingerprint == Base.of(base_folder(folder)).fingerprint

    def read(self, folder: Path) -> StoredAdapter:
        """Return an adapter that `save` wrote for this model.

        Raises:
            ValueError: a file is missing or broken, or the adapter belongs to a different model.
        """
        found = read_adapter(folder)
        if self.base is not None:
            check_same_base(found, self.base)
        return found

    # ---- layers ----

    def _inject(self, name: str, settings: AdapterConfig) -> None:
        self.places[name], self.settings_of[name] = target_layers(self.model, settings.targets), settings
        lora = import_peft().LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(self.places[name]),
            use_rslora=settings.rslora,
            lora_dropout=0.0,
            fan_in_fan_out=isinstance(linear_layers(self.model)[self.places[name][0]], Conv1D),
        )
        # peft creates the matrices in torch's dtype, and converts them to that of the layer unless the layer is quantised.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _default_dtype(self.model.dtype):
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            import_peft().inject_adapter_in_model(lora, self.model, name)
        self._scale_rate(name)
        everywhere = dict.fromkeys(place for places in self.places.values() for place in places)
        self.layers = [self.model.get_submodule(place) for place in everywhere]
        from rlhf_engine.model.low_rank import fuse_products  # it imports peft

        fuse_products(self.layers)

    def _scale_rate(self, name: str) -> None:
        for tensor in self.tensors(name).values():
            tensor.lr_scale = self.settings.lr_scale  # pyright: ignore[reportAttributeAccessIssue]  # for the optimizer

    def _initialise(self, name: str, seed: int) -> None:
        """Draw A from U(-1/sqrt(I), 1/sqrt(I)), as peft does, and set B to 0."""
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in self.tensors(name).items():
            if ".lora_B." in key:
                nn.init.zeros_(tensor)
            else:
                drawn = torch.empty(tensor.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                tensor.data.copy_(drawn)

    def _switch(self, name: str | None) -> None:
        # peft's own switch also changes `requires_grad`, and a parameter without it gets no gradient in a later backward pass.
        if name == self.active:
            return
        assert name is None or name in self.names
        if self._applied not in (None, name):
            raise RuntimeError(f"adapters: cannot switch to {name!r} while the weights contain {self._applied!r}")
        used = [] if name in (None, self._applied) else [name]
        for layer in self.layers:
            layer._disable_adapters, layer._active_adapter = not used, used
        self.active = name

    def _shortest_targets(self, name: str) -> tuple[str, ...]:
        """Return the last parts of the layers' names, or the whole names if other linear layers end in the same way."""
        places = self.places[name]
        ends = tuple(sorted({place.rpartition(".")[2] for place in places}))
        same = [one for one in linear_layers(self.model) if one.rpartition(".")[2] in ends]
        return ends if sorted(same) == sorted(places) else tuple(sorted(places))

    def _transposed(self, name: str) -> bool:
        """Return whether the layers of an adapter store W as (I, O), as those of GPT-2 do."""
        layer = linear_layers(self.model)[self.places[name][0]]
        return isinstance(layer, Conv1D) or getattr(layer, "fan_in_fan_out", False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create tensors without a dtype in `dtype` inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_same_base(found: StoredAdapter, base: Base) -> None:
    """Raise ValueError unless an adapter that was read belongs to `base`."""
    if found.base.fingerprint != base.fingerprint:
        raise ValueError(
            f"{found.folder}: got an adapter of {found.base.folder}, expected one of {base.folder}, whose weights differ"
        )


def import_peft() -> Any:
    """Import and return peft, which only adapters need.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"adapter.rank: adapters need peft, which cannot be imported; run pip install 'rlhf-kernels[adapters]' ({error})"
        ) from None
    return peft
