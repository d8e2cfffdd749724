"""Choice of a backend, the launchers that a backend provides, and registration of ops with torch.library.

`"auto"` selects the fastest backend that supports the op on the tensor's device and dtype. A backend that is requested by
name runs the call or raises. `rlhf_kernels.info` prints what `"auto"` selects for every op, and why.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from . import _native
from .launch_args import LogitRows, PpoRows, RowStats, Sequences, flat_fields, unflatten
from .token_args import TokenKernels

BACKENDS = ("reference", "cpu", "triton", "cuda")
VARLEN = "varlen"
"""`torch.nn.attention.varlen`, a backend of paged_attention only."""
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_OPS = ("gae", "rollout_advantages", "logits_ppo_loss", "importance_weights")
"""Ops with a CUDA C++ kernel; the others have only a Triton kernel on a GPU."""
TRITON_FIRST = ("gae", "rollout_advantages", "importance_weights")
"""Ops in `CUDA_OPS` whose Triton kernel was faster on an H200 (benchmarks/results/h200). The last one has not been timed."""
GPU_OPS = ("paged_attention",)
"""Ops without a C++ kernel: on a CPU a rollout has slots instead of pages, and tests use the reference."""
CPU_OPS = ("decode_attention",)
"""Ops whose only kernel is for CPU tensors."""
LONGEST_ROW = 2**30
"""Longest row of logits that the GPU kernels can index with 32 bits, including the blocks that they read ahead."""

MIN_TRITON = (3, 5)
_MIN_TRITON = ".".join(map(str, MIN_TRITON))


class Kernels(TokenKernels, Protocol):
    """The launchers of a backend. Tensors are contiguous, float32 and on one device, except where a method states otherwise.

    N tokens, V vocabulary, B sequences, T positions. With `cu_seqlens`, (B + 1,) int32, tokens are packed (N,), else (B, T).
    """

    def token_logprobs_forward(self, x: LogitRows, stats: RowStats) -> None:
        """Compute `stats`; masked rows get zeros."""
        ...

    def token_logprobs_backward(
        self, x: LogitRows, stats: RowStats, out: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> None:
        """Write the gradient of the logits to `out`: `grad_logprobs d logprob/d logits + grad_entropy d H/d logits`.

        The two factors are (N,); None counts as 0. Masked rows get zeros. `out` has the dtype of the logits or a narrower
        one. It can share memory with the logits: be the same tensor, or occupy the front of each row.
        """
        ...

    def ppo_epilogue(self, x: LogitRows, stats: RowStats, ppo: PpoRows, out: Tensor) -> Tensor:
        """Compute `stats`, write the gradient of the logits to `out`, return which rows have one, bool (N,).

        Rows without a gradient are not written on a CPU, and get zeros on other devices.
        """
        ...

    def compact_rows(self, x: Tensor, active: Tensor) -> Tensor:
        """Move the marked rows of `x` (N, V) to its front, and return their old indices. On a GPU the host waits once."""
        ...

    def ppo_loss(
        self, ppo: PpoRows, sequences: Sequences, sequence_level: bool, mask: Tensor, logprobs: Tensor,
        entropy: Tensor | None, values: Tensor | None, old_values: Tensor | None, returns: Tensor | None,
        value_mask: Tensor, value_row_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return d loss / d logprobs and d loss / d values, each times its denominator, and launch_args.SUMS in float64."""
        ...

    def accumulate(self, total: Tensor, part: Tensor, *, first: bool) -> None:
        """Set `total = part` (`first`) or add `total += part`, in place. `total` is float32, `part` any of NATIVE_DTYPES."""
        ...

    def scale_cast(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x * scale` (a scalar tensor), rounded once to `dtype`; in place if that is the dtype of `x`."""
        ...

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, bootstrap: Tensor | None,
        skip_holes: bool, cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return advantages and returns, in the shape of rewards; see ops/gae.py. A tensor `lam` is float32, (B,)."""
        ...

    def rollout_advantages(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, kl_coef: float,
        kl_estimator: int, gamma: float, lam: float | Tensor, score_clip: float, score_index: Tensor | None,
        bootstrap: Tensor | None, skip_holes: bool, whiten_rewards: bool, whiten_advantages: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Return advantages, returns, rewards and KL. `kl_estimator` is an index in KL_ESTIMATORS; `score_clip` inf is off."""
        ...

    def sample_tokens(
        self, logits: Tensor, temperature: float, temperatures: Tensor | None, top_k: int, top_p: float, min_p: float,
        seed: int, sequence: Tensor, position: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return int64 ids, log-probs, sampling log-probs. Off: top_k 0, top_p 1, min_p 0. `logits`: any dtype, row stride."""
        ...

    def paged_attention(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, scale: float,
        window: int, softcap: float,
    ) -> Tensor:  # fmt: skip
        """Return the attention in the shape and dtype of `q`. Off: window 0, softcap 0. Any strides, but 1 along D."""
        ...

    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Return (R, heads, D) in the dtype that query, keys and values share. Keys and values: any strides, but 1 along D."""
        ...

    def kl_penalty(self, logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
        """Return the KL estimate of each element; tensors of any shape."""
        ...

    def kl_penalty_backward(self, grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
        """Return `grad` times d KL / d logprobs."""
        ...

    def masked_mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return a scalar; 0 if no entry of the mask is True."""
        ...

    def masked_whiten(self, x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool) -> Tensor:
        """Return the whitened entries; see ops/masked.py."""
        ...

    def group_advantages(self, scores: Tensor, groups: Tensor, kind: int, eps: float, population: bool) -> Tensor:
        """Return one advantage per score. `groups` is int64; `kind` is an index in KINDS of ops/group_advantages.py."""
        ...


class OnePassKernels(Protocol):
    """The launchers that only the CUDA C++ backend has; `_cuda` documents them."""

    def logits_ppo_loss(
        self, x: LogitRows, ppo: PpoRows, stats: RowStats, coefficients: Tensor, denominator: Tensor, out: Tensor | None
    ) -> None:
        """See `_cuda.logits_ppo_loss`."""
        ...

    def rescale_dlogits(
        self, x: LogitRows, ppo: PpoRows, stats: RowStats, coefficients: Tensor, out: Tensor, upstream: Tensor
    ) -> None:
        """See `_cuda.rescale_dlogits`."""
        ...


class Choice(NamedTuple):
    """The backend that `"auto"` selects, and the reason in words."""

    backend: str
    reason: str
    missing: bool = False
    """Whether kernels exist for these tensors but are not installed, so that the eager definitions run."""


@cache
def kernels(backend: str) -> Kernels:
    """Return the launchers of a backend that `resolve` returned; Triton is imported on the first call that needs it."""
    assert backend in (*BACKENDS[1:], VARLEN), backend
    return cast(Kernels, importlib.import_module(f"._{backend}", __package__))


@cache
def why_no_triton() -> str:
    """Return why Triton kernels cannot run on CUDA tensors here; empty when they can."""
    if find_spec("triton") is None:
        return f"triton is not installed; install triton >= {_MIN_TRITON}"
    found = importlib.import_module("triton").__version__
    if tuple(map(int, found.split(".")[:2])) < MIN_TRITON:
        return f"triton {found} is too old; install triton >= {_MIN_TRITON}"
    return ""


def interprets() -> bool:
    """Return whether Triton kernels run on CPU tensors, that is, TRITON_INTERPRET was set before Triton was imported."""
    return not why_no_triton() and importlib.import_module("triton").knobs.runtime.interpret


@cache
def why_no_cuda(op: str, device: torch.device) -> str:
    """Return why the CUDA C++ kernel of `op` cannot run on this device; empty when it can."""
    if op == "logits_ppo_loss" and why_no_triton():
        return f"it needs Triton for the sums of the loss: {why_no_triton()}"
    if not _native.AVAILABLE:
        return _native.why_missing()
    if torch.version.hip:
        return "its kernels are for NVIDIA devices"
    built = _native.extension().cuda_architectures()
    if not built:
        return "the extension was built without CUDA kernels; install the CUDA toolkit and build again with RLHF_CUDA=1"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] * 10 + capability[1] < min(built):
        names = ", ".join(f"sm_{x}" for x in built)
        return f"its kernels are built for {names}, this device is sm_{capability[0]}{capability[1]}"
    return ""


VARLEN_CHIPS = {"FA3": 9, "FA4": 10}
"""Implementation of torch's varlen attention -> the major compute capability on which it can read pages."""


def why_no_varlen(device: torch.device, dtype: torch.dtype) -> str:
    """Return why `torch.nn.attention.varlen` cannot read pages of this dtype on this device; empty when it can."""
    if device.type != "cuda":
        return f"it takes CUDA tensors, not {device.type} ones"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have it"
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if not {"block_table", "seqused_k", "num_splits"} <= set(inspect.signature(function).parameters):
        return f"varlen_attn of torch {torch.__version__} takes no block table"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    active = torch.nn.attention.current_flash_attention_impl()
    if active not in VARLEN_CHIPS:
        return f"it reads pages with {' or '.join(VARLEN_CHIPS)} only; call torch.nn.attention.activate_flash_attention_impl"
    if torch.cuda.get_device_capability(device)[0] != VARLEN_CHIPS[active]:
        return f"{active} reads pages on sm_{VARLEN_CHIPS[active]}0 only"
    return ""


def choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return the backend that `"auto"` selects for tensors of this device and dtype, and why."""
    if dtype not in NATIVE_DTYPES:
        return Choice("reference", f"the kernels take float32, bfloat16 and float16, not {dtype}")
    if device.type == "cpu" and op in GPU_OPS:
        return Choice("reference", "it has kernels for GPUs only")
    if device.type == "cpu":
        return (
            Choice("cpu", "C++ kernels")
            if _native.AVAILABLE
            else Choice("reference", _native.why_missing(), missing=True)
        )
    if device.type != "cuda":
        return Choice("reference", f"no fused kernel is built for device type {device.type!r}")
    if op in CPU_OPS:
        return Choice("reference", "its only kernel is for CPU tensors")
    has_cuda = op in CUDA_OPS and not why_no_cuda(op, device)
    if has_cuda and (op not in TRITON_FIRST or why_no_triton()):
        return Choice("cuda", "CUDA C++ kernels")
    if op == "paged_attention" and not why_no_varlen(device, dtype):
        return Choice(VARLEN, "torch.nn.attention.varlen; Triton kernels if there is a softcap")
    if why_no_triton():
        return Choice("reference", why_no_triton(), missing=True)
    if op == "paged_attention":
        return Choice("triton", f"Triton kernels; no torch.nn.attention.varlen: {why_no_varlen(device, dtype)}")
    if has_cuda:
        timed = op != "importance_weights"
        why = (
            "which are faster than the CUDA C++ ones on an H200"
            if timed
            else "as the CUDA C++ ones have not been timed"
        )
        return Choice("triton", f"Triton kernels, {why}")
    missing = f"; no CUDA C++ kernel: {why_no_cuda(op, device)}" if op in CUDA_OPS else ""
    return Choice("triton", f"Triton kernels{missing}")


def resolve(op: str, backend: str, tensor: Tensor, vocabulary: int = 0) -> str:
    """Return the backend for `tensor` and rows of `vocabulary` logits; raise ValueError if a requested one cannot run it."""
    chosen = _resolve(op, backend, tensor)
    if chosen in ("triton", "cuda") and vocabulary > LONGEST_ROW:
        raise ValueError(
            f"{op}: got a vocabulary of {vocabulary}, expected at most {LONGEST_ROW} for {chosen}; use backend='reference'"
        )
    return chosen


def _resolve(op: str, backend: str, tensor: Tensor) -> str:
    if backend == "reference":
        return backend
    native = tensor.is_cpu and tensor.dtype in NATIVE_DTYPES and _native.AVAILABLE
    if backend == "auto" and native and op not in GPU_OPS:
        return "cpu"  # the result of `choose`, half a microsecond faster
    if backend == "auto":
        choice = choose(op, tensor.device, tensor.dtype)
        if choice.missing:
            _warn_once(choice.reason)
        return choice.backend
    if backend not in BACKENDS and (op, backend) != ("paged_attention", VARLEN):
        raise ValueError(f"backend: got {backend!r}, expected 'auto' or one of {BACKENDS}")
    refused = _why_not(op, backend, tensor)
    if refused:
        raise ValueError(f"backend: {backend!r} cannot serve this call: {refused}")
    return backend


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"rlhf_kernels runs its eager definitions, without fused kernels: {reason}. backend='reference' chooses them without "
        "this warning",
        RuntimeWarning,
        stacklevel=4,
    )


def _why_not(op: str, backend: str, tensor: Tensor) -> str:
    device, dtype = tensor.device, tensor.dtype
    if dtype not in NATIVE_DTYPES:
        return choose(op, device, dtype).reason
    if backend == VARLEN:
        return why_no_varlen(device, dtype)
    if backend == "cpu" and op in GPU_OPS:
        return f"{op} has no C++ kernel for the CPU; use backend='reference'"
    if backend == "cpu":
        wrong = f"the tensors are on {device}, expected CPU tensors"
        return wrong if device.type != "cpu" else "" if _native.AVAILABLE else _native.why_missing()
    if op in CPU_OPS:
        return f"{op} has no {backend} kernel, only one for CPU tensors"
    if backend == "cuda":
        if op not in CUDA_OPS:
            return f"{op} has no CUDA C++ kernel, only {', '.join(CUDA_OPS)} do; use backend='triton'"
        return (
            why_no_cuda(op, device) if device.type == "cuda" else f"the tensors are on {device}, expected CUDA tensors"
        )
    if why_no_triton():
        return why_no_triton()
    if device.type == "cpu" and not interprets():
        return "Triton takes CPU tensors through its interpreter only: set TRITON_INTERPRET=1 before Python starts"
    return "" if device.type in ("cpu", "cuda") else f"the tensors are on {device}, expected CUDA tensors"


# ---- registration ----

_LIBRARY = torch.library.Library("rlhf_kernels", "FRAGMENT")


def define(
    schema: str,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register `rlhf_kernels::<schema>` and return it.

    `save(ctx, inputs, output)` and `backward(ctx, *gradients)` define its derivative; without them its results never require
    gradients. `backward=refuse` is for ops that compute gradients. The backend is an argument, so CPU and CUDA tensors share
    `run`. `Library` costs 2 us per call and `custom_op` 9 us; an op on the smallest rollouts takes 10 us.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"rlhf_kernels::{name}", fake, lib=_LIBRARY)
    if backward is None:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(f"rlhf_kernels::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.rlhf_kernels, name).default


def define_record(
    name: str, inputs: type, run: Callable[..., Any], fake: Callable[..., Any], **gradient: Callable[..., Any]
) -> Any:
    """Call `define` with the flattened fields of `inputs`, the NamedTuple that `run` and `fake` receive, as arguments."""
    fields = [
        inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for field, annotation in flat_fields(inputs)
    ]

    def run_flat(*arguments: Any) -> Any:
        return run(unflatten(inputs, arguments))

    def fake_flat(*arguments: Any) -> Any:
        return fake(unflatten(inputs, arguments))

    run_flat.__signature__ = inspect.Signature(fields, return_annotation=inspect.signature(run).return_annotation)
    schema = torch.library.infer_schema(run_flat, op_name=name, mutates_args=())
    return define(schema, run=run_flat, fake=fake_flat, **gradient)


def refuse(ctx: Any, *gradients: Tensor) -> None:
    """Raise RuntimeError for a second derivative, which would otherwise be silently missing from a gradient penalty."""
    raise RuntimeError("rlhf_kernels differentiates once; pass backend='reference' for a second derivative")
