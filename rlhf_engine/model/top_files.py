"""A folder with the trained top layers of a model, and the fingerprint of the model that has the layers below.

A checkpoint of a run that trains only the top layers is such a folder, so that it does not repeat the frozen weights. The
result of a finished run is a complete model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rlhf_engine.files import read_tensors, require, write_json
from rlhf_engine.model.adapter_files import Base, check_base
from rlhf_engine.model.pretrained import TOP_RECORD, base_folder

TOP_WEIGHTS = "top_layers.safetensors"


def write_top(folder: Path, tensors: Iterable[tuple[str, Tensor]], base: Base) -> None:
    """Write the trained weights of a model, by their names in it, into an existing folder."""
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors}
    save_file(stored, folder / TOP_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / TOP_RECORD, {"base": base.folder, "base_fingerprint": base.fingerprint})


def read_top(folder: Path) -> Mapping[str, Tensor]:
    """Return the trained weights that `write_top` wrote.

    Raises:
        ValueError: a file is missing or broken, or the weights of the model below have changed since.
    """
    require(folder, TOP_WEIGHTS, TOP_RECORD)
    check_base(folder, Base.of(base_folder(folder)), TOP_RECORD, "the top layers belong")
    return read_tensors(folder / TOP_WEIGHTS)
