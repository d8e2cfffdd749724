"""Settings of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, Section


@dataclass(frozen=True)
class ModelConfig(Section):
    """The causal language model that the policy starts from."""

    path: str | None = None
    """Folder of a Hugging Face causal LM and its tokenizer. None is valid only for commands that do not load a model
    from here."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers for scoring, training and prefill; flash_attention_2 needs a GPU and the
    package flash-attn. A model that has no sdpa in transformers, such as Gemma 2 or gpt-oss, uses eager, with a line
    in the log. Decode steps use the attention of the engine, except with eager."""
    quant: Literal["none", "int8", "nf4", "fp8"] = "none"
    """Format of the linear layers within the model's layers, which are then frozen: int8 or fp8 with one scale per output
    (torchao), or nf4 with one per 64 weights (bitsandbytes); `pip install 'rlhf-kernels[quant]'`. Other weights keep
    `dtype`. Training needs `adapter.rank` above 0. A reward model or a judge is quantised in the same way."""
    trust_remote_code: bool = False
    """Whether Python code in a model's folder may run (auto_map in its config.json or tokenizer_config.json). Such code
    can do anything that the user who starts the run can do, so read it first. If False, a model or tokenizer that needs
    such code is refused."""
    router_aux_loss: bool = True
    """Add the balancing loss of experts to the losses of SFT and PPO if the model's config asks for it, as transformers
    does (output_router_logits, router_aux_loss_coef). The metric is `router_aux_loss`. The step of objective trpo and
    PPO-ptx do not have it."""
    train_layers: Count | None = None
    """Number of layers at the top of the model that are trained, with the final norm and the output layer. The
    embedding, an output layer that is tied to it, and the layers below are frozen. With adapter.rank, only these layers
    have adapters. If None, all layers are trained."""
