"""The original PPOTrainer of TRL, or ours with its interface, on a model and batch of a benchmark.

`bench_ppo_step`, `bench_trl_front` and `gpu/engine_bench` run it.

Its defaults are kept (fused AdamW, clip .2, value clip .2, vf_coef .1, kl_coef .05, lam .95, temperature .7, one minibatch)
except for the settings that the comparison fixes: the batch, the dtype of the weights (float32 on CPU), no activation
checkpointing (it is slower), no evaluation samples, no logging service, no saved files. The pad token is outside the model's
vocabulary and there is no stop token, so every response has the maximum length.
"""

from __future__ import annotations

import tempfile

import torch

from benchmarks.harness import Session


def _tokenizer(vocab_size: int):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{index}": index for index in range(vocab_size)} | {"<pad>": vocab_size, "<eos>": vocab_size + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _models(config, device: torch.device, dtype: torch.dtype):
    """Return policy, reference, value model and reward model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    with device:
        policy, reference = (AutoModelForCausalLM.from_config(config, dtype=dtype) for _ in range(2))
        value, reward = (AutoModelForSequenceClassification.from_config(config, dtype=dtype) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    return policy, reference, value, reward


def _warm_up(policy, rows: torch.Tensor) -> None:
    """Generate and run a backward pass once, so that GPU libraries load and select kernels before the first update."""
    policy.generate(rows, max_new_tokens=4, do_sample=True, pad_token_id=0)
    policy(rows).logits.float().logsumexp(-1).sum().backward()
    policy.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _classes(front: bool):
    """Return `PPOConfig` and `PPOTrainer`: TRL's, or with `front` those of `rlhf_engine.compat.trl`."""
    if front:
        from rlhf_engine.compat import trl as module
    else:
        from trl.experimental import ppo as module
    return module.PPOConfig, module.PPOTrainer


def _arguments(folder: str, batch: dict, device: torch.device, config: type):
    """Return the settings that our trainer also has, with all output turned off."""
    return config(
        output_dir=folder,
        use_cpu=device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        seed=0,
        per_device_train_batch_size=batch["micro_batch"],
        gradient_accumulation_steps=batch["prompts"] // batch["micro_batch"],
        num_mini_batches=1,
        num_ppo_epochs=batch["epochs"],
        response_length=batch["response_tokens"],
        local_rollout_forward_batch_size=batch.get("rollout_rows", 64),
        total_episodes=batch["prompts"] * 10_000,
        num_sample_generations=0,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )


def run(session: Session, *, model: dict, batch: dict, front: bool = False) -> None:
    """Run PPO updates, one per step of the session; with `front`, by `rlhf_engine.compat.trl`.

    `model` has the fields of a config.json, by default of a Llama. `batch` has the keys of `bench_ppo_step.BATCH`,
    `micro_batch`, and optionally `device`, `dtype` and `rollout_rows`, the number of sequences sampled together.
    """
    from datasets import Dataset
    from transformers import AutoConfig, TrainerCallback

    settings, trainer = _classes(front)
    session.baseline()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"model_type": "llama"} | model, num_labels=1)
    device, dtype = torch.device(batch.get("device", "cpu")), getattr(torch, batch.get("dtype", "float32"))
    policy, reference, value, reward = _models(config, device, dtype)
    prompts = torch.randint(0, config.vocab_size, (batch["prompts"] * 8, batch["prompt_tokens"])).tolist()
    if device.type == "cuda":
        _warm_up(policy, torch.tensor(prompts[:1], device=device))

    class Pace(TrainerCallback):
        """Callback that reports every update to the session and waits for the next request."""

        def on_train_begin(self, *args, **kwargs):
            session.ready()
            session.begin()

        def on_step_end(self, *args, **kwargs):
            session.end()
            if not session.begin():
                raise SystemExit

    with tempfile.TemporaryDirectory() as folder:
        trainer(
            args=_arguments(folder, batch, device, settings),
            processing_class=_tokenizer(config.vocab_size),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            callbacks=[Pace()],
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
        ).train()


def scores(*, model: dict, batch: dict, updates: int, front: bool, seed: int = 0) -> list[float]:
    """Return the mean score of the responses in each of `updates` updates."""
    import numpy as np
    from datasets import Dataset
    from transformers import AutoConfig

    settings, trainer = _classes(front)
    torch.manual_seed(seed)
    np.random.seed(seed)
    config = AutoConfig.for_model(**{"model_type": "llama"} | model, num_labels=1)
    policy, reference, value, reward = _models(config, torch.device("cpu"), torch.float32)
    prompts = torch.randint(0, config.vocab_size, (batch["prompts"] * 8, batch["prompt_tokens"])).tolist()
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(folder, batch, torch.device("cpu"), settings)
        arguments.learning_rate, arguments.total_episodes, arguments.seed = 3e-3, batch["prompts"] * updates, seed
        run = trainer(
            args=arguments,
            processing_class=_tokenizer(config.vocab_size),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
        )
        run.train()
    return [line["objective/scores"] for line in run.state.log_history]
