"""The compiled extension `rlhf_kernels._C`: how it is loaded, its arguments, and the workspace for chunks of logits.

The extension is not linked against an OpenMP runtime. Importing torch first loads torch's runtime, which then also runs the
extension's parallel regions, so that there is one thread pool and `torch.set_num_threads` sets its size.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # must be imported before _C, see above
from torch import Tensor

from .launch_args import SUMS, LogitRows, PpoRows, PpoScalars, Sequences

if TYPE_CHECKING:
    import rlhf_kernels._C as native


def _load():  # no return annotation: the type of the module in _C.pyi has no name
    """Return (extension, ""), or (None, reason) if it cannot be imported."""
    try:
        import rlhf_kernels._C as module
    except ImportError as error:
        return None, str(error)
    return module, ""


_C, _error = _load()
AVAILABLE = _C is not None
"""Whether the extension is built and can be imported."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The code of each dtype in csrc/math/common.h."""
NUM_SUMS = len(SUMS)


def why_missing() -> str:
    """Return why the extension is not available, and how to build it."""
    root = Path(__file__).parents[1]
    if (root / "setup.py").is_file():
        advice = (
            f"Python imports the sources in {root}, where it is not built; run `pip install -e {root}`, or start Python in a "
            "different folder"
        )
    else:
        advice = "install the package again"
    return f"the extension rlhf_kernels._C does not load ({_error}): {advice}"


def extension():  # no return annotation, see _load
    """Return the extension module.

    Raises:
        RuntimeError: it cannot be imported; the message states how to build it.
    """
    if _C is None:
        raise RuntimeError(why_missing())
    return _C


def address(x: torch.Tensor | None) -> int:
    """Return the address of the first element of a contiguous tensor; 0 for None."""
    assert x is None or x.is_contiguous(), "the kernels take contiguous tensors"
    return 0 if x is None else x.data_ptr()


def floats(x: torch.Tensor | None) -> int:
    """Return the `address` of a float32 tensor; 0 for None."""
    assert x is None or x.dtype == torch.float32, f"the kernel reads float32, not {x.dtype}"
    return address(x)


LARGE = 16 * 2**20
"""Smallest size in bytes of a block that is placed on huge pages."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `torch.empty(...)`; a large CPU block is placed on huge pages if the system has them."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if x.nbytes >= LARGE and x.device.type == "cpu" and _C is not None:
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


def logit_rows(x: LogitRows) -> "native.LogitRows":
    """Return the extension's record of `x`; the caller keeps the tensors alive."""
    logits, t = x.logits, x.transform
    assert _C is not None
    unit = logits.stride(-1) == 1 or logits.shape[-1] == 1 or not logits.numel()
    assert unit, "rows of logits must be contiguous along the vocabulary"
    n, vocab, row_stride, inner, outer_stride = x.layout()
    return _C.LogitRows(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        n=n,
        vocab=vocab,
        row_stride=row_stride,
        inner=inner,
        outer_stride=outer_stride,
        ids=address(x.ids),
        mask=address(x.mask),
        temperature=t.temperature,
        temperatures=address(t.temperatures),
        softcap=t.softcap or 0.0,
        logit_scale=t.logit_scale,
    )


def ppo_rows(x: PpoRows) -> "native.PpoRows":
    """Return the extension's record of `x`; the caller keeps the tensors alive."""
    assert _C is not None
    addresses = {name: floats(tensor) for name, tensor in x.tensors().items()}
    return _C.PpoRows(scalars=ppo_scalars(x.scalars), **addresses)


def ppo_scalars(x: PpoScalars) -> "native.PpoScalars":
    """Return the extension's record of the scalars."""
    return _ppo_scalars(_C, x)


@lru_cache(maxsize=256)
def _ppo_scalars(extension: Any, x: PpoScalars) -> "native.PpoScalars":
    """Return the record of `extension`. Cached, because a run has the same scalars in every call."""
    return extension.PpoScalars(**x._asdict())


def gae_args(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, bootstrap: Tensor | None,
    skip_holes: bool, cu_seqlens: Tensor | None, advantages: Tensor, returns: Tensor,
) -> "native.GaeArgs":  # fmt: skip
    """Return the extension's arguments of GAE; the caller keeps the tensors alive."""
    assert _C is not None
    b, t = rewards.shape if cu_seqlens is None else (cu_seqlens.numel() - 1, 0)
    return _C.GaeArgs(
        n=rewards.numel(),
        sequences=b,
        length=t,
        cu_seqlens=address(cu_seqlens),
        rewards=address(rewards),
        values=address(values),
        mask=address(mask),
        bootstrap=address(bootstrap),
        gamma=gamma,
        lam=0.0 if isinstance(lam, Tensor) else lam,
        lams=floats(lam) if isinstance(lam, Tensor) else 0,
        skip_holes=skip_holes,
        advantages=address(advantages),
        returns=address(returns),
    )


def rollout_args(
    recursion: "native.GaeArgs",
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    score_index: Tensor | None,
    rewards: Tensor,
    kl: Tensor,
    *,
    kl_estimator: int,
    kl_coef: float,
    score_clip: float,
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> "native.RolloutArgs":
    """Return the extension's arguments of `rollout_advantages`; the caller keeps the tensors alive."""
    assert _C is not None
    return _C.RolloutArgs(
        gae=recursion,
        scores=address(scores),
        logprobs=address(logprobs),
        ref_logprobs=address(ref_logprobs),
        score_index=address(score_index),
        rewards=address(rewards),
        kl=address(kl),
        kl_estimator=kl_estimator,
        kl_coef=kl_coef,
        score_clip=score_clip,
        whiten_rewards=whiten_rewards,
        whiten_advantages=whiten_advantages,
    )


def importance_args(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor | None,
    sequences: Sequences,
    out: tuple[Tensor, Tensor, Tensor],
    **rule: float,
) -> "native.ImportanceArgs":
    """Return the extension's arguments of `importance_weights`; the caller keeps the tensors alive."""
    assert _C is not None
    return _C.ImportanceArgs(
        n=logprobs.numel(),
        sequences=sequences.count,
        length=sequences.length,
        cu_seqlens=address(sequences.cu_seqlens),
        logprobs=floats(logprobs),
        sampler_logprobs=floats(sampler_logprobs),
        mask=address(mask),
        advantages=floats(advantages),
        **dict(zip(("weights", "kept", "metrics"), map(address, out), strict=True)),
        **rule,
    )


ALIGNMENT = 64
"""Alignment in bytes of torch's CPU tensors, which matrix libraries also prefer."""


class Workspace(threading.local):
    """A block of memory per thread for chunks of logits, reused from call to call.

    The system zeroes a new block page by page, which costs a quarter of the time of the chunk's matrix product. The block
    has the size of the thread's largest chunk so far, and its content is not used between calls. A caller can lend memory
    instead.
    """

    def __init__(self):
        self._block: torch.Tensor | None = None  # bytes
        self._lent: torch.Tensor | None = None  # bytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised tensor of `shape`, valid until the next call."""
        if device.type != "cpu":  # a GPU's caching allocator reuses blocks and tracks the stream
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        if self._lent is not None:
            if self._lent.numel() < size:
                raise ValueError(
                    f"block: got {self._lent.numel()} bytes, expected at least {size} for logits of shape {shape}; "
                    "head_workspace_bytes returns the size"
                )
            return self._lent[:size].view(dtype).view(shape)
        block = self._block
        if block is None or block.device != device or block.numel() < size:
            self._block = None  # freed first, so that the old and the new block never exist together
            self._block = block = empty((size,), torch.uint8, device)
        return block[:size].view(dtype).view(shape)

    @contextmanager
    def lend(self, block: torch.Tensor) -> Iterator[None]:
        """Free this thread's block, and use `block` instead while the context is open."""
        self.release()
        before, self._lent = self._lent, block
        try:
            yield
        finally:
            self._lent = before

    def release(self) -> None:
        """Free the block."""
        self._block = None


WORKSPACE = Workspace()


@contextmanager
def lend_workspace(
    block: torch.Tensor,  # (bytes,), uint8, on the CPU
) -> Iterator[None]:
    """Use `block` for the logits of this thread's fused head while the context is open, instead of a separate allocation.

    The head overwrites the block and does not rely on its content between calls. `head_workspace_bytes` returns the size that
    it needs. On a GPU the caching allocator provides the memory and `block` is not used.

    Raises:
        ValueError: `block` is not contiguous uint8 on the CPU, or is not aligned to 64 bytes. A call inside the context
            raises it if `block` is too small.
    """
    if block.dtype != torch.uint8 or block.dim() != 1 or block.device.type != "cpu" or not block.is_contiguous():
        got = f"{block.dtype} of shape {tuple(block.shape)} on {block.device}"
        raise ValueError(f"block: got {got}, expected contiguous uint8 [bytes] on cpu")
    if block.data_ptr() % ALIGNMENT:
        raise ValueError(f"block: got the address {block.data_ptr():#x}, expected a multiple of {ALIGNMENT}")
    with WORKSPACE.lend(block):
        yield


def release_workspace() -> None:
    """Free the block that the fused head of this thread keeps between calls; the next call allocates a new one."""
    WORKSPACE.release()
