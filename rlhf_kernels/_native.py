"""Loads the compiled extension `rlhf_kernels._C`, after torch.

The extension is linked against no OpenMP runtime: importing torch first puts torch's own into the process, and the
extension's parallel regions run on it. So there is one pool of threads, and `torch.set_num_threads` rules it.
"""

import importlib

import torch  # before _C, see above

from .rows import KL_ESTIMATORS, OBJECTIVES, LogitRows, PpoRows, RowStats, Sequences

try:
    _C = importlib.import_module("rlhf_kernels._C")
    _error = ""
except ImportError as error:
    _C = None
    _error = str(error)


AVAILABLE = _C is not None
"""Whether the extension was built and loads here."""


def why_missing() -> str:
    """Why the extension is not available."""
    return f"the extension rlhf_kernels._C does not load ({_error}); build it with `pip install .` or `make build`"


def isa() -> str:
    """The instruction set that the CPU kernels picked: "avx512", "avx2" or "baseline"."""
    return _C.isa()


# The number that csrc/math/common.h gives each dtype, and how many sums csrc/args.h counts.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NUM_SUMS = 20


def kernels():
    """The extension module; RuntimeError with the way to build it when it is missing."""
    if _C is None:
        raise RuntimeError(why_missing())
    return _C


def address(x: torch.Tensor | None) -> int:
    """Where the elements of a contiguous tensor begin; 0 for None."""
    if x is None:
        return 0
    assert x.is_contiguous(), "the kernels take contiguous tensors"
    return x.data_ptr()


def floats(x: torch.Tensor | None) -> int:
    """`address` of what the kernels read as float32."""
    assert x is None or x.dtype == torch.float32, "the kernels would read other bits as float32"
    return address(x)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty` for the large blocks of an op: on huge pages where the system has them."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if x.nbytes >= LARGE and x.device.type == "cpu" and _C is not None:
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


LARGE = 16 * 2**20
"""Bytes from which a block is worth the call."""


# ---- launchers: tensors to addresses -------------------------------------------------------------------------------


def _logit_rows(x: LogitRows):
    logits, t = x.logits, x.transform
    assert logits.stride(-1) == 1 or logits.shape[-1] == 1, "rows of logits are contiguous along the vocabulary"
    vocab = logits.shape[-1]
    n = logits.numel() // vocab
    inner, outer_stride = (n, 0) if logits.dim() == 2 else (logits.shape[1], logits.stride(0))
    per_row = t.temperature if isinstance(t.temperature, torch.Tensor) else None
    return _C.LogitRows(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        n,
        vocab,
        logits.stride(-2),
        max(inner, 1),
        outer_stride,
        address(x.ids),
        address(x.mask),
        1.0 if per_row is not None else t.temperature,
        address(per_row),
        t.softcap or 0.0,
        t.logit_scale,
    )


def _ppo_rows(x: PpoRows):
    s = x.scalars
    scalars = _C.PpoScalars(
        OBJECTIVES.index(s.objective),
        KL_ESTIMATORS.index(s.kl_estimator),
        s.cliprange,
        s.cliprange_high,
        s.dual_clip,
        s.log_ratio_clamp,
        s.old_kl_coef,
        s.kl_coef,
        s.entropy_coef,
        s.cliprange_value,
    )
    tensors = (x.old_logprobs, x.advantages, x.weights, x.ref_logprobs, x.row_weight)
    return _C.PpoRows(scalars, *map(floats, tensors))


def token_logprobs_forward(x: LogitRows, stats: RowStats) -> None:
    """Fills `stats`; masked rows get zeros."""
    _C.token_logprobs_forward(_logit_rows(x), address(stats.buffer))


def token_logprobs_backward(x: LogitRows, stats: RowStats, out: torch.Tensor, grad_logprobs, grad_entropy) -> None:
    """`out = grad_logprobs d logprob/d logits + grad_entropy d H/d logits`; `out` may be the logits."""
    packed = out.is_contiguous()
    assert packed or out.data_ptr() == x.logits.data_ptr(), "a gradient with strides is written over the logits only"
    gradients = map(floats, (grad_logprobs, grad_entropy))
    _C.token_logprobs_backward(_logit_rows(x), floats(stats.buffer), out.data_ptr(), packed, *gradients)


def ppo_epilogue(x: LogitRows, stats: RowStats, ppo: PpoRows) -> torch.Tensor:
    """Fills `stats` and turns the logits into their gradient where there is one; returns which rows those are, bool (N,)."""
    active = torch.empty(x.ids.numel(), dtype=torch.bool)
    _C.ppo_epilogue(_logit_rows(x), address(stats.buffer), _ppo_rows(ppo), address(active))
    return active


def compact_rows(x: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Fills the places of the unmarked rows of `x` from its end; returns which row lies at each of the front places."""
    order = active.nonzero().squeeze(1)
    kept = order.numel()
    holes = (~active[:kept]).nonzero().squeeze(1)
    if holes.numel():
        movers = order[-holes.numel() :].clone()
        _C.move_rows(address(x), address(holes), address(movers), holes.numel(), x.shape[1] * x.element_size())
        order = torch.arange(kept).index_copy_(0, holes, movers)
    return order


def ppo_loss(
    ppo: PpoRows,
    sequences: Sequences,
    sequence_level: bool,
    mask: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    values: torch.Tensor | None,
    old_values: torch.Tensor | None,
    returns: torch.Tensor | None,
    value_mask: torch.Tensor,
    value_row_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slope of each log-prob and of each value, times their denominators, and the sums of csrc/args.h (float64)."""
    slope = torch.empty_like(logprobs)
    value_slope = torch.empty_like(logprobs if values is not None else logprobs[:0])
    sums = torch.empty(NUM_SUMS, dtype=torch.float64)
    sequences.check(logprobs.numel())
    layout = (sequences.count, sequences.length, address(sequences.cu_seqlens))
    inputs = (address(mask), *map(floats, (logprobs, entropy, values, old_values, returns)))
    outputs = (floats(slope), floats(value_slope), address(sums))
    rows = (address(value_mask), floats(value_row_weight))
    _C.ppo_loss(_ppo_rows(ppo), logprobs.numel(), *layout, sequence_level, *inputs, *rows, *outputs)
    return slope, value_slope, sums


def accumulate(total: torch.Tensor, part: torch.Tensor, *, first: bool) -> None:
    """`total = part` (first) or `total += part`; `total` is float32."""
    _C.accumulate(address(total), address(part), DTYPES[part.dtype], part.numel(), first)


def scale_cast(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`x * scale`, rounded once to `dtype`; in the bytes of `x` where the dtype stays."""
    out = x if x.dtype == dtype else empty(x.shape, dtype, x.device)
    _C.scale_cast(address(x), DTYPES[x.dtype], address(out), DTYPES[dtype], x.numel(), scale)
    return out
