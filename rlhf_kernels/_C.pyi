"""Types of the extension (csrc/bindings.cpp and csrc/cuda/bindings.cpp) for type checkers; a test compares the names.

An `int` with the name of a tensor is its address, 0 for None. `dtype` and the choices are integer codes.
"""

class PpoScalars:
    def __init__(self, **scalars: float) -> None: ...  # the fields of launch_args.PpoScalars

class LogitRows:
    def __init__(
        self,
        *,
        logits: int,
        dtype: int,
        n: int,
        vocab: int,
        row_stride: int,
        inner: int,
        outer_stride: int,
        ids: int,
        mask: int,
        temperature: float,
        temperatures: int,
        softcap: float,
        logit_scale: float,
    ) -> None: ...

class PpoRows:
    def __init__(
        self,
        *,
        scalars: PpoScalars,
        old_logprobs: int,
        advantages: int,
        weights: int,
        ref_logprobs: int,
        row_weight: int,
    ) -> None: ...

class GaeArgs:
    def __init__(
        self,
        *,
        n: int,
        sequences: int,
        length: int,
        cu_seqlens: int,
        rewards: int,
        values: int,
        mask: int,
        bootstrap: int,
        gamma: float,
        lam: float,
        lams: int,
        skip_holes: bool,
        advantages: int,
        returns: int,
    ) -> None: ...

class RolloutArgs:
    def __init__(
        self,
        *,
        gae: GaeArgs,
        scores: int,
        logprobs: int,
        ref_logprobs: int,
        score_index: int,
        kl_estimator: int,
        kl_coef: float,
        score_clip: float,
        whiten_rewards: bool,
        whiten_advantages: bool,
        rewards: int,
        kl: int,
    ) -> None: ...

class TopkArgs:
    def __init__(
        self,
        *,
        x: LogitRows,
        k: int,
        ids: int,
        logprobs: int,
        row_weight: int,
        direction: int,
        lump: bool,
        beta: float,
        found: int,
        active: int,
    ) -> None: ...

class ImportanceArgs:
    def __init__(
        self,
        *,
        n: int,
        sequences: int,
        length: int,
        cu_seqlens: int,
        level: int,
        action: int,
        statistic: int,
        low: float,
        high: float,
        logprobs: int,
        sampler_logprobs: int,
        mask: int,
        advantages: int,
        weights: int,
        kept: int,
        metrics: int,
    ) -> None: ...

def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def advise_huge_pages(begin: int, bytes: int, /) -> None: ...
def cuda_architectures() -> list[int]: ...
def philox4x32(k0: int, k1: int, c0: int, c1: int, c2: int, c3: int, /) -> tuple[int, int, int, int]: ...
def token_logprobs_forward(x: LogitRows, stats: int, /) -> None: ...
def token_logprobs_backward(
    x: LogitRows, stats: int, dlogits: int, contiguous: bool, grad_logprobs: int, grad_entropy: int, /
) -> None: ...
def ppo_epilogue(x: LogitRows, stats: int, ppo: PpoRows, active: int, /) -> None: ...
def move_rows(data: int, to: int, source: int, n: int, row_bytes: int, /) -> None: ...
def ppo_loss(
    *,
    ppo: PpoRows,
    n: int,
    sequences: int,
    length: int,
    cu_seqlens: int,
    sequence_level: bool,
    mask: int,
    logprobs: int,
    entropy: int,
    values: int,
    old_values: int,
    returns: int,
    value_mask: int,
    value_row_weight: int,
    slope: int,
    value_slope: int,
    sums: int,
) -> None: ...
def ppo_loss_call(
    scalars: PpoScalars,
    n: int,
    sequences: int,
    length: int,
    cu_seqlens: int,
    sequence_level: bool,
    logprobs: int,
    old_logprobs: int,
    advantages: int,
    mask: int,
    weights: int,
    ref_logprobs: int,
    row_weight: int,
    entropy: int,
    values: int,
    old_values: int,
    returns: int,
    value_mask: int,
    value_row_weight: int,
    policy: float,
    value: float,
    tokens: float,
    value_tokens: float,
    vf_coef: float,
    entropy_coef: float,
    kl_coef: float,
    source: int,
    divisor: int,
    num_metrics: int,
    slope: int,
    entropy_slope: int,
    value_slope: int,
    result: int,
    metrics: int,
    /,
) -> None: ...
def accumulate(sum: int, part: int, dtype: int, n: int, first: bool, /) -> None: ...
def scale_cast(x: int, source: int, out: int, to: int, n: int, scale: float, /) -> None: ...
def gae(a: GaeArgs, /) -> None: ...
def rollout_advantages(a: RolloutArgs, /) -> None: ...
def importance_weights(a: ImportanceArgs, /) -> None: ...
def topk_epilogue(a: TopkArgs, /) -> None: ...
def top_entropy_mask(entropy: int, mask: int, n: int, share: float, kept: int, metrics: int, /) -> None: ...
def sample_tokens(
    *,
    logits: int,
    dtype: int,
    rows: int,
    vocab: int,
    row_stride: int,
    temperature: float,
    temperatures: int,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    sequence: int,
    position: int,
    ids: int,
    logprobs: int,
    sampling_logprobs: int,
) -> None: ...
def decode_attention(
    *,
    query: int,
    keys: int,
    values: int,
    dtype: int,
    rows: int,
    heads: int,
    groups: int,
    width: int,
    size: int,
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    mask: int,
    scale: float,
    out: int,
) -> None: ...
def kl_penalty(logprobs: int, ref: int, n: int, estimator: int, out: int, /) -> None: ...
def kl_penalty_backward(grad: int, logprobs: int, ref: int, n: int, estimator: int, out: int, /) -> None: ...
def masked_mean(x: int, mask: int, n: int, out: int, /) -> None: ...
def masked_whiten(x: int, mask: int, n: int, shift_mean: bool, unbiased: bool, out: int, /) -> None: ...
def group_advantages(
    scores: int, groups: int, n: int, kind: int, eps: float, population: bool, out: int, /
) -> None: ...

# Only in a build with nvcc.

CUDA_ROW_SHARED: int

class LogitsPpoArgs:
    def __init__(
        self,
        *,
        x: LogitRows,
        ppo: PpoRows,
        stats: int,
        coefficients: int,
        denominator: int,
        dlogits: int,
        contiguous: bool,
    ) -> None: ...

def cuda_gae_workspace(a: GaeArgs, /) -> int: ...
def cuda_gae(a: GaeArgs, workspace: int, stream: int, /) -> None: ...
def cuda_rollout_workspace(a: GaeArgs, /) -> int: ...
def cuda_rollout_advantages(a: RolloutArgs, workspace: int, stream: int, /) -> None: ...
def cuda_importance_workspace(a: ImportanceArgs, /) -> int: ...
def cuda_importance_weights(a: ImportanceArgs, workspace: int, stream: int, /) -> None: ...
def cuda_logits_ppo_loss(a: LogitsPpoArgs, shared_limit: int, stream: int, /) -> None: ...
def cuda_rescale_dlogits(a: LogitsPpoArgs, upstream: int, stream: int, /) -> None: ...
