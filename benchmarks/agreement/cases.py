"""Every function of every peer as a `Case`. The adapters run with `faithful=True`, so that all entries are compared."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.agreement import originals, selection_cases
from benchmarks.agreement.case import Case
from benchmarks.agreement.objectives import verl_objective_cases
from benchmarks.agreement.torchtune_cases import torchtune_cases
from benchmarks.agreement.verl_losses import verl_loss_cases
from rlhf_kernels.integrations import deepspeed_chat, openrlhf, trl, verl

CLIP = 0.2
LOGITS = {"b": 8, "t": 64, "v": 8192}
REGULAR = ("holes", "lengths", "full", "extreme")
"""All batches but the one in which only one token counts: its unbiased variance divides by zero and is NaN on both sides."""


class ActorConfig(SimpleNamespace):
    """The fields of verl's ActorConfig that its loss reads."""

    def get(self, key, default=None):
        return getattr(self, key, default)


def verl_cases() -> Iterator[Case]:
    theirs = originals.verl()

    def case(name: str, call, wrt=(), note="", faithful=True, **more) -> Case:
        ours = partial(getattr(verl, name), faithful=True) if faithful else getattr(verl, name)
        return Case("verl", "0.9.1", name, ours, getattr(theirs, name), call, wrt, note=note, **more)

    yield case(
        "compute_gae_advantage_return",
        lambda f, b: _floats(f, b.rewards, b.values, b.mask, 0.99, 0.95),
        batches=("holes", "lengths", "full", "extreme"),
    )
    for norm in (True, False):
        yield case(
            "compute_grpo_outcome_advantage",
            lambda f, b, n=norm: f(b.rewards * b.mask, b.mask, _groups(len(b.rewards)), norm_adv_by_std_in_grpo=n),
            note=f"groups of one and more, deviation {norm}",
            faithful=False,
            batches=REGULAR,
        )
    modes = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
    for mode in modes:
        yield case(
            "compute_policy_loss",
            lambda f, b, m=mode: f(b.old_logprobs, b.logprobs, b.advantages, b.mask, CLIP, loss_agg_mode=m),
            ("logprobs",),
            mode,
        )
    yield case(
        "compute_policy_loss",
        lambda f, b: f(b.old_logprobs, b.logprobs, b.advantages, b.mask, None, 0.1, 0.3, 1.5),
        ("logprobs",),
        "clip-higher, dual clip 1.5",
    )
    for mode in modes:
        yield case(
            "compute_policy_loss_vanilla",
            lambda f, b, m=mode: f(
                b.old_logprobs, b.logprobs, b.advantages, b.mask, m, _config(), b.rollout_logprobs.exp().clamp(max=2)
            ),
            ("logprobs",),
            f"{mode}, weights, global counts",
        )
        yield case(
            "compute_value_loss",
            lambda f, b, m=mode: f(b.values, b.returns, b.old_values, b.mask, CLIP, m, **_global_counts()),
            ("values",),
            f"{mode}, global counts",
        )
        yield case(
            "compute_value_loss",
            lambda f, b, m=mode: f(b.values, b.returns, b.old_values, b.mask, CLIP, m),
            ("values",),
            mode,
        )
    for kind in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "k3+", "k2+"):
        yield case(
            "kl_penalty", lambda f, b, k=kind: f(b.logprobs, b.ref_logprobs, k), ("logprobs",), kind, faithful=False
        )
    yield Case(
        "verl",
        "0.9.1",
        "linear_cross_entropy",
        verl.linear_cross_entropy,
        _verl_eager_head,
        lambda f, b: f(0.3 * b.logits, 0.3 * b.logits.flatten(0, 1), b.ids, 0.7),
        ("logits",),
        ("lengths",),
        "against verl's eager functions",
        {"b": 32, "t": 128, "v": 64},
    )
    yield from selection_cases.verl_cases()
    yield from verl_objective_cases()
    yield from verl_loss_cases()


def _floats(f, rewards, values, mask, *rest):
    return f(rewards, values, mask.to(rewards.dtype), *rest)


def _groups(b: int) -> np.ndarray:
    """Return the keys of the prompts: the first is a group of one, the others are pairs."""
    return np.array([f"prompt {(i + 1) // 2}" for i in range(b)])


def _global_counts() -> dict:
    return {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9, "loss_scale_factor": 20}


def _config() -> ActorConfig:
    return ActorConfig(
        clip_ratio=CLIP, clip_ratio_low=None, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info=_global_counts()
    )


def _verl_eager_head(hidden, weight, labels, temperature):
    functions = originals.installed("verl.utils.torch_functional")
    logits = hidden.flatten(0, -2) @ weight.T / temperature
    return functions.logprobs_from_logits_v2(logits, labels.flatten()), functions.entropy_from_logits(logits)


def openrlhf_cases() -> Iterator[Case]:
    yield from _openrlhf_policy()
    loss, utils = originals.openrlhf()

    def case(function: str, ours, theirs, call, wrt=(), note="", release="0.11.2", **more) -> Case:
        return Case("OpenRLHF", release, function, ours, theirs, call, wrt, note=note, **more)

    counts = {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 9.0}
    for clip in (None, CLIP):
        for level in (True, False):
            for given in ({}, counts):
                yield case(
                    "ValueLoss",
                    openrlhf.ValueLoss(clip, level, faithful=True),
                    loss.ValueLoss(clip, level),
                    lambda f, b, g=given: f(b.values, b.old_values, b.returns, b.mask, **g),
                    ("values",),
                    f"clip {clip}, {_level(level)}{', global counts' if given else ''}",
                )
    for k in ("k1", "k2", "k3"):
        yield case(
            "compute_approx_kl",
            openrlhf.compute_approx_kl,
            utils.compute_approx_kl,
            lambda f, b, k=k: f(b.logprobs, b.ref_logprobs, kl_estimator=k),
            ("logprobs",),
            k,
        )
        yield case(
            "compute_approx_kl",
            openrlhf.compute_approx_kl,
            utils.compute_approx_kl,
            lambda f, b, k=k: f(b.logprobs, b.ref_logprobs, b.old_logprobs, k, True),
            ("logprobs",),
            f"{k}, unbiased gradient",
        )
    yield case(
        "compute_reward",
        partial(openrlhf.compute_reward, faithful=True),
        utils.compute_reward,
        lambda f, b: f(b.scores, 0.05, b.logprobs - b.ref_logprobs, b.mask, (-3.0, 3.0)),
    )
    yield case(
        "get_advantages_and_returns",
        openrlhf.get_advantages_and_returns,
        originals.openrlhf_advantages(),
        lambda f, b: f(b.values, b.rewards, b.mask, 0.99, 0.95),
    )
    chosen = lambda f, b: f(b.scores, b.scores.flip(0))  # noqa: E731
    yield case("PairWiseLoss", openrlhf.PairWiseLoss(), loss.PairWiseLoss(), chosen, ("scores",))
    yield case(
        "PairWiseLoss",
        openrlhf.PairWiseLoss(),
        loss.PairWiseLoss(),
        lambda f, b: f(b.scores, b.scores.flip(0), b.lengths * 0.1),
        ("scores",),
        "margin",
    )
    yield case("LogExpLoss", openrlhf.LogExpLoss(), loss.LogExpLoss(), chosen, ("scores",))
    yield case(
        "GPTLMLoss",
        openrlhf.GPTLMLoss(faithful=True),
        loss.GPTLMLoss(),
        lambda f, b: f(b.logits, torch.where(b.mask.bool(), b.ids, -100)),
        ("logits",),
        sizes=LOGITS,
    )


def _level(tokens: bool) -> str:
    return "tokens" if tokens else "sequences"


def _openrlhf_policy() -> Iterator[Case]:
    def call(f, b, **given):
        rollout = b.rollout_logprobs
        return f(b.logprobs, b.old_logprobs, b.advantages, b.mask, rollout, **given)

    def case(ours, theirs, settings: dict, release: str, function=call, note="") -> Case:
        text = note or ", ".join(f"{k.removeprefix('is_correction_')} {v}" for k, v in settings.items())
        sides = ours(**settings, faithful=True), theirs(**settings)
        return Case("OpenRLHF", release, "PolicyLoss", *sides, function, ("logprobs",), note=text)

    loss, _ = originals.openrlhf()
    for kind in ("ppo", "gspo"):
        for level in (True, False):
            settings = {"policy_loss_type": kind, "token_level_loss": level}
            yield case(openrlhf.PolicyLoss, loss.PolicyLoss, settings, "0.11.2")
    counts = {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 9.0}
    for level in (True, False):
        settings = {"clip_eps_high": 0.3, "dual_clip": 1.5, "token_level_loss": level}
        text = f"clip-higher, dual clip, {_level(level)}, global counts"
        yield case(openrlhf.PolicyLoss, loss.PolicyLoss, settings, "0.11.2", partial(call, **counts), text)
    corrections = [("token", "clip", "ratio", (0.8, 1.2)), ("token", "mask", "ratio", (0.8, 1.2))]
    corrections += [("seq", "mask", "ratio", (0.9, 1.1)), ("token", "mask", "binary_kl", (0.0, 0.01))]
    corrections += [("token", "mask", "tv", (0.0, 0.05)), ("seq", "mask", "tv", (0.0, 0.05))]
    for level, mode, gating, threshold in corrections:
        names = ("level", "mode", "gating", "threshold")
        settings = {f"is_correction_{n}": v for n, v in zip(names, (level, mode, gating, threshold), strict=True)}
        yield case(openrlhf.PolicyLoss, loss.PolicyLoss, settings, "0.11.2")
    settings = {"policy_loss_type": "gspo", "is_correction_level": "token"}
    yield case(openrlhf.PolicyLoss, loss.PolicyLoss, settings, "0.11.2")
    older, _ = originals.openrlhf("0.11.0")
    for kind in ("tis", "icepop", "seq-mask-tis"):
        settings = {
            "enable_vllm_is_correction": True,
            "vllm_is_truncated_threshold": [0.8, 1.2],
            "vllm_is_correction_type": kind,
        }
        yield case(openrlhf.PolicyLoss0110, older.PolicyLoss, settings, "0.11.0", note=kind)
    oldest, _ = originals.openrlhf("0.7.5")
    for level in (True, False):
        settings = {"clip_eps": 0.3, "token_level_loss": level}
        sides = openrlhf.PolicyLoss07(**settings, faithful=True), oldest.PolicyLoss(**settings)
        call = lambda f, b: f(b.logprobs, b.old_logprobs, b.advantages, b.mask)  # noqa: E731
        names = ("OpenRLHF", "0.7.5", "PolicyLoss", *sides)
        # Averaged per sequence, an empty row makes the whole loss NaN, with the gradients of some rows but not of others.
        yield Case(*names, call, ("logprobs",), ("full",) if not level else ("holes", "lengths", "full"), _level(level))
        yield Case(*names, call, note=_level(level))


def trl_cases() -> Iterator[Case]:
    module = originals.trl_ppo()

    def case(name: str, ours, call, wrt=(), note="", **more) -> Case:
        return Case("TRL", "1.12.0", name, ours, getattr(module, name), call, wrt, note=note, **more)

    yield case(
        "selective_log_softmax", trl.selective_log_softmax, lambda f, b: f(b.logits, b.ids), ("logits",), sizes=LOGITS
    )
    mean, whiten = (partial(f, faithful=True) for f in (trl.masked_mean, trl.masked_whiten))
    yield case("masked_mean", mean, lambda f, b: f(b.values, b.mask.bool()), ("values",))
    yield case("masked_mean", mean, lambda f, b: f(b.values, b.mask.bool(), 1), ("values",), "axis", batches=("full",))
    for shift in (True, False):
        note = "" if shift else "mean kept"
        call = lambda f, b, s=shift: f(b.values, b.mask.bool(), s)  # noqa: E731
        yield case("masked_whiten", whiten, call, ("values",), note, batches=REGULAR)
    yield from _trl_classic()
    yield from selection_cases.trl_cases()


def _trl_classic() -> Iterator[Case]:
    kinds = originals.trl_classic()
    for kl, whiten in (("kl", False), ("abs", True), ("mse", False)):
        config = SimpleNamespace(
            kl_penalty=kl,
            whiten_rewards=whiten,
            gamma=0.99,
            lam=0.95,
            cliprange=CLIP,
            cliprange_value=CLIP,
            vf_coef=0.1,
            ratio_threshold=10.0,
        )
        theirs = kinds()
        theirs.config, theirs.kl_ctl = config, SimpleNamespace(value=0.2)
        ours = trl.Classic(config, theirs.kl_ctl, faithful=True)
        note = f"{kl}{', whitened rewards' if whiten else ''}"
        rewards = lambda f, b: f.compute_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask)  # noqa: E731
        advantages = lambda f, b: f.compute_advantages(b.values, b.rewards, b.mask)  # noqa: E731
        loss = lambda f, b: f.loss(  # noqa: E731
            b.old_logprobs, b.old_values, b.logits, b.values, b.logprobs, b.mask, b.advantages, b.returns
        )
        sides = ("TRL", "0.11.4"), (ours, theirs)
        yield Case(*sides[0], "compute_rewards", *sides[1], rewards, batches=("full",), note=note)
        yield Case(*sides[0], "compute_advantages", *sides[1], advantages, batches=REGULAR, note=note)
        for wrt in ("logprobs", "values"):
            call = loss if wrt == "logprobs" else lambda f, b, loss=loss: loss(f, b)[1:]
            yield Case(*sides[0], "loss", *sides[1], call, (wrt,), REGULAR, f"{note}, d{wrt}", LOGITS)


def deepspeed_chat_cases() -> Iterator[Case]:
    theirs = originals.deepspeed_chat()()
    settings = deepspeed_chat.PPO(faithful=True)
    for name in ("kl_ctl", "clip_reward_value", "cliprange", "cliprange_value", "gamma", "lam"):
        setattr(theirs, name, getattr(settings, name))
    theirs.compute_fp32_loss = False

    def case(function: str, call, wrt=(), note="", **more) -> Case:
        return Case("DeepSpeed-Chat", "45b4b71", function, settings, theirs, call, wrt, note=note, **more)

    def rewards(f, b):
        prompts = b.ids[:, :4]  # three prompt positions; the fourth predicts the first response token
        mask = torch.cat([torch.ones_like(b.mask[:, :3]), b.mask[:, : b.mask.shape[1] - 3]], 1)
        return f.compute_rewards(prompts, b.logprobs, b.ref_logprobs, b.scores, mask)

    yield case("compute_rewards", rewards)
    yield case("get_advantages_and_returns", lambda f, b: f.get_advantages_and_returns(b.values, b.rewards, 3))
    yield case(
        "actor_loss_fn",
        lambda f, b: f.actor_loss_fn(b.logprobs, b.old_logprobs, b.advantages, b.mask),
        ("logprobs",),
    )
    yield case("critic_loss_fn", lambda f, b: f.critic_loss_fn(b.values, b.old_values, b.returns, b.mask), ("values",))
    their_gather = originals.deepspeed_chat().gather_log_probs
    yield Case(
        "DeepSpeed-Chat",
        "45b4b71",
        "gather_log_probs",
        deepspeed_chat.gather_log_probs,
        their_gather,
        lambda f, b: f(b.logits, b.ids),
        ("logits",),
        sizes=LOGITS,
    )


PEERS = {
    "verl": verl_cases,
    "OpenRLHF": openrlhf_cases,
    "TRL": trl_cases,
    "torchtune": torchtune_cases,
    "DeepSpeed-Chat": deepspeed_chat_cases,
}
