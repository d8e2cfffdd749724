"""Small random models with recurrent states, of every family that sampling supports, and prompts for them."""

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.families.recurrent import DENSE, EXPERTS, SIZES
from rlhf_engine.model import ActorCritic, ValueHead
from tests.engine.helpers.tiny_models import VOCABULARY

_SIZES = SIZES | {"initializer_range": 0.3}


def config_of(family: str, settings: dict[str, object]):
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CONFIG_MAPPING[family](vocab_size=VOCABULARY, **special, **{**_SIZES, **settings})


def recurrent(
    family: str, settings: dict[str, object] | None = None, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """Return a random model of `family` with `VOCABULARY` tokens, in evaluation mode."""
    settings = (EXPERTS | DENSE)[family] if settings is None else settings
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_of(family, {**settings, **changes})).eval()


def recurrent_actor(family: str, settings: dict[str, object] | None = None, **changes: object) -> ActorCritic:
    generator = torch.Generator().manual_seed(5)
    model = recurrent(family, settings, **changes)
    weight = torch.randn(model.config.get_text_config().hidden_size, generator=generator)
    return ActorCritic(model, ValueHead.from_weights(weight, 0.5))


def reference_of(model: PreTrainedModel, family: str, settings: dict[str, object]) -> PreTrainedModel:
    """Return the float64 model with the weights of `model`, with experts one by one: grouped products lack float64."""
    double = recurrent(family, settings).double()
    double.load_state_dict(model.state_dict())
    if double._can_set_experts_implementation():
        double.set_experts_implementation("eager")
    return double
