"""The package for the kernels hub: its layout, and its results against the installed package."""

import base64
import hashlib
import importlib.util
import json
import re
import sys

import pytest
import torch

import rlhf_kernels
from benchmarks.kernels_hub import build, sources


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder and the ids of the variants."""
    folder = tmp_path_factory.mktemp("hub")
    return folder, build(folder)


@pytest.fixture(scope="module")
def loaded(built):
    """Return the variant for CPUs, imported as the hub's loader does: under its id, from its folder."""
    folder, ids = built
    name = ids["torch-cpu"]
    spec = importlib.util.spec_from_file_location(name, folder / "build/torch-cpu/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for one in [one for one in sys.modules if one.partition(".")[0] == name]:
        del sys.modules[one]


def test_the_layout_is_that_of_the_hub(built):
    folder, ids = built
    assert sorted(path.name for path in (folder / "build").iterdir()) == ["torch-cpu", "torch-cuda"] == sorted(ids)
    for variant, name in ids.items():
        root = folder / "build" / variant
        metadata = json.loads((root / "metadata.json").read_text())
        assert (metadata["id"], metadata["name"], metadata["version"]) == (name, "rlhf-kernels", 0)
        assert name.isidentifier() and metadata["backend"]["type"] == variant.removeprefix("torch-")
        files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
        digests = metadata["digest"]["files"]
        assert files.keys() - {"metadata.json"} == digests.keys() and "rlhf_kernels/__init__.py" in digests
        for path, digest in digests.items():
            assert base64.b64encode(hashlib.sha256(files[path].read_bytes()).digest()).decode() == digest
    assert len(set(ids.values())) == 2


def test_the_package_gives_the_results_of_the_installed_one(loaded):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    ids, old, advantages = torch.randint(0, 11, (6,)), torch.randn(6) - 2.0, torch.randn(6)
    mask = torch.tensor([True, True, False, True, True, True])
    found = {}
    for name, ops in (("hub", loaded), ("installed", rlhf_kernels)):
        loss = ops.linear_ppo_loss(hidden, weight, ids, old, advantages, mask, backend="reference").loss
        found[name] = [loss, *torch.autograd.grad(loss, (hidden, weight))]
        found[name] += ops.gae(
            torch.ones(2, 3), torch.randn(2, 3, generator=torch.Generator().manual_seed(1)), mask.view(2, 3)
        )
        found[name].append(ops.token_logprobs(torch.eye(4), torch.arange(4)).logprobs)
    for ours, theirs in zip(found["hub"], found["installed"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_it_shares_nothing_with_the_installed_package(loaded, built):
    name = built[1]["torch-cpu"]
    assert loaded.gae is not rlhf_kernels.gae and loaded.__all__ == rlhf_kernels.__all__
    assert hasattr(torch.ops, name) and loaded._native.AVAILABLE is False
    assert not [path for path, text in sources().items() if re.search(r"^\s*(from|import) rlhf_kernels", text, re.M)]


def test_older_loaders_find_the_package_in_the_folder_of_its_name(loaded, built):
    path = built[0] / "build/torch-cpu/rlhf_kernels/__init__.py"
    spec = importlib.util.spec_from_file_location("_older_loader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__all__ == loaded.__all__ and module.gae is loaded.gae


def test_the_loader_of_the_hub_reads_it(built, monkeypatch):
    kernels = pytest.importorskip("kernels")
    monkeypatch.delitem(sys.modules, built[1]["torch-cpu"], raising=False)
    module = kernels.get_local_kernel(built[0], backend="cpu")
    assert module.__all__ == rlhf_kernels.__all__
