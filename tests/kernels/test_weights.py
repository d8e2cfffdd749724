"""`QuantisedWeight`: values against plain loops, tiles, and invalid arguments."""

import pytest
import torch

from rlhf_kernels import QuantisedWeight, linear_ppo_loss
from rlhf_kernels.ops.weights import NF4

from .helpers.head_forms import int8_of, nf4_of, small_tiles
from .helpers.heads import make

V, H = 40, 24  # blocks of 64 codes begin and end within rows


def codes(seed: int = 0):
    """Return a byte for each pair of codes, and a scale per block of 64 codes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (V * H // 2,), generator=g, dtype=torch.uint8), torch.rand(V * H // 64, generator=g)


def test_the_table_has_the_quantiles_of_a_normal_distribution():
    """Dettmers et al. 2023, section 3: 8 and 9 quantiles on the two sides of 0, scaled to [-1, 1], as bitsandbytes has them."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat((above, below, torch.zeros(1, dtype=torch.float64))).sort().values / above.max()
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), expected, rtol=0, atol=1e-6)


def test_int8_values():
    values = torch.randint(-128, 128, (V, H), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales = torch.rand(V)
    got = QuantisedWeight.int8(values, scales).dequantised()
    for row in range(V):
        for column in range(H):
            assert got[row, column] == float(values[row, column]) * scales[row]


def test_nf4_values():
    packed, absmax = codes()
    weight = QuantisedWeight.nf4(packed, absmax, V, H)
    got, table = weight.dequantised().flatten(), torch.tensor(NF4)
    for i in range(V * H):
        byte = int(packed[i // 2])
        assert got[i] == table[byte >> 4 if i % 2 == 0 else byte & 15] * absmax[i // 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4, blocks of 8"])
def test_rows_are_rows_of_the_whole_weight(kind, dtype):
    if kind == "int8":
        weight = int8_of(torch.randn(V, H))
    else:
        block = 8 if "8" in kind else 64
        packed, _ = codes()
        weight = QuantisedWeight.nf4(packed, torch.rand(V * H // block), V, H, block=block)
    whole = weight.dequantised(dtype)
    assert whole.shape == weight.shape == (V, H) and len(weight) == V
    assert torch.equal(whole, weight.dequantised().to(dtype))  # computed in float32 and rounded once
    for begin, end in ((0, V), (0, 1), (1, 2), (3, 17), (39, 40), (5, 5)):
        assert torch.equal(weight.rows(begin, end, dtype), whole[begin:end]), (begin, end)
    assert torch.equal(weight.first(7).dequantised(dtype), whole[:7])


@pytest.mark.parametrize("of", [int8_of, nf4_of])
def test_tiles_cover_the_weight(monkeypatch, of):
    small_tiles(monkeypatch)
    weight = of(torch.randn(200, H))
    places, rows = zip(*weight.tiles(torch.bfloat16), strict=True)
    assert [(p.start, p.stop) for p in places] == [(0, 37), (37, 74), (74, 111), (111, 148), (148, 185), (185, 200)]
    assert torch.equal(torch.cat(rows), weight.dequantised(torch.bfloat16))
    monkeypatch.setattr("rlhf_kernels.ops.weights.TILE_BYTES", 1)
    assert len(list(weight.tiles(torch.float32))) == 200  # at least one row per tile


@pytest.mark.parametrize("of", [int8_of, nf4_of])
def test_the_weight_has_no_gradient(of):
    """Scales that require a gradient are constants."""
    leaves, constants, _ = make(0, vocabulary=200)
    made = of(leaves["weight"])
    scales = made.scales.clone().requires_grad_()
    if made.block:
        weight = QuantisedWeight.nf4(made.values, scales, *made.shape)
    else:
        weight = QuantisedWeight.int8(made.values, scales)
    hidden = leaves["hidden"].clone().requires_grad_()
    linear_ppo_loss(hidden, weight, **constants).loss.backward()
    assert scales.grad is None and not weight.dequantised().requires_grad and hidden.grad.abs().max() > 0


INT8, PACKED, ABSMAX = torch.zeros(V, H, dtype=torch.int8), *codes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INT8.float(), torch.ones(V)), "values: got dtype torch.float32, expected torch.int8"),
        ((INT8[0], torch.ones(V)), r"values: got shape \(24\), expected \[V, H\]"),
        ((INT8[:0], torch.ones(0)), r"values: got shape \(0, 24\), expected V >= 1 and H >= 1"),
        ((INT8, torch.ones(V, 1)), r"scales: got shape \(40, 1\), expected \(40,\) = \[V\]"),
        ((INT8, torch.ones(V).int()), "scales: got dtype torch.int32"),
        ((INT8, 1.0), r"scales: got float, expected a tensor of shape \[V\]"),
        (("no", torch.ones(V)), r"values: got str, expected a tensor of shape \[V, H\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_in_int8_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantisedWeight.int8(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": PACKED[1:]}, r"packed: got 479 bytes, expected V \* H / 2 = 480"),
        ({"packed": PACKED.int()}, "packed: got dtype torch.int32, expected torch.uint8"),
        ({"absmax": ABSMAX[1:]}, r"absmax: got shape \(14\), expected \(15,\) = \[V \* H / block\]"),
        ({"absmax": ABSMAX.byte()}, "absmax: got dtype torch.uint8"),
        ({"block": 50}, r"block: got 50, expected an even number that divides V \* H = 960"),
        ({"block": 15}, "block: got 15, expected an even number"),
        ({"vocabulary": 0}, "vocabulary: got 0, expected at least 1"),
        ({"hidden": 24.0}, "hidden: got 24.0, expected an integer"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_in_nf4_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        QuantisedWeight.nf4(**{"packed": PACKED, "absmax": ABSMAX, "vocabulary": V, "hidden": H} | change)
