"""Whole tensors of a sharded model, read by the first rank from files to which the ranks wrote their parts."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rlhf_engine.distributed import fsdp
from rlhf_engine.distributed.parts import joined_parts
from rlhf_engine.distributed.ranks import is_sharded, joined
from rlhf_engine.model import LanguageModel
from rlhf_engine.model.roles import Outputs
from rlhf_engine.model.trunk import input_layer, outermost_layers, output_layer
from tests.engine.helpers.ranks import on_ranks
from tests.engine.helpers.tiny_models import tiny

MOMENT = torch.arange(15.0).view(5, 3)  # 5 rows: the ranks have different numbers of them
STEP = torch.tensor(7.0)


def gathers(*_, **__):
    raise AssertionError("a whole tensor was gathered on a device")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each of two ranks saw of a sharded model and its optimizer's state, inside the context and after it."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "file").touch()

    def child(rank):
        with joined("cpu", 60.0) as ranks:
            model = LanguageModel(tiny("llama_tied", seed=0))
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            mesh = fsdp.make_mesh(1, 2, "cpu")
            fsdp.shard(model, outermost_layers(model.trunk), mesh, Outputs)
            state = {"0.exp_avg": distribute_tensor(MOMENT, mesh, [Shard(0)], src_data_rank=None), "0.step": STEP}
            before, unshard = DTensor.full_tensor, torch.distributed.fsdp.FSDPModule.unshard
            DTensor.full_tensor = torch.distributed.fsdp.FSDPModule.unshard = gathers
            with joined_parts(folder / "new", model, state, ranks) as whole:
                inside = {name: parameter.detach() for name, parameter in model.named_parameters()}
                seen = {
                    "sharded": sum(map(is_sharded, inside.values())),
                    "equal": inside.keys() == weights.keys()
                    and all(torch.equal(inside[name], weight) for name, weight in weights.items() if ranks.first),
                    "tied": input_layer(model.model).weight is output_layer(model.model).weight,
                    "state": {name: tensor.clone() for name, tensor in whole.items() if not is_sharded(tensor)},
                }
            DTensor.full_tensor, torch.distributed.fsdp.FSDPModule.unshard = before, unshard
            seen["after"] = sum(map(is_sharded, model.parameters())), len(weights)
            seen["weights"] = all(torch.equal(p.full_tensor(), weights[n]) for n, p in model.named_parameters())
            try:
                with joined_parts(folder / "file" / "new", model, state, ranks):
                    pass
            except OSError as error:
                seen["error"] = str(error)
            return seen

    ranks, codes, _ = on_ranks(2, child, folder)
    assert codes == [0, 0], (folder / "stderr").read_text()
    assert not (folder / "new").exists()
    return ranks


def test_the_first_rank_reads_whole_tensors_and_none_is_gathered_on_a_device(found):
    first, second = found
    assert first["sharded"] == 0
    assert first["equal"]
    assert first["tied"]
    assert first["state"].keys() == {"0.exp_avg", "0.step"}
    assert torch.equal(first["state"]["0.exp_avg"], MOMENT)
    assert first["state"]["0.step"] == STEP
    assert second["sharded"] == second["after"][1]


def test_the_model_is_sharded_again_afterwards(found):
    for rank in found:
        assert rank["after"][0] == rank["after"][1] > 0
        assert rank["weights"]


def test_a_rank_that_cannot_write_its_part_is_named_on_all_ranks(found):
    for rank in found:
        assert "rank 0 cannot write its part of the checkpoint" in rank["error"]
