"""The test vectors of the page on advantages are the results of every backend that runs here, padded and packed."""

import json

import pytest
import torch

from rlhf_kernels import gae
from tests.docs.helpers.blocks import ROOT

CASES = json.loads((ROOT / "docs/guides/gae_vectors.json").read_text())["cases"]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_vector(case, backend):
    tokens = [torch.tensor([case["rewards"]], dtype=torch.float32), torch.tensor([case["values"]], dtype=torch.float32)]
    tokens.append(torch.tensor([case["mask"]], dtype=torch.bool))
    options = {name: case[name] for name in ("gamma", "lam", "value_lam", "holes")}
    options |= {"bootstrap": torch.tensor([case["bootstrap"]], dtype=torch.float32), "backend": backend}
    padded = gae(*tokens, **options)
    assert padded.advantages.tolist() == [case["advantages"]]
    assert padded.returns.tolist() == [case["returns"]]
    cu = torch.tensor([0, len(case["mask"])], dtype=torch.int32)
    packed = gae(*(x[0] for x in tokens), **options, cu_seqlens=cu)
    assert packed.advantages.tolist() == case["advantages"]
    assert packed.returns.tolist() == case["returns"]


def test_the_cases_have_holes_and_both_conventions():
    kinds = {case["holes"] for case in CASES if "101" in "".join(map(str, case["mask"])).replace("00", "0")}
    assert kinds == {"skip", "zero"} and len({case["name"] for case in CASES}) == len(CASES)
