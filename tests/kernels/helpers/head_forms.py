"""Forms of the output layer: with a LoRA adapter, int8, NF4. Each has a fused loss, an eager one and a definition."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import LowRank, QuantisedWeight, linear_ppo_loss, linear_token_logprobs, reference
from rlhf_kernels.ops.weights import NF4

from .bounds import check_error
from .gpu import to_device
from .head_loss import reference_loss, run
from .heads import make

FORMS = ("lora", "int8", "nf4", "int8 lora", "nf4 lora")
AWAY = (-0.7, -0.4, -0.1, 0.1, 0.42, 0.7)
"""Log-ratios on both sides of all bounds in `OPTIONS`, at least 0.08 from each bound."""
SCALE = 1.7
"""Scale of the adapter."""


def int8_of(weight: Tensor) -> QuantisedWeight:
    scales = weight.abs().amax(1) / 127
    return QuantisedWeight.int8((weight / scales[:, None]).round().to(torch.int8), scales)


def nf4_of(weight: Tensor, block: int = 64) -> QuantisedWeight:
    blocks = weight.reshape(-1, block)
    absmax = blocks.abs().amax(1)
    table = torch.tensor(NF4, device=weight.device)
    codes = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1).to(torch.uint8).view(-1, 2)
    return QuantisedWeight.nf4(codes[:, 0] << 4 | codes[:, 1], absmax, *weight.shape, block=block)


class Form(NamedTuple):
    """A head, its batch, and functions of `hidden, weight, [lora_a, lora_b,] ids, ...` with options as keywords."""

    leaves: dict[str, Tensor]
    constants: dict[str, Tensor]
    extra: dict[str, Tensor]
    weight: QuantisedWeight | None
    """The quantised weight. The leaf `weight` has its dequantised values in the dtype of the hidden states."""
    fused: Callable[..., Any]
    eager: Callable[..., Any]
    """The eager loss with a separate product for the adapter, as peft computes it."""
    exact: Callable[..., Any]
    """The eager loss with the weight `W + s B A`."""

    before: Tensor
    """Log-probs of the plain head, to which `old_logprobs` and `ref_logprobs` are close."""

    def centred(self, options: dict) -> "Form":
        """Return the form with `old_logprobs` and `ref_logprobs` as close to the log-probs of this head with `options`.

        Otherwise the ratio of one token, and its error, could be larger than those of all others. Log-ratios are those in
        `AWAY`, because the gradient of a token at a bound depends on the last bits of its ratio.
        """
        x = {k: leaf.double() for k, leaf in self.leaves.items()}
        weight = x["weight"] + (SCALE * x["lora_b"] @ x["lora_a"] if "lora_a" in x else 0)
        transform = {k: options[k] for k in ("temperature", "softcap", "logit_scale") if k in options}
        head = {"weight": weight, "bias": x["bias"], **transform}
        now = reference.linear_token_logprobs(x["hidden"], ids=self.constants["ids"], **head).logprobs
        drift = self.before - self.constants["old_logprobs"]
        away = torch.tensor(AWAY, dtype=torch.float64, device=drift.device)
        drift = away[(drift[..., None] - away).abs().argmin(-1)]
        ref = now + (self.extra["ref_logprobs"] - self.before)
        constants = self.constants | {"old_logprobs": (now - drift).float()}
        return self._replace(constants=constants, extra=self.extra | {"ref_logprobs": ref.float()})

    @property
    def frozen(self) -> tuple[str, ...]:
        return () if self.weight is None else ("weight",)


DRAWS = {"cpu": 12, "triton": 3}
"""Number of batches whose largest error counts; on a GPU, logits are not rounded to half precision.

With an adapter, eager and fused logits are rounded in different places, so that the errors of a sum over tokens are
independent, and one of them is small by chance.
"""


def check_forms(draws: Sequence[Form], options_of: Callable[[Form], dict], dtype: torch.dtype, how: dict | None = None):
    """Assert that loss, metrics and gradients of all draws together are within the error bound."""
    frozen = draws[0].frozen
    draws = [form.centred(options_of(form)) for form in draws]

    def results(form, function, kind, extra):
        result, gradients = run(function, form.leaves, form.constants, options_of(form) | extra, kind)
        assert all(gradients[name].dtype == kind for name in gradients)
        metrics = {f"metric {name}": x for name, x in result.metrics.items()}
        return {"loss": result.loss, **metrics} | {
            f"gradient of {k}": x for k, x in gradients.items() if k not in frozen
        }

    def stacked(way, kind, extra=None):
        found = [results(form, getattr(form, way), kind, extra or {}) for form in draws]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    got, exact = stacked("fused", dtype, how), stacked("exact", torch.float64)
    ways = ("eager", "exact") if "lora_a" in draws[0].leaves else ("eager",)
    eager = [stacked(way, dtype) for way in ways]
    for name, x in got.items():
        if name.startswith("metric"):
            error = max((one[name] - exact[name]).abs().max() for one in eager)
            assert bool(((x - exact[name]).abs() <= 2 * error + 2e-5 * (1 + exact[name].abs())).all()), name
            continue
        scale = float(exact["gradient of value_weight"].abs().max()) if name == "gradient of value_bias" else 0.0
        check_error(name, x, [one[name] for one in eager], exact[name], 1.0 if name == "loss" else scale)
    for name in frozen:
        _, gradients = run(draws[0].fused, draws[0].leaves, draws[0].constants, options_of(draws[0]), dtype)
        assert not gradients[name].any()


def low_rank(hidden, lora_a, lora_b, mask=None):
    return LowRank.lora(hidden, lora_a, lora_b, SCALE, mask=mask)


def form_of(form: str, seed: int, dtype=torch.float32, backend: str = "cpu", op=linear_ppo_loss, **sizes) -> Form:
    """Return a head in `form`. `op` is `linear_ppo_loss` or `linear_token_logprobs`."""
    leaves, constants, extra = make(seed, dtype, vocabulary=200, **sizes)
    if backend == "triton":
        leaves, constants, extra = map(to_device, (leaves, constants, extra))
    g = torch.Generator().manual_seed(seed + 100)
    weight, plain = None, leaves["weight"]
    if form.startswith(("int8", "nf4")):
        weight = (int8_of if form.startswith("int8") else nf4_of)(leaves["weight"].float())
        leaves["weight"] = weight.dequantised(dtype)
    if form.endswith("lora"):
        leaves["lora_a"] = (0.2 * torch.randn(5, leaves["hidden"].shape[-1], generator=g)).to(leaves["hidden"])
        leaves["lora_b"] = (0.2 * torch.randn(200, 5, generator=g)).to(leaves["hidden"])
    of_reference = reference_loss if op is linear_ppo_loss else reference.linear_token_logprobs

    def fused(hidden, lora_a=None, lora_b=None, **arguments):
        if weight is not None:
            arguments["weight"] = weight
        if lora_a is not None:
            arguments["low_rank"] = low_rank(hidden, lora_a, lora_b, arguments.get("mask"))
        return op(hidden=hidden, backend=backend, **arguments)

    def eager(hidden, lora_a=None, lora_b=None, **arguments):
        if lora_a is not None:
            arguments["low_rank"] = low_rank(hidden, lora_a, lora_b)
        return of_reference(hidden=hidden, **arguments)

    def exact(hidden, weight, lora_a=None, lora_b=None, **arguments):
        whole = weight if lora_a is None else weight + SCALE * lora_b @ lora_a
        return of_reference(hidden=hidden, weight=whole, **arguments)

    before = reference.linear_token_logprobs(
        leaves["hidden"].double(), plain.double(), constants["ids"], bias=leaves["bias"].double()
    ).logprobs
    return Form(leaves, constants, extra, weight, fused, eager, exact, before)


def logprobs_form(form: str, seed: int, dtype=torch.float32, backend: str = "cpu", **sizes) -> Form:
    """Return `form_of` for `linear_token_logprobs`, without the value head."""
    made = form_of(form, seed, dtype, backend, linear_token_logprobs, **sizes)
    return made._replace(leaves={k: x for k, x in made.leaves.items() if not k.startswith("value")})


def small_tiles(monkeypatch) -> None:
    """Dequantise 37 rows of 24 hidden units at a time, so that tiles do not divide the vocabulary."""
    monkeypatch.setattr("rlhf_kernels.ops.weights.TILE_BYTES", 37 * 24 * 4)
