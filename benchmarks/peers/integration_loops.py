"""Training steps of other trainers, unmodified and with only their head and loss replaced by ours, for `bench_integrations`.

TRL: the whole GRPOTrainer, generation included. OpenRLHF and verl: the learner's step on a prepared batch (forward, log-probs
and entropy, policy loss, backward, AdamW), with the functions of these packages around the same model.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.agreement import originals
from benchmarks.harness import Session


def _model(model: dict) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**model))


def _batch(model: dict, batch: dict) -> dict[str, torch.Tensor]:
    """Return sequences without padding, each a prompt followed by a response."""
    n, t = batch["sequences"], batch["prompt_tokens"] + batch["response_tokens"]
    ids = torch.randint(0, model["vocab_size"], (n, t))
    actions = torch.zeros(n, t - 1)
    actions[:, batch["prompt_tokens"] - 1 :] = 1
    advantages = torch.randn(n, t - 1)
    return {"ids": ids, "actions": actions, "advantages": advantages}


def _steps(session: Session, parameters, step) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    session.ready()
    while session.begin():
        step().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.end()


def openrlhf(session: Session, *, model: dict, batch: dict, fused: bool) -> None:
    """Run the step of OpenRLHF's actor, with the entropy as a metric."""
    from rlhf_kernels.integrations.openrlhf import PolicyLoss
    from rlhf_kernels.integrations.openrlhf_actor import ActorMixin

    theirs = originals.openrlhf_actor()
    loss_function = PolicyLoss() if fused else originals.openrlhf()[0].PolicyLoss()
    session.baseline()
    actor = type("Fused", (ActorMixin, theirs), {})() if fused else theirs()
    actor.model, actor.temperature, actor.packing_samples = _model(model), 0.7, False
    if fused:
        actor.fuse()
    b = _batch(model, batch)
    attended = torch.ones_like(b["ids"])

    def step() -> torch.Tensor:
        log_probs, output = actor(b["ids"], b["actions"], attended, return_output=True, return_entropy=True)
        old = b.setdefault("old", log_probs.detach())
        return loss_function(log_probs, old, b["advantages"], b["actions"])[0] + 0 * output.entropy.detach().sum()

    _steps(session, actor.model.parameters(), step)


def verl(session: Session, *, model: dict, batch: dict, fused: bool) -> None:
    """Run the step of verl's actor, with the entropy as a metric.

    Unmodified, it computes log-probs from logits. With `fused`, it computes them as with verl's `use_fused_kernels`, but with
    our kernels.
    """
    core, functions = originals.verl(), originals.installed("verl.utils.torch_functional")
    from rlhf_kernels.integrations.verl import compute_policy_loss
    from rlhf_kernels.integrations.verl_model import FusedCausalLM

    session.baseline()
    policy = _model(model)
    b = _batch(model, batch)
    response = slice(batch["prompt_tokens"] - 1, -1)  # the positions that verl's losses receive
    wrapped = FusedCausalLM(policy) if fused else None

    def log_probs_and_entropy() -> tuple[torch.Tensor, torch.Tensor]:
        if wrapped is not None:
            output = wrapped(b["ids"], temperature=0.7)
            return output.log_probs[:, response], output.entropy[:, response].detach()
        logits = policy(b["ids"], use_cache=False).logits / 0.7
        log_probs = functions.logprobs_from_logits(logits, b["ids"].roll(-1, 1), inplace_backward=False)
        with torch.no_grad():
            entropy = functions.entropy_from_logits(logits)
        return log_probs[:, response], entropy[:, response]

    def step() -> torch.Tensor:
        log_probs, entropy = log_probs_and_entropy()
        old = b.setdefault("old", log_probs.detach())
        loss = compute_policy_loss if fused else core.compute_policy_loss
        constants = (b[name][:, batch["prompt_tokens"] - 1 :] for name in ("advantages", "actions"))
        return loss(old, log_probs, *constants, 0.2)[0] + 0 * entropy.sum()

    _steps(session, policy.parameters(), step)


def trl_grpo(session: Session, *, model: dict, batch: dict, fused: bool, settings: dict | None = None) -> None:
    """Run GRPOTrainer of the installed release: generation, scoring and one optimizer step per step of the session.

    `settings` are options of GRPOConfig.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.peers.trl_ppo import _tokenizer
    from rlhf_kernels.integrations.trl import GRPOMixin

    class Pace(TrainerCallback):
        """Callback that reports every step to the session and waits for the next request."""

        def on_train_begin(self, *args, **kwargs):
            session.ready()
            session.begin()

        def on_step_end(self, arguments, state, control, **kwargs):
            session.end()
            if not session.begin():
                control.should_training_stop = True

    session.baseline()
    vocabulary = model["vocab_size"]
    tokenizer = _tokenizer(vocabulary)
    words = [" ".join(f"t{i}" for i in range(k, k + batch["prompt_tokens"])) for k in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        kind = type("Fused", (GRPOMixin, GRPOTrainer), {}) if fused else GRPOTrainer
        trainer = kind(
            model=_model(model | {"vocab_size": vocabulary + 2}),
            reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=batch["sequences"],
                num_generations=batch["sequences"] // 2,
                max_completion_length=batch["response_tokens"],
                generation_kwargs={"min_new_tokens": batch["response_tokens"]},
                temperature=0.7,
                max_steps=10_000,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **(settings or {}),
            ),
            train_dataset=Dataset.from_list([{"prompt": w} for w in words]),
            processing_class=tokenizer,
            callbacks=[Pace()],
        )
        trainer.train()
