"""`decode_attention`: against float64, and that the bits of a row do not depend on the batch."""

import pytest
import torch

from rlhf_kernels import decode_attention
from rlhf_kernels.backend import choose

SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 4, 2, 7, 8),
    (5, 6, 2, 70, 40),
    (4, 2, 1, 600, 20),
    (2, 8, 8, 33, 64),
    (2, 4, 2, 50, 129),
]


def make(rows, heads, groups, width, size, dtype=torch.float32, seed=0):
    """Return query, keys, values and mask; the mask of each row is a random window of columns."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, size, generator=generator).to(dtype)
    keys, values = (torch.randn(rows, groups, width, size, generator=generator).to(dtype) for _ in range(2))
    last = torch.randint(0, width, (rows, 1), generator=generator)
    first = (last * torch.rand(rows, 1, generator=generator)).long() * (torch.arange(rows)[:, None] % 2)
    column = torch.arange(width)
    return query, keys, values, (column <= last) & (column >= first)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(shape, dtype):
    """The error is at most twice the error of eager attention in the same dtype, plus 2 eps of the largest output."""
    query, keys, values, mask = make(*shape, dtype)
    exact = decode_attention(*(x.double() for x in (query, keys, values)), mask, scale=0.3)
    eager = decode_attention(query, keys, values, mask, scale=0.3, backend="reference")
    ours = decode_attention(query, keys, values, mask, scale=0.3)
    assert ours.dtype == dtype
    allowed = 2 * (eager - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


def test_by_hand():
    """Two columns have the weights 1/4 and 3/4; the third is masked."""
    keys = torch.tensor([[0.0], [float(torch.tensor(3.0).log())], [50.0]]).view(1, 1, 3, 1)
    values = torch.tensor([[8.0], [4.0], [1e9]]).view(1, 1, 3, 1)
    out = decode_attention(torch.ones(1, 1, 1), keys, values, torch.tensor([[True, True, False]]), scale=1.0)
    assert out.item() == pytest.approx(0.25 * 8 + 0.75 * 4, rel=1e-6)
    out = decode_attention(torch.ones(1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 2).bool())
    assert out.tolist() == [[[1.0] * 4] * 2]


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_row_depends_only_on_its_unmasked_columns(shape):
    query, keys, values, mask = make(*shape)
    whole = decode_attention(query, keys, values, mask)
    for row in range(len(query)):
        end = int(mask[row].nonzero().max()) + 1
        for padded in (end, end + 3):
            # The same row in a different slot, with a different width, stride and alignment.
            room = torch.full((3, 2, *keys.shape[1:2], padded, keys.shape[3] + 1), float("nan"))
            room[1, :, :, :end, 1:] = torch.stack((keys[row, :, :end], values[row, :, :end]))
            shown = torch.zeros(1, padded, dtype=torch.bool)
            shown[0, :end] = mask[row, :end]
            alone = decode_attention(query[row : row + 1], room[1:2, 0, ..., 1:], room[1:2, 1, ..., 1:], shown)
            assert torch.equal(alone[0], whole[row])


def test_bits_do_not_depend_on_threads():
    arguments = make(64, 8, 2, 90, 64)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(decode_attention(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_masked_columns_do_not_matter(backend):
    query, keys, values, mask = make(3, 4, 2, 20, 8)
    clean = decode_attention(query, keys, values, mask, backend=backend)
    for x in (keys, values):
        x.masked_fill_(~mask[:, None, :, None], float("nan"))
    assert torch.equal(decode_attention(query, keys, values, mask, backend=backend), clean)
    assert decode_attention(query, keys, values, mask & False, backend=backend).isnan().all()


def test_opcheck():
    query, keys, values, mask = make(3, 4, 2, 20, 8)
    op = torch.ops.rlhf_kernels.decode_attention.default
    torch.library.opcheck(op, (query, keys, values, mask, 0.5, "cpu"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": torch.zeros(2, 4)}, r"query: got shape \(2, 4\), expected \[R, heads, D\]"),
        ({"keys": torch.zeros(2, 3, 5, 8)}, "keys: got 3 groups for 4 heads of query, expected a divisor"),
        ({"values": torch.zeros(2, 2, 6, 8)}, r"values: got shape \(2, 2, 6, 8\), expected \(2, 2, 5, 8\)"),
        ({"values": torch.zeros(2, 2, 5, 8).half()}, "values: got dtype torch.float16, expected torch.float32"),
        ({"mask": torch.ones(2, 5)}, "mask: got dtype torch.float32, expected torch.bool"),
        ({"scale": float("inf")}, "scale: got inf, expected a finite number"),
        ({"backend": "triton"}, "decode_attention has no triton kernel, only one for CPU tensors"),
        ({"backend": "cuda"}, "decode_attention has no cuda kernel, only one for CPU tensors"),
    ],
)
def test_invalid_arguments_raise(changes, words):
    shapes = {"query": (2, 4, 8), "keys": (2, 2, 5, 8), "values": (2, 2, 5, 8)}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()} | {"mask": torch.ones(2, 5).bool()}
    if "keys" in changes:
        changes = changes | {"values": changes["keys"]}
    with pytest.raises(ValueError, match=words):
        decode_attention(**arguments | changes)


def test_auto_is_the_reference_on_a_gpu():
    choice = choose("decode_attention", torch.device("cuda"), torch.float32)
    assert choice.backend == "reference" and "only kernel is for CPU" in choice.reason
