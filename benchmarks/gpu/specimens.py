"""Calls of every launcher of `backend.Kernels`, in the forms that users can reach, for `compile_check`.

Each call runs at several sizes with different coefficients and seeds, all of which must need the same kernels.
Legend: N tokens = B sequences of T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from rlhf_kernels._options import KL_ESTIMATORS, OBJECTIVES, OF_SEQUENCES, SCALARS, WITH_LEVEL, PPOArguments
from rlhf_kernels.backend import Kernels
from rlhf_kernels.launch_args import LogitRows, PpoRows, PpoScalars, RowStats, Sequences, Transform


@dataclass(frozen=True)
class Size:
    """Values that change between calls of one training run."""

    b: int
    t: int
    coefficient: float
    """Value of the numeric options; some options are multiples of it."""
    seed: int
    top_k: int
    more_vocabulary: int
    """Added to V."""

    @property
    def n(self) -> int:
        return self.b * self.t


SIZES = (
    Size(3, 8, 0.3, 5, 50, 0),
    Size(2, 16, 0.5, 16, 16, 0),
    Size(1, 1, 1.0, 1, 1, 0),
    Size(5, 15, 0.7, -(1 << 62), 7, 0),
    Size(5, 15, 0.7, 1 << 40, 7, 16),
)
"""Multiples of 16, other numbers, and 1: Triton compiles three different kernels for these unless specialisation is off."""

LARGE, ODD = 128256, 50257
"""Vocabularies: Llama 3's, whose rows are aligned, and GPT-2's, whose rows are not."""


@dataclass(frozen=True)
class Rows:
    """A form of the logits."""

    dtype: torch.dtype
    vocabulary: int
    every_flag: bool
    """True: mask, per-row temperature, softcap and strided rows; False: none of them."""
    narrow: bool = False
    """True: the gradient is bf16 in the first half of each row of float32 logits, as in the fused head."""

    def make(self, size: Size) -> LogitRows:
        n, v = size.n, self.vocabulary + size.more_vocabulary
        ids = torch.zeros(n, dtype=torch.int64)
        if not self.every_flag:
            return LogitRows(torch.empty(n, v, dtype=self.dtype), ids, Transform.of(size.coefficient))
        logits = torch.empty(size.b, size.t + 1, v, dtype=self.dtype)[:, :-1]
        transform = Transform.of(torch.ones(n), 30 * size.coefficient, size.coefficient)
        return LogitRows(logits, ids, transform, torch.ones(n, dtype=torch.bool))

    def out(self, x: LogitRows) -> Tensor:
        if self.narrow:
            return x.logits.view(torch.bfloat16)[:, : x.logits.shape[1]]
        return x.logits if self.every_flag else torch.empty_like(x.logits)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + (" to bfloat16" if self.narrow else "")
        return f"{kind} V={self.vocabulary}, {'every flag' if self.every_flag else 'no flag'}"


HEAD = Rows(torch.float32, LARGE, False, narrow=True)
FORMS = (
    HEAD,
    Rows(torch.float32, ODD, True),
    Rows(torch.bfloat16, LARGE, False),
    Rows(torch.bfloat16, ODD, True),
)

Call = Callable[[Kernels, Size], object]


def specimens() -> dict[str, tuple[str, Call]]:
    """Return the specimens: name -> (name of the launcher, call)."""
    return row_specimens() | scan_specimens() | token_specimens() | attention_specimens()


def row_specimens() -> dict[str, tuple[str, Call]]:
    found: dict[str, tuple[str, Call]] = {}
    for form in FORMS:
        found[f"token_logprobs_forward, {form}"] = "token_logprobs_forward", partial(forward, form)
        found[f"token_logprobs_backward, {form}"] = "token_logprobs_backward", partial(backward, form, form.every_flag)
        found[f"ppo_epilogue clip, {form}"] = "ppo_epilogue", partial(epilogue, form, "clip", "k3")
    for form in FORMS[:2]:
        shard = partial(backward, form, form.every_flag, part=True)
        found[f"token_logprobs_backward of a shard, {form}"] = "token_logprobs_backward", shard
    of_tokens = (name for name in OBJECTIVES[1:] if name not in OF_SEQUENCES)
    for objective, estimator in zip(of_tokens, cycle(("k1", "k2", "abs")), strict=False):
        form = replace(HEAD, every_flag=objective == "ratio", narrow=objective != "ratio")
        found[f"ppo_epilogue {objective}, {form}"] = "ppo_epilogue", partial(epilogue, form, objective, estimator)
    found["compact_rows"] = "compact_rows", compact
    for name, (dtype, top_k, top_p, min_p, vocabulary) in {
        "no filter": (torch.float32, False, 1.0, 0.0, LARGE),
        "top-k": (torch.bfloat16, True, 1.0, 0.0, LARGE),
        "top-p": (torch.float32, False, 0.9, 0.0, LARGE),
        "min-p": (torch.bfloat16, False, 1.0, 0.1, LARGE),
        "every filter": (torch.float32, True, 0.9, 0.1, ODD),
    }.items():
        found[f"sample_tokens {name}"] = "sample_tokens", partial(sample, dtype, vocabulary, top_k, top_p, min_p)
    return found


def scan_specimens() -> dict[str, tuple[str, Call]]:
    found: dict[str, tuple[str, Call]] = {}
    for packed in (False, True):
        layout = "packed" if packed else "padded"
        for skip in (True, False):
            name = f"gae {layout}, holes {'skipped' if skip else 'zeroed'}"
            found[name] = "gae", partial(gae, packed, skip)
        for estimator, kind in enumerate(KL_ESTIMATORS):
            every_flag = (estimator % 2 == 0) != packed
            name = f"rollout_advantages {layout}, {kind}, {'every flag' if every_flag else 'no flag'}"
            found[name] = "rollout_advantages", partial(rollout, packed, estimator, every_flag)
    return found


def token_specimens() -> dict[str, tuple[str, Call]]:
    found: dict[str, tuple[str, Call]] = {}
    for objective in OBJECTIVES:
        levels = (False, True) if objective in (*WITH_LEVEL, "policy_gradient") else (objective in OF_SEQUENCES,)
        for sequence_level in levels:
            every_flag = sequence_level == (objective in ("clip", "ratio"))
            level = "sequence" if sequence_level else "token"
            name = f"ppo_loss {objective}, {level} ratios, {'every flag' if every_flag else 'no flag'}"
            found[name] = "ppo_loss", partial(ppo_loss, objective, sequence_level, every_flag)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found[f"scale_cast to {dtype}"] = "scale_cast", partial(scale_cast, dtype)
    for estimator, kind in enumerate(KL_ESTIMATORS):
        found[f"kl_penalty {kind}"] = "kl_penalty", partial(kl_penalty, estimator)
        found[f"kl_penalty_backward {kind}"] = "kl_penalty_backward", partial(kl_penalty_backward, estimator)
    found["masked_mean"] = "masked_mean", lambda k, s: k.masked_mean(torch.ones(s.b, s.t), ones(s.b, s.t))
    for flag in (True, False):
        name = f"masked_whiten shift_mean={flag} unbiased={flag}"
        found[name] = "masked_whiten", partial(masked_whiten, flag)
    for kind in range(3):
        found[f"group_advantages {kind}"] = "group_advantages", partial(group_advantages, kind)
    return found


HEADS = {
    "Llama 3": (torch.bfloat16, 32, 8, 128, False),
    "Qwen2.5": (torch.float16, 12, 2, 128, False),
    "GPT-2": (torch.float32, 12, 12, 64, False),
    "Phi-2": (torch.bfloat16, 32, 32, 80, False),
    "Falcon": (torch.bfloat16, 71, 1, 64, False),
    "Gemma 2": (torch.bfloat16, 8, 4, 256, True),
    "Gemma 2, float32": (torch.float32, 8, 4, 256, True),
    "Llama 3, float32": (torch.float32, 32, 8, 128, False),
}
"""Model -> (dtype, heads, groups, head size, whether there are a window and a softcap)."""


def attention_specimens() -> dict[str, tuple[str, Call]]:
    return {f"paged_attention {name}": ("paged_attention", partial(attention, *shape)) for name, shape in HEADS.items()}


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def forward(form: Rows, kernels: Kernels, size: Size) -> None:
    kernels.token_logprobs_forward(form.make(size), RowStats.empty(size.n, torch.device("cpu")))


def backward(form: Rows, entropy: bool, kernels: Kernels, size: Size, *, part: bool = False) -> None:
    """Call the backward launcher; `part`: the logits are those of one shard of the vocabulary."""
    x, stats = replace(form.make(size), part=part), RowStats.empty(size.n, torch.device("cpu"))
    kernels.token_logprobs_backward(x, stats, form.out(x), torch.ones(size.n), torch.ones(size.n) if entropy else None)


def epilogue(form: Rows, objective: str, estimator: str, kernels: Kernels, size: Size) -> None:
    x, stats = form.make(size), RowStats.empty(size.n, torch.device("cpu"))
    kernels.ppo_epilogue(x, stats, ppo_rows(objective, estimator, form.every_flag, size), form.out(x))


def compact(kernels: Kernels, size: Size) -> None:
    kernels.compact_rows(torch.empty(size.n, LARGE, dtype=torch.bfloat16), torch.arange(size.n) % 3 == 0)


def sample(
    dtype: torch.dtype, vocabulary: int, top_k: bool, top_p: float, min_p: float, kernels: Kernels, size: Size
) -> None:
    logits = torch.zeros(size.b, vocabulary + size.more_vocabulary, dtype=dtype)
    temperatures = torch.ones(size.b) if vocabulary == ODD else None
    counters = torch.arange(size.b), torch.arange(size.b)
    filters = size.top_k if top_k else 0, top_p, min_p
    kernels.sample_tokens(logits, size.coefficient, temperatures, *filters, size.seed, *counters)


def layout_of(packed: bool, size: Size) -> tuple[tuple[int, ...], Tensor | None]:
    """Return the shape of the tokens, and `cu_seqlens` if they are packed."""
    if not packed:
        return (size.b, size.t), None
    return (size.n,), torch.arange(0, size.n + 1, size.t, dtype=torch.int32)


def gae(packed: bool, skip: bool, kernels: Kernels, size: Size) -> None:
    shape, cu_seqlens = layout_of(packed, size)
    bootstrap = None if skip else torch.zeros(size.b)
    tokens = torch.zeros(shape), torch.zeros(shape), ones(*shape)
    kernels.gae(*tokens, 1.0, size.coefficient, bootstrap, skip, cu_seqlens)


def rollout(packed: bool, estimator: int, every_flag: bool, kernels: Kernels, size: Size) -> None:
    shape, cu_seqlens = layout_of(packed, size)
    zeros, per_sequence = torch.zeros(shape), torch.zeros(size.b)
    index, bootstrap = (per_sequence.long(), per_sequence) if every_flag else (None, None)
    score_clip = size.coefficient if every_flag else math.inf
    whiten = every_flag, every_flag
    kernels.rollout_advantages(
        per_sequence, zeros, zeros, zeros, ones(*shape), size.coefficient, estimator, 1.0, size.coefficient, score_clip,
        index, bootstrap, not every_flag, *whiten, cu_seqlens,
    )  # fmt: skip


def ppo_rows(objective: str, estimator: str, every_flag: bool, size: Size) -> PpoRows:
    """Return the per-token constants; a coefficient that is off is off at every size."""
    c, tokens = size.coefficient, torch.zeros(size.n)
    options = {
        "objective": objective,
        "kl_estimator": estimator,
        "cliprange": c,
        "old_kl_coef": c,
        "cliprange_value": None,
    }
    if not every_flag:
        return PpoRows(PpoScalars.of(PPOArguments(**options)), tokens, tokens, None, None, None)
    options |= {"cliprange_high": 2 * c, "dual_clip": 3 * c, "log_ratio_clamp": 20 * c, "cliprange_value": c}
    options |= {"kl_coef": c, "entropy_coef": c}
    # Options that no specimen sets have the last of their choices, so that every formula is compiled.
    others = (row for row in SCALARS if row.kernel and row.choices and row.name not in options)
    options |= {row.name: row.choices[-1] for row in others if objective in row.objectives}
    return PpoRows(PpoScalars.of(PPOArguments(**options)), tokens, tokens, tokens, tokens, tokens)


def ppo_loss(objective: str, sequence_level: bool, every_flag: bool, kernels: Kernels, size: Size) -> None:
    packed = sequence_level and every_flag
    ends = layout_of(True, size)[1] if packed else None
    sequences = Sequences(size.b, 0 if packed else size.t, ends)
    ppo = ppo_rows(objective, KL_ESTIMATORS[OBJECTIVES.index(objective) % len(KL_ESTIMATORS)], every_flag, size)
    tokens, mask = torch.zeros(size.n), ones(size.n)
    optional = (tokens,) * 4 if every_flag else (None,) * 4
    kernels.ppo_loss(ppo, sequences, sequence_level, mask, tokens, *optional, mask, tokens if every_flag else None)


def scale_cast(dtype: torch.dtype, kernels: Kernels, size: Size) -> None:
    kernels.scale_cast(torch.empty(size.n, 64), torch.ones(()), dtype)


def kl_penalty(estimator: int, kernels: Kernels, size: Size) -> None:
    kernels.kl_penalty(torch.zeros(size.n), torch.zeros(size.n), estimator)


def kl_penalty_backward(estimator: int, kernels: Kernels, size: Size) -> None:
    kernels.kl_penalty_backward(torch.zeros(size.n), torch.zeros(size.n), torch.zeros(size.n), estimator)


def masked_whiten(flag: bool, kernels: Kernels, size: Size) -> None:
    kernels.masked_whiten(torch.ones(size.b, size.t), ones(size.b, size.t), flag, flag)


def attention(
    dtype: torch.dtype, heads: int, groups: int, head: int, every_flag: bool, kernels: Kernels, size: Size
) -> None:
    pool = torch.empty(2, size.n, 64, groups, head, dtype=dtype)
    table, lengths = torch.zeros(size.b, size.t, dtype=torch.int32), torch.ones(size.b, dtype=torch.int32)
    window, softcap = (size.top_k, 50 * size.coefficient) if every_flag else (0, 0.0)
    q = torch.empty(size.b, heads, head, dtype=dtype)
    kernels.paged_attention(q, *pool, table, lengths, size.coefficient, window, softcap)


def group_advantages(kind: int, kernels: Kernels, size: Size) -> None:
    kernels.group_advantages(torch.zeros(size.b), torch.zeros(size.b, dtype=torch.int64), kind, 1e-4, False)
