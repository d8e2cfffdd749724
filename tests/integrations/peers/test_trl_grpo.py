"""The installed GRPOTrainer with and without our mixin: losses, gradients and two steps of training."""

from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config, GraniteConfig
from trl import GRPOTrainer, RLOOTrainer

from rlhf_kernels import FusedHead

from . import tiny
from .grpo import Fused, FusedRLOO, check_step, inputs, trainer

SETTINGS = {
    "tokens": {},
    "sequences": {"importance_sampling_level": "sequence"},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 0.4},
    "dual clip": {"delta": 1.5},
    "KL, dr_grpo": {"beta": 0.1, "loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "truncated importance weights": {},
    "entropy mask": {"top_entropy_quantile": 0.5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients(tmp_path, name):
    def setup(made):
        if name == "truncated importance weights":  # TRL has these weights only with vLLM as the sampler
            made.use_vllm = made.vllm_importance_sampling_correction = True

    check_step(tmp_path, setup=setup, **SETTINGS[name])


def shape(**changes):
    return tiny.config().to_dict() | {"model_type": None, "architectures": None, "head_dim": 16} | changes


CURRENT = pytest.mark.skipif(version("trl").startswith("1.12."), reason="this release computes other log-probs for it")
HEADS = {
    "softcap": lambda: Gemma2Config(**shape(final_logit_softcapping=5.0)),
    "logit scale": lambda: Cohere2Config(**shape(logit_scale=0.5)),
    "divided": lambda: GraniteConfig(**shape(logits_scaling=4.0)),
}


@CURRENT
@pytest.mark.parametrize("name", HEADS)
def test_a_head_with_a_softcap_or_a_scale(tmp_path, name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS[name]())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    check_step(tmp_path, model=model)


@CURRENT
def test_a_head_in_modules_to_save(tmp_path):
    """tests/integrations/test_head.py has `trainable_token_indices`, for which TRL 1.16 raises AttributeError."""

    def setup(made):
        with torch.no_grad():
            for p in made.model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    check_step(tmp_path, setup=setup, peft_config=config)


@CURRENT
def test_the_head_in_float32(tmp_path):
    check_step(tmp_path, cast_lm_head_to_fp32=True)


@CURRENT
def test_rloo(tmp_path):
    """RLOOTrainer calls the same method."""
    weights = []
    for kind in (RLOOTrainer, FusedRLOO):
        made = trainer(kind, tmp_path / kind.__name__)
        made.train()
        weights.append({k: v.detach().clone() for k, v in made.model.state_dict().items()})
    assert weights[0].keys() == weights[1].keys()
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, rtol=0, atol=2e-4, msg=key)


def test_two_steps_end_in_the_same_weights(tmp_path):
    """Two steps of generation, rewards, advantages and the optimizer end in the same weights."""
    weights = []
    for kind in (GRPOTrainer, Fused):
        made = trainer(kind, tmp_path / kind.__name__)
        made.train()
        weights.append({k: v.detach().clone() for k, v in made.model.state_dict().items()})
    start = tiny.language_model().state_dict()
    assert weights[0].keys() == weights[1].keys() == start.keys()
    assert (weights[0]["lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-3
    for key in start:
        torch.testing.assert_close(weights[1][key], weights[0][key], rtol=0, atol=2e-4, msg=key)


def test_lora_on_the_head(tmp_path):
    """An adapter of the output layer changes loss and gradients as in TRL, and keeps its name in the state dict.

    TRL 1.16 raises for an adapter of the output layer, because its fused head would ignore it. The test then adapts a layer
    of the trunk.
    """
    targets = ["q_proj", "lm_head"] if version("trl").startswith("1.12.") else ["q_proj"]
    results = []
    for kind in (GRPOTrainer, Fused):
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, lora_dropout=0.0)
        made = trainer(kind, tmp_path, peft_config=config)
        with torch.no_grad():
            for n, p in made.model.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + p.shape[0])) * 0.2)
        made.current_gradient_accumulation_steps = 1
        loss = made._compute_loss(made.model, inputs())
        loss.backward()
        gradients = {n.replace(".layer.", "."): p.grad for n, p in made.model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), gradients, made.model.state_dict().keys()))
    (loss, gradients, names), (our_loss, our_gradients, our_names) = results
    assert names == our_names
    assert abs(our_loss - loss) <= 1e-6 * max(abs(loss), 0.1)
    assert any(targets[-1] in n and g.abs().max() > 1e-3 for n, g in gradients.items())
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            our_gradients[key], gradient, rtol=0, atol=2e-6 * max(1, gradient.abs().max().item())
        )


def test_unsupported_arguments_are_refused(tmp_path):
    made = trainer(Fused, tmp_path)
    assert isinstance(made.model.lm_head, FusedHead)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="pixel_values: got Tensor, which TRL supports and this adapter does not"):
        made._get_per_token_logps_and_entropies(made.model, ids, ids + 1, 2, pixel_values=torch.zeros(1))
