"""Three updates of TRL 1.12.0's PPOTrainer on CPU, and our adapter on the trainer's tensors.

The tests do not repeat TRL's arithmetic. A subclass of the trainer reads the local variables of `train` at each
`optimizer.step` (the end of a micro-batch) and the metrics at each `log` (the end of an update).
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from rlhf_kernels.integrations import trl

from . import tiny

UPDATES, EPOCHS, MICRO, BATCH = 3, 2, 4, 8
END = 3
ROLLOUT = (
    "responses",
    "logprobs",
    "ref_logprobs",
    "values",
    "scores",
    "sequence_lengths",
    "rewards",
    "advantages",
    "returns",
)
STEP = ("micro_batch_inds", "logits", "mb_responses", "vpred", "loss")


class Recorder(PPOTrainer):
    """PPOTrainer that records the local variables of `train` at each optimizer step, and each log line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []
        self.gradient = None
        step = self.optimizer.step

        def stepping(*args, **kwargs):
            variables = self._train_variables()
            if self.gradient is None:
                self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
            if not self.seen or "line" in self.seen[-1]:
                self.seen.append({"steps": []} | {k: variables[k].detach().clone() for k in ROLLOUT})
            self.seen[-1]["steps"].append({k: torch.as_tensor(variables[k]).detach().clone() for k in STEP})
            return step(*args, **kwargs)

        self.optimizer.step = stepping

    @staticmethod
    def _train_variables():
        frame = sys._getframe()
        while frame.f_code is not PPOTrainer.train.__code__:
            frame = frame.f_back
        return frame.f_locals

    def log(self, logs, *args, **kwargs):
        if "objective/kl" in logs:
            self.seen[-1]["line"] = dict(logs)
        return super().log(logs, *args, **kwargs)


def run(folder, **settings):
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(tiny.config()), LlamaForCausalLM(tiny.config())
    with torch.no_grad():  # the end token is likely in some states, so that lengths are between 1 and T
        for model in (policy, reference):
            model.lm_head.weight[END] = torch.randn(32, generator=torch.Generator().manual_seed(4))
    value, reward = (LlamaForSequenceClassification(tiny.config(num_labels=1)) for _ in range(2))
    prompts = torch.randint(0, 40, (32, 5), generator=torch.Generator().manual_seed(2)).tolist()
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 0,
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": BATCH // MICRO,
        "num_mini_batches": 1,
        "num_ppo_epochs": EPOCHS,
        "response_length": 7,
        "total_episodes": BATCH * UPDATES,
        "local_rollout_forward_batch_size": BATCH,
        "stop_token_id": END,
        "learning_rate": 3e-2,
        "missing_eos_penalty": 0.5,
        "num_sample_generations": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    made = Recorder(
        args=PPOConfig(**arguments | settings),
        processing_class=tiny.tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        callbacks=[TrainerCallback()],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )
    np.random.seed(0)  # TRL shuffles its sequences with numpy's global generator
    made.train()
    return made


def close(name, ours, theirs, scale=None):
    scale = theirs.abs().max().item() if scale is None else scale
    error = (ours - theirs).abs().max().item()
    assert error <= 1e-5 * max(scale, 1e-3), f"{name}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("settings", [{}, {"whiten_rewards": True, "kl_estimator": "k3"}], ids=["k1", "k3, whitened"])
def test_three_updates(tmp_path, settings):
    """Rewards, advantages, returns, losses and log lines agree to 1e-5 of each tensor's largest value."""
    made = run(tmp_path, **settings)
    assert len(made.seen) == UPDATES and all(len(u["steps"]) == EPOCHS * BATCH // MICRO for u in made.seen)
    adapter = trl.PPO(made.args, faithful=True)
    clipped = 0.0
    for update in made.seen:
        u = SimpleNamespace(**update)
        rollout = adapter.rollout(u.logprobs, u.ref_logprobs, u.values, u.scores, u.sequence_lengths)
        for name in ("rewards", "advantages", "returns"):
            close(name, getattr(rollout, name), getattr(u, name))
        stats = []
        for index, step in enumerate(update["steps"]):
            s = SimpleNamespace(**step)
            # TRL divides the logits by the temperature in place; this restores the model's logits.
            logits = (s.logits * (made.args.temperature + 1e-7)).requires_grad_()
            loss, found = adapter.loss(logits, s.mb_responses, s.vpred, rollout.take(s.micro_batch_inds))
            close(f"loss of step {index}", loss.detach(), s.loss, scale=1.0)
            stats.append(found)
        line = trl.PPO.metrics(rollout, u.scores, made.args.kl_coef, stats)
        for name, value in line.items():
            assert value == pytest.approx(u.line[name], rel=1e-5, abs=1e-5), name
        clipped += line["policy/clipfrac_avg"]
    lengths = torch.cat([u["sequence_lengths"] for u in made.seen])
    assert clipped > 0 and lengths.min() < 3 and lengths.max() == 6  # ratios were clipped and lengths vary


def test_the_original_with_fused_helpers(tmp_path):
    """Rollout, first loss and first gradient are the same with our helpers; the originals are restored afterwards."""
    one = {"total_episodes": BATCH, "num_ppo_epochs": 1}
    plain = run(tmp_path / "plain", **one)
    with trl.fused_helpers() as swapped:
        fused = run(tmp_path / "fused", **one)
    assert swapped == ("selective_log_softmax", "masked_mean", "masked_whiten")
    assert sys.modules[PPOTrainer.__module__].masked_mean is not trl.masked_mean
    for name in ROLLOUT:
        close(name, fused.seen[0][name], plain.seen[0][name])
    close("loss", fused.seen[0]["steps"][0]["loss"], plain.seen[0]["steps"][0]["loss"], scale=1.0)
    close("gradient", fused.gradient, plain.gradient)
