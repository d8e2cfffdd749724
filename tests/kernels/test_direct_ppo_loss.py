"""`ppo_loss` of eager CPU tensors in one call of the extension has the bits of the registered op."""

import pytest
import torch

from rlhf_kernels import _native, ppo_loss
from rlhf_kernels._options import PPOArguments
from rlhf_kernels.launch_args import PpoScalars
from rlhf_kernels.ops import direct_ppo_loss

B, T = 5, 9
CASES = {
    "clip": {},
    "every term": {
        "values": "values",
        "entropy": "entropy",
        "entropy_coef": 0.1,
        "kl_coef": 0.05,
        "cliprange_high": 0.3,
    },
    "value mask": {"values": "values", "value_mask": True, "cliprange_value": None},
    "weights": {"weights": True, "dual_clip": 3.0},
    "sequence ratio": {"ratio_level": "sequence"},
    "gmpo": {"objective": "gmpo"},
    "dppo": {"objective": "dppo_kl", "divergence": 0.1},
    "seq_mean_token_mean": {"aggregation": "seq_mean_token_mean", "values": "values", "num_sequences": 7.0},
    "seq_mean_token_sum": {"aggregation": "seq_mean_token_sum"},
    "token_sum": {"aggregation": "token_sum", "values": "values"},
    "global counts": {"num_tokens": 100, "num_value_tokens": torch.tensor(70.0), "values": "values"},
}


def inputs(dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)

    def numbers():
        return torch.randn(B, T, generator=generator).to(dtype)

    mask = torch.rand(B, T, generator=generator) > 0.3
    leaves = {"logprobs": -numbers().abs(), "values": numbers(), "entropy": numbers().abs()}
    fixed = {"old_logprobs": leaves["logprobs"] + 0.2 * numbers(), "advantages": numbers(), "mask": mask}
    more = {"returns": numbers(), "old_values": numbers(), "ref_logprobs": -numbers().abs(), "weights": numbers().abs()}
    value_mask = torch.rand(B, T, generator=generator) > 0.5
    found = {name: value for name, value in options.items() if name not in ("weights", "value_mask")}
    used = {"logprobs"} | {name for name, value in options.items() if value == name}
    if "values" in used:
        found |= {"returns": more["returns"], "old_values": more["old_values"]}
    if options.get("kl_coef"):
        found["ref_logprobs"] = more["ref_logprobs"]
    if options.get("weights"):
        found["weights"] = more["weights"]
    if options.get("value_mask"):
        found["value_mask"] = value_mask
    return {name: leaves[name] for name in used}, fixed, {name: x for name, x in found.items() if name not in used}


def results(leaves, fixed, options, upstream):
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    loss, metrics = ppo_loss(**leaves, **fixed, **options)
    gradients = torch.autograd.grad(loss * upstream, list(leaves.values()))
    return loss.detach(), torch.stack(list(metrics.values())), *gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_both_paths_have_the_same_bits(monkeypatch, name, dtype):
    leaves, fixed, options = inputs(dtype, **CASES[name])
    direct = results(leaves, fixed, options, 0.7)
    called = []
    monkeypatch.setattr(direct_ppo_loss, "serves", lambda *_: called.append(1) is not None)
    registered = results(leaves, fixed, options, 0.7)
    assert called and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(direct, registered, strict=True))


def test_packed_and_strided_tensors(monkeypatch):
    leaves, fixed, options = inputs(values="values")
    offsets = torch.tensor([0, 20, 45], dtype=torch.int32)
    packed = [
        {name: x.flatten() if isinstance(x, torch.Tensor) and x.dim() == 2 else x for name, x in part.items()}
        for part in (leaves, fixed, options)
    ]
    strided = [
        {name: x.repeat_interleave(2, 1)[:, ::2] if isinstance(x, torch.Tensor) else x for name, x in part.items()}
        for part in (leaves, fixed, options)
    ]
    packed[2]["cu_seqlens"], packed[2]["aggregation"] = offsets, "seq_mean_token_mean"
    for case in (packed, strided):
        direct = results(*case, 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(direct_ppo_loss, "serves", lambda *_: False)
            assert all(torch.equal(a, b) for a, b in zip(direct, results(*case, 1.0), strict=True))


def test_a_second_backward_and_second_derivatives_raise():
    leaves, fixed, options = inputs()
    logprobs = leaves["logprobs"].requires_grad_()
    loss = ppo_loss(logprobs, **fixed, **options).loss
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, logprobs, create_graph=True)
    loss = ppo_loss(logprobs, **fixed, **options).loss
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_scalars_are_cached_for_each_extension(monkeypatch):
    """The emulator of CUDA replaces the extension, whose records have a different type."""
    leaves, fixed, options = inputs()
    results(leaves, fixed, options, 1.0)
    scalars = []

    class Extension:
        class PpoScalars:
            def __init__(self, **values):
                scalars.append(values)

    monkeypatch.setattr(_native, "_C", Extension)
    found = _native.ppo_scalars(PpoScalars.of(PPOArguments()))
    assert isinstance(found, Extension.PpoScalars) and len(scalars) == 1
    assert _native.ppo_scalars(PpoScalars.of(PPOArguments())) is found
