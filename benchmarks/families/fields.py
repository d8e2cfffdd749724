"""What reads the fields of a family's config: the model's own code, this engine, or nothing.

The engine runs a model's own trunk, so a field that the trunk's code reads has its effect. The engine replaces the output
layer, the loss and the cache. A field that the class of the causal LM reads in its forward pass must therefore be read here
too.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import rlhf_engine
import rlhf_kernels
from benchmarks.families.configs import FAMILIES

_INITIAL = "it sets the random weights of a new model, and checkpoints have weights"
_EVALUATION = "trunks stay in evaluation mode, in which no dropout and no noise is applied"
_UNUSED = "transformers' code of the model does not read it, and the engine runs that code"
_SPECIAL = "an id for the tokenizer or for encoder-decoder models; the engine reads EOS, BOS and PAD"

HARMLESS: dict[str, str] = {
    "initializer_range": _INITIAL,
    "init_std": _INITIAL,
    "use_cache": "every call of the engine passes it",
    "pretraining_tp": "a split of products over devices in pretraining; " + _UNUSED,
    "num_mtp_layers": "layers that predict further tokens; transformers does not load them",
    "BailingHybridConfig.mtp_loss_scaling_factor": "the loss of layers that predict further tokens, which are not loaded",
    "DeepseekV2Config.norm_topk_prob": _UNUSED,
    "GptOssConfig.hidden_act": _UNUSED,
    "HunYuanDenseV1Config.eod_token_id": _SPECIAL,
    "HunYuanMoEV1Config.eod_token_id": _SPECIAL,
    "HunYuanMoEV1Config.sep_token_id": _SPECIAL,
    "Llama4TextConfig.router_jitter_noise": _EVALUATION,
    "ModernBertDecoderConfig.cls_token_id": _SPECIAL,
    "ModernBertDecoderConfig.sep_token_id": _SPECIAL,
    "MptConfig.emb_pdrop": _EVALUATION,
    "MptConfig.resid_pdrop": _EVALUATION,
    "MptConfig.embedding_fraction": _UNUSED,
    "MptConfig.expansion_ratio": _UNUSED,
    "MptConfig.init_device": _INITIAL,
    "MptConfig.learned_pos_emb": _UNUSED,
    "MptConfig.no_bias": _UNUSED,
    "MptConfig.norm_type": _UNUSED,
    "NemotronHConfig.hidden_dropout": _EVALUATION,
    "NemotronHConfig.mamba_proj_bias": _UNUSED,
    "NemotronHConfig.mamba_ssm_cache_dtype": _UNUSED,
    "NemotronHConfig.moe_shared_expert_overlap": _UNUSED,
    "NemotronHConfig.n_shared_experts": _UNUSED,
    "NemotronHConfig.residual_in_fp32": _UNUSED,
    "Phi3Config.embd_pdrop": _EVALUATION,
    "XGLMConfig.decoder_start_token_id": _SPECIAL,
    "Zamba2Config.use_mem_eff_path": "a choice of kernels",
}
"""Fields without a reader, of every config or of the named class, and why they have no effect here."""

REPLACED: dict[str, str] = {
    "is_moe": "transformers adds the balancing loss for it; the engine reads output_router_logits",
    "max_inference_chunksize": "it splits the product of the output layer, which the engine computes",
    "num_experts": "an argument of the balancing loss; the engine takes the width of the router's logits",
}
"""Fields that the forward pass of a causal LM reads outside of its trunk, and that the engine does not need."""


@cache
def _words_of_the_engine() -> frozenset[str]:
    """Return every name that code of the engine or of the kernels has as an attribute or at the start of a string."""
    folders = [Path(str(package.__file__)).parent for package in (rlhf_engine, rlhf_kernels)]
    text = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    return frozenset(re.findall(r"[\"'.](\w+)\b", text))


@cache
def _words_of_a_module(name: str) -> frozenset[str]:
    """Return every name that a module of transformers reads from a config or has as a string."""
    text = inspect.getsource(sys.modules[name])
    return frozenset(
        word
        for pattern in (r"\b(?:config|cfg|\w+_config)\.(\w+)\b", r"[\"'](\w+)[\"']")
        for word in re.findall(pattern, text)
    )


def fields_of(family: str) -> list[str]:
    """Return the fields that a family's config class defines in addition to those of every config."""
    kind = getattr(transformers, FAMILIES[family][0])
    own = {
        name
        for base in kind.__mro__
        if issubclass(base, PreTrainedConfig)
        for name in vars(base).get("__annotations__", {})
    }
    return sorted(name for name in own - set(PreTrainedConfig.__annotations__) if not name.startswith("_"))


def read_by_engine(field: str) -> bool:
    """Return whether code of the engine or of the kernels names a field."""
    return field in _words_of_the_engine()


def read_by_model(model: PreTrainedModel, field: str) -> bool:
    """Return whether the code of a model, its config or transformers' rotary embeddings reads a field, by any of its names."""
    kind = type(model.config)
    names = {field, *(ours for ours, theirs in kind.attribute_map.items() if theirs == field)}
    modules = {type(model).__module__, "transformers.modeling_rope_utils"}
    modules |= {
        type(module).__module__ for module in model.modules() if type(module).__module__.startswith("transformers")
    }
    if any(names & _words_of_a_module(name) for name in modules):
        return True
    methods = "\n".join(inspect.getsource(kind).split("def ", 1)[1:])
    return any(re.search(rf"self\.{one}\b", methods) for one in names)


def read_after_the_trunk(model: PreTrainedModel) -> set[str]:
    """Return the fields that the forward pass of the causal LM reads outside of its trunk."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward))))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
            text = ast.unparse(node)
            if text.startswith(("self.config.", "self.")):
                found.add(node.attr)
    fields = set(vars(type(model.config)).get("__annotations__", {}))
    return found & fields


def unread(model: PreTrainedModel, family: str) -> list[str]:
    """Return the fields of a family's config that nothing reads and that are not declared harmless."""
    kind = FAMILIES[family][0]
    return [
        name
        for name in fields_of(family)
        if name not in HARMLESS
        and f"{kind}.{name}" not in HARMLESS
        and not read_by_engine(name)
        and not read_by_model(model, name)
    ]


def unread_after_the_trunk(model: PreTrainedModel) -> list[str]:
    """Return the fields that the causal LM reads outside of its trunk and that the engine neither reads nor replaces."""
    return sorted(name for name in read_after_the_trunk(model) if name not in REPLACED and not read_by_engine(name))
