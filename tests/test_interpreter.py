"""The sped-up interpreter of Triton promotes types, keeps types and scans as the interpreter without the changes does."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from triton.language.semantic import IncompatibleTypeErrorImpl
from triton.runtime import interpreter

from benchmarks.gpu.interpreter import speed_up_interpreter
from rlhf_kernels._triton.scan import compose

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on a machine with a GPU")
speed_up_interpreter()

DTYPES = (
    *(tl.float64, tl.float32, tl.float16, tl.bfloat16, tl.int1, tl.int8, tl.int32, tl.int64, tl.uint8, tl.uint32),
    tl.pointer_type(tl.float32),
)
NUMBERS = (True, 0, 2, -1, 300, 2**40, 0.5, 1e-45)


def operand(dtype, shape):
    """Return a tensor of ones."""
    data = interpreter.np.ones(shape or (1,), dtype=interpreter._get_np_dtype(dtype))
    handle = interpreter.TensorHandle(data, dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)


def promoted(function, *arguments, **flags):
    """Return types and values of the promoted operands, or the error."""
    try:
        both = function(interpreter.interpreter_semantic, *arguments, **flags)
    except (IncompatibleTypeErrorImpl, TypeError, ValueError) as error:
        return type(error), str(error)
    return [(str(x.type), x.handle.data.dtype, x.handle.data.tolist()) for x in both]


@pytest.mark.parametrize("div_or_mod", [False, True])
@pytest.mark.parametrize("arithmetic_check", [False, True])
def test_operands_are_promoted_as_without_the_change(div_or_mod, arithmetic_check):
    fast = interpreter.TritonSemantic.binary_op_type_checking_impl
    flags = {"div_or_mod": div_or_mod, "arithmetic_check": arithmetic_check}
    tensors = [operand(dtype, shape) for dtype in DTYPES for shape in ((), (4,), (1, 4))]
    compared = 0
    for lhs, rhs in itertools.product([*tensors, *NUMBERS], repeat=2):
        ranks = {len(x.shape) for x in (lhs, rhs) if isinstance(x, tl.tensor)} - {0}
        if len(ranks) < 2:  # the interpreter cannot add an axis
            assert promoted(fast, lhs, rhs, **flags) == promoted(fast.__wrapped__, lhs, rhs, **flags), (lhs, rhs)
            compared += 1
    assert compared > 1000


def test_a_block_type_is_constructed_once_and_checked_each_time():
    assert tl.block_type(tl.float32, [4, 2]) is tl.block_type(tl.float32, (tl.constexpr(4), 2))
    kinds = {str(tl.block_type(dtype, shape)) for dtype in DTYPES for shape in ([4], [4, 2], [2, 4])}
    assert len(kinds) == 3 * len(DTYPES)
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [3])
        with pytest.raises(TypeError, match="0d"):
            tl.block_type(tl.float32, [])


@triton.jit
def scan_kernel(decay, own, out, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    _, scanned = tl.associative_scan((tl.load(decay + at), tl.load(own + at)), 1, compose, reverse=REVERSE)
    tl.store(out + at, scanned)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 8), (1, 16)])
def test_a_scan_combines_all_earlier_elements_in_their_order(shape, reverse):
    """The function is not commutative. All numbers are small multiples of powers of two, so that no operation rounds."""
    g = torch.Generator().manual_seed(0)
    decay = torch.randint(1, 3, shape, generator=g) / 2
    own, out = torch.randint(-8, 9, shape, generator=g).float(), torch.empty(shape)
    scan_kernel[(1,)](decay, own, out, reverse, *shape)
    expected = torch.empty(shape)
    order = range(shape[1])[::-1] if reverse else range(shape[1])
    later = torch.zeros(shape[0])
    for i in order:
        later = own[:, i] + decay[:, i] * later
        expected[:, i] = later
    assert torch.equal(out, expected)
