"""TRL's GRPOTrainer on a tiny model, with and without our mixin, and the comparison of one step of both."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_kernels.integrations.trl import GRPOMixin

from . import tiny


class Fused(GRPOMixin, GRPOTrainer):
    pass


class FusedRLOO(GRPOMixin, RLOOTrainer):
    pass


def reward(completion_ids, **_):
    return [sum(i % 5 for i in ids) / 10 for ids in completion_ids]


def trainer(kind, folder, peft_config=None, model=None, **settings):
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "temperature": 0.8,
        "seed": 0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    } | settings
    prompts = [{"prompt": f"w{i} w{i + 1} w{2 * i}"[: 6 + i]} for i in range(8)]
    # TRL loads the reference model from this folder.
    (tiny.language_model() if model is None else model).save_pretrained(folder / "model")
    of_rloo = issubclass(kind, RLOOTrainer)
    return kind(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=reward,
        args=(RLOOConfig if of_rloo else GRPOConfig)(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def inputs(b: int = 4, prompt: int = 3, t: int = 6) -> dict:
    """Return left-padded prompts, responses of lengths 1, T and between, and advantages of both signs."""
    g = torch.Generator().manual_seed(1)
    prompt_mask = (torch.arange(prompt) >= torch.tensor([[0], [1], [2], [0]])).long()
    completion_mask = (torch.arange(t) < torch.tensor([[1], [t], [3], [4]])).long()
    old = -torch.rand(b, t, generator=g) - 3.2
    return {
        "prompt_ids": torch.randint(0, 40, (b, prompt), generator=g),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(0, 40, (b, t), generator=g),
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.5]),
        "old_per_token_logps": old,
        "ref_per_token_logps": old + 0.1 * torch.randn(b, t, generator=g),
        "importance_sampling_ratio": torch.rand(b, t, generator=g) * 1.5,
        "num_items_in_batch": completion_mask.sum(),
    }


def check_step(folder, *, setup=lambda made: None, batch=lambda made: inputs(), **settings):
    """Assert that loss, gradients and metrics of one batch are the same with and without the mixin; return our loss."""
    results = []
    for kind in (GRPOTrainer, Fused):
        made = trainer(kind, folder, **settings)
        made.current_gradient_accumulation_steps = 1
        setup(made)
        loss = made._compute_loss(made.model, batch(made))
        loss.backward()
        gradients = {n: p.grad for n, p in made.model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), gradients, {k: v[-1] for k, v in made._metrics["train"].items()}))
    (loss, gradients, metrics), (our_loss, our_gradients, our_metrics) = results
    assert abs(our_loss - loss) <= 1e-6 * max(abs(loss), 0.1), (loss, our_loss)
    assert gradients.keys() == our_gradients.keys() and any(g.abs().max() > 1e-3 for g in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            our_gradients[key], gradient, rtol=0, atol=1e-6 * max(1, gradient.abs().max().item())
        )
    assert metrics.keys() == our_metrics.keys()
    for key, value in metrics.items():
        assert our_metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    return our_loss.item()
