"""Whole tensors of sharded models, for checkpoints, through files and without gathering a model on any device.

Every rank writes its parts with torch.distributed.checkpoint, in safetensors. The first rank joins them, file to file, and maps
the joined file into memory. It then writes the project's checkpoint, which does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_engine import files
from rlhf_engine.distributed.ranks import Ranks, is_sharded

_WEIGHT, _STATE = "weight ", "state "


@contextmanager
def joined_parts(
    folder: Path, model: nn.Module, state: Mapping[str, Tensor], ranks: Ranks
) -> Iterator[Mapping[str, Tensor]]:
    """Let the first rank read whole tensors inside the context: the parameters of `model`, and the yielded `state`.

    They are in host memory, mapped from files in `folder`, which must not exist and is deleted at the end. On the other ranks
    nothing changes. All ranks must enter.

    Raises:
        OSError: a rank cannot write its parts.
    """
    weights = {f"{_WEIGHT}{name}": parameter.detach() for name, parameter in model.named_parameters()}
    sharded = {name: tensor for name, tensor in weights.items() if is_sharded(tensor)}
    sharded |= {f"{_STATE}{name}": tensor for name, tensor in state.items() if is_sharded(tensor)}
    if ranks.first and folder.exists():
        files.disk.delete(folder)  # of a run that was killed
    ranks.each(None)
    try:
        _write(folder, sharded)
        if not ranks.first:
            yield state
            return
        found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        with _replaced(model, {name.removeprefix(_WEIGHT): tensor for name, tensor in found.items()}):
            yield {name: found.get(f"{_STATE}{name}", tensor) for name, tensor in state.items()}
    finally:
        if ranks.first and folder.exists():
            files.disk.delete(folder)


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the parts of all ranks to `folder`/sharded, and whole tensors to `folder`."""
    # Inside the function, because these take a second to import.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # Scalars are not sharded; the writer would store a wrong value for one.
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{folder}: rank {rank} cannot write its part of the checkpoint: {cause}") from error


@contextmanager
def _replaced(model: nn.Module, whole: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the parameters of a model that have a name in `whole`, and those that are tied to them."""
    new = {
        parameter: nn.Parameter(whole[name], parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if name in whole
    }
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in new
    ]
    for module, name, parameter in places:
        module._parameters[name] = new[parameter]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
