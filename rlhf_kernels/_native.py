"""Loads the compiled extension `rlhf_kernels._C`, after torch, and turns tensors into what it takes: addresses.

The extension is linked against no OpenMP runtime: importing torch first puts torch's own into the process, and the
extension's parallel regions run on it. So there is one pool of threads, and `torch.set_num_threads` rules it.
"""

import importlib

import torch  # before _C, see above

from .launch_args import KL_ESTIMATORS, OBJECTIVES, LogitRows, PpoRows

try:
    _C = importlib.import_module("rlhf_kernels._C")
    _error = ""
except ImportError as error:
    _C = None
    _error = str(error)


AVAILABLE = _C is not None
"""Whether the extension was built and loads here."""

# The number that csrc/math/common.h gives each dtype, and how many sums csrc/args.h counts.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NUM_SUMS = 20


def why_missing() -> str:
    """Why the extension is not available."""
    return f"the extension rlhf_kernels._C does not load ({_error}); build it with `pip install .` or `make build`"


def extension():
    """The extension module; RuntimeError with the way to build it when it is missing."""
    if _C is None:
        raise RuntimeError(why_missing())
    return _C


def address(x: torch.Tensor | None) -> int:
    """Where the elements of a contiguous tensor begin; 0 for None."""
    assert x is None or x.is_contiguous(), "the kernels take contiguous tensors"
    return 0 if x is None else x.data_ptr()


def floats(x: torch.Tensor | None) -> int:
    """`address` of what the kernels read as float32."""
    assert x is None or x.dtype == torch.float32, "the kernels would read other bits as float32"
    return address(x)


LARGE = 16 * 2**20
"""Bytes from which a block is worth asking for huge pages."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty` for the large blocks of an op: on huge pages where the system has them."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if x.nbytes >= LARGE and x.device.type == "cpu" and _C is not None:
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


def logit_rows(x: LogitRows):
    logits, t = x.logits, x.transform
    assert logits.stride(-1) == 1 or logits.shape[-1] == 1, "rows of logits are contiguous along the vocabulary"
    per_row = t.temperature if isinstance(t.temperature, torch.Tensor) else None
    return _C.LogitRows(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        *x.layout(),
        address(x.ids),
        address(x.mask),
        1.0 if per_row is not None else t.temperature,
        address(per_row),
        t.softcap or 0.0,
        t.logit_scale,
    )


def ppo_rows(x: PpoRows):
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


def gae_args(rewards, values, mask, gamma, lam, bootstrap, skip_holes, cu_seqlens, advantages, returns):
    """The tensors stay the caller's to keep alive."""
    b, t = (cu_seqlens.numel() - 1, 0) if rewards.dim() == 1 else rewards.shape
    return _C.GaeArgs(
        rewards.numel(), b, t, address(cu_seqlens), address(rewards), address(values), address(mask), address(bootstrap),
        gamma, lam, skip_holes, address(advantages), address(returns),
    )  # fmt: skip
