"""Kinds of folders: tokenizers, models, reward models, adapters, and checkpoints of a run."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import AdapterConfig, DataConfig, ModelConfig, RolloutConfig, RunConfig
from rlhf_engine.data import Demonstration, PromptRecord
from rlhf_engine.data.records import Message
from rlhf_engine.manifest import MANIFEST, write_manifest
from rlhf_engine.model.actor_critic import LanguageModel
from rlhf_engine.model.adapter_files import Base
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.saving import save_language_model
from rlhf_engine.recipes.generate import Answerer
from rlhf_engine.recipes.loading import _with_codec, encode_records, load_reward_model
from tests.engine.helpers import tokenizers
from tests.engine.helpers.cli_run import new_model
from tests.engine.helpers.tiny_models import CONFIGS, tiny
from tests.engine.helpers.tiny_trainer import make_trainer
from tests.fuzz.harness import Case, Kind, Wrong
from tests.fuzz.mutations import damage_bytes, damage_json, json_bytes

PROMPTS = "prompts.jsonl"
"""File that an error of a prompt names."""
WEIGHTS = "model.safetensors"


def damage_file(random: Random, path: Path, names: tuple[str, ...] = ()) -> bytes | None:
    """Return the content of a file with a change that fits its kind; None if it is deleted."""
    content, kind = path.read_bytes(), random.random()
    if kind < 0.04:
        return None
    if path.suffix == ".safetensors":
        return damage_tensors(random, content)
    if path.suffix == ".json" and kind < 0.75:
        return json_bytes(damage_json(random, json.loads(content), names))
    return damage_bytes(random, content)


def damage_tensors(random: Random, content: bytes) -> bytes:
    """Return a safetensors file with a changed header, header length or data."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = random.randrange(8)
    if kind <= 2:
        fields = ("dtype", "shape", "data_offsets", "__metadata__")
        header = json_bytes(damage_json(random, json.loads(header), fields))
        return struct.pack("<Q", len(header)) + header + data
    if kind == 3:
        size = random.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", size) + content[8:]
    if kind == 4:
        return content[: 8 + size] + damage_bytes(random, data)
    if kind == 5:
        special = struct.pack("<f", random.choice((math.nan, math.inf, -math.inf, 3e38, 1e-45, 0.0)))
        at = random.randrange(len(data) // 4) * 4
        return content[: 8 + size] + data[:at] + special + data[at + 4 :]
    return damage_bytes(random, content)


def stored_tensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; this reader shares no code with the one that is tested."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    found = {}
    for name, one in header.items():
        if name != "__metadata__":
            begin, end = one["data_offsets"]
            raw = torch.frombuffer(data, dtype=torch.uint8)[begin:end].clone()
            found[name] = raw.view(kinds[one["dtype"]]).reshape(one["shape"])
    return found


class Folder(Kind):
    """A folder some of whose files are changed."""

    files: ClassVar[tuple[str, ...]]
    """Files that are changed, relative to the folder."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Names of fields that damaged JSON may have."""

    def case(self, random: Random) -> Case:
        count = random.choice((1, 1, 1, 2))
        return Case(
            {one: damage_file(random, self.folder / one, self.fields) for one in random.sample(self.files, count)}
        )


def finite_texts(answers: Any) -> None:
    """Raise `Wrong` unless the log-probs of sampled answers are those of probabilities."""
    for values in (row for one in answers for row in one.logprobs):
        if not all(-math.inf < value <= 1e-6 for value in values):
            raise Wrong(f"sampled log-probs {values}")


class TokenizerFiles(Folder):
    """Tokenizers of several kinds, with chat templates, as training encodes texts with them."""

    name, share = "tokenizer", 5
    fields = (
        "eos_token",
        "pad_token",
        "bos_token",
        "chat_template",
        "added_tokens",
        "content",
        "special",
        "id",
        "type",
        "vocab",
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kinds = ("bos", "sentencepiece", "added_tokens", "several_eos", "dated_template")
        for kind in self.kinds:
            tokenizers.KINDS[kind]().save_pretrained(folder / kind)
        kind, sizes = CONFIGS["llama"]
        self.model = AutoModelForCausalLM.from_config(kind(vocab_size=500, **sizes))
        rollout = RolloutConfig(max_prompt_tokens=60, max_response_tokens=20)
        self.config = RunConfig(data=DataConfig(chat_template_date="2026-01-01"), rollout=rollout)

    def case(self, random: Random) -> Case:
        folder = random.choice(self.kinds)
        name = random.choice(sorted(path.name for path in (self.folder / folder).iterdir()))
        return Case({f"{folder}/{name}": damage_file(random, self.folder / folder / name, self.fields)})

    def names(self, case: Case) -> Collection[str]:
        return [str(self.folder), PROMPTS]

    def run(self, case: Case) -> None:
        (name,) = case.files
        folder = self.folder / name.partition("/")[0]
        config = replace(self.config, model=ModelConfig(path=str(folder)))
        _, codec = _with_codec(config, lambda _: self.model, strict=True)
        text, turns = PromptRecord("Hello, dog", line=1), [Message("user", "A dog"), Message("assistant", "four legs")]
        records = [text] + [PromptRecord(tuple(turns[:1]), line=2)] * bool(codec.chat.source)
        rows = list(encode_records(PROMPTS, records, lambda record: codec.encode_prompt(record.prompt)))
        demonstration = Demonstration(tuple(turns[:1]) if codec.chat.source else "A dog", turns[1].content, line=1)
        for examples in encode_records(PROMPTS, [demonstration], codec.examples):
            rows += [[*one.prompt, *one.response] for one in examples]
        rows += [[codec.eos_id, codec.pad_id, *codec.end_ids]]
        for row in rows:
            if not row or not all(type(one) is int and 0 <= one < 500 for one in row):
                raise Wrong(f"got the ids {row}, expected ids below 500")
            if not isinstance(codec.decode_response(row), str):
                raise Wrong(f"{row} does not decode to a text")


_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "head_dim",
    "rms_norm_eps", "hidden_act", "max_position_embeddings", "sliding_window", "tie_word_embeddings", "attention_bias",
    "n_embd", "n_layer", "n_head", "layer_norm_epsilon", "activation_function", "final_logit_softcapping",
)  # fmt: skip
"""Fields of config.json on which a model's output depends."""


class ModelFolder(Folder):
    """Models: config.json, weights and their index, and the settings of generation. A model that loads answers a prompt."""

    name, share = "model", 3
    fields = (
        *_SIZES,
        "model_type",
        "architectures",
        "quantization_config",
        "auto_map",
        "rope_parameters",
        "text_config",
        "layer_types",
    )
    families = ("llama_tied", "gpt2", "gemma2")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for family in self.families:
            new_model(folder / family, family=family)
        model = AutoModelForCausalLM.from_pretrained(folder / "gpt2")
        model.save_pretrained(folder / "gpt2", max_shard_size="20KB")
        (folder / "gpt2" / WEIGHTS).unlink()
        self.config = RunConfig(rollout=RolloutConfig(max_prompt_tokens=8, max_response_tokens=4))

    def case(self, random: Random) -> Case:
        folder = random.choice(self.families)
        kinds = (".json", ".safetensors")
        files = sorted(
            one.name for one in (self.folder / folder).iterdir() if one.suffix in kinds and "tok" not in one.name
        )
        name = "config.json" if random.random() < 0.4 else random.choice(files)
        return Case({f"{folder}/{name}": damage_file(random, self.folder / folder / name, self.fields)})

    def names(self, case: Case) -> Collection[str]:
        return [str(self.folder), PROMPTS]

    def run(self, case: Case) -> None:
        (name,) = case.files
        folder = self.folder / name.partition("/")[0]
        answerer = Answerer(replace(self.config, model=ModelConfig(path=str(folder))), str(folder), seed=0)
        check_weights(answerer.actor.model, folder)
        config = json.loads((folder / "config.json").read_text())
        for key in _SIZES:
            found = getattr(answerer.actor.model.config, key, None)
            if key in config and config[key] is not None and found != config[key]:
                raise Wrong(f"{key}: got {found!r} for {config[key]!r}")
        finite_texts(answerer.answer(PROMPTS, [PromptRecord("q1", line=1)], 1))


def check_weights(model: torch.nn.Module, folder: Path) -> None:
    """Raise `Wrong` unless every weight of a model is the one in its folder's files."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        stored |= stored_tensors(path.read_bytes())
    for key, weight in model.named_parameters():
        found = next((stored[one] for one in (key, key.partition(".")[2]) if one in stored), None)
        if found is None or not torch.equal(found.to(weight.dtype), weight):
            raise Wrong(f"the weight {key} differs from the one in the file")


class RewardFolder(Folder):
    """Reward models of `rlhf rm`."""

    name, share = "reward", 1
    files = ("reward_model.json", "reward_head.safetensors", "config.json", WEIGHTS)
    fields = ("kind", "hidden_size", "skipped_id", "weight", "bias", "architectures", "num_labels")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        RewardModel.from_causal_lm(tiny("llama_tied"), 0).save(folder)
        self.files = tuple(sorted(path.name for path in folder.iterdir()))

    def run(self, case: Case) -> None:
        config = RunConfig()
        model = load_reward_model(replace(config, reward=replace(config.reward, path=str(self.folder))))
        (head,) = self.folder.glob("*head.safetensors")
        stored = stored_tensors(head.read_bytes())
        if not torch.equal(stored["weight"], model.head.weight) or not torch.equal(stored["bias"], model.head.bias):
            raise Wrong("the head differs from the one in the file")
        ids = torch.arange(3, 9)[None]
        score = model(ids, torch.tensor([6]))
        if model.skipped_id is not None and type(model.skipped_id) is not int:
            raise Wrong(f"skipped_id is {model.skipped_id!r}")
        if not bool(score.isfinite()) and bool(
            torch.cat([one.flatten() for one in model.parameters()]).abs().max() < 1e10
        ):
            raise Wrong(f"got the score {score} of finite weights")


class AdapterFolder(Folder):
    """Adapters in peft's format, on a model that is not changed. One that loads answers a prompt."""

    name, share = "adapter", 2
    files = ("adapter_config.json", "adapter_model.safetensors", "rlhf_adapter.json")
    fields = (
        "r",
        "lora_alpha",
        "target_modules",
        "use_rslora",
        "use_dora",
        "base_model_name_or_path",
        "rank_pattern",
        "bias",
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        base = new_model(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(base)
        Adapters.start(model, AdapterConfig(rank=2, targets=("q_proj", "up_proj")), 0, Base.of(base))
        for name, tensor in model.named_parameters():
            if "lora_B" in name or tensor.requires_grad:
                torch.nn.init.normal_(tensor, std=0.1)
        save_language_model(folder, LanguageModel(model), None)
        for path in base.glob("tok*"):
            (folder / path.name).write_bytes(path.read_bytes())
        self.config = RunConfig(
            model=ModelConfig(path=str(folder)), rollout=RolloutConfig(max_prompt_tokens=8, max_response_tokens=4)
        )

    def names(self, case: Case) -> Collection[str]:
        return [str(self.folder), PROMPTS]

    def run(self, case: Case) -> None:
        answerer = Answerer(self.config, str(self.folder), seed=0)
        check_base(answerer, self.folder / "base")
        adapters = answerer.actor.adapters
        assert adapters is not None
        stored = stored_tensors((self.folder / "adapter_model.safetensors").read_bytes())
        loaded = {f"base_model.model.{name}": tensor for name, tensor in adapters.tensors("policy").items()}
        if stored.keys() != loaded.keys() or not all(
            torch.equal(stored[name].float(), loaded[name]) for name in stored
        ):
            raise Wrong("the adapter differs from the one in the file")
        finite_texts(answerer.answer(PROMPTS, [PromptRecord("q1", line=1)], 1))


def check_base(answerer: Answerer, base: Path) -> None:
    stored = stored_tensors((base / WEIGHTS).read_bytes())
    found = dict(answerer.actor.model.named_parameters())
    if not all(torch.equal(tensor, found[name]) for name, tensor in stored.items() if name in found):
        raise Wrong("the weights under the adapter differ from those of the base")


class CheckpointFolder(Folder):
    """Checkpoints of PPO: as they were written, with a manifest of the damaged files, and without a manifest."""

    name, share = "checkpoint", 1

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        first = make_trainer(ema_decay=0.9, score_scale="running", kl_control="adaptive", kl_target=1.0)
        first.step()
        self.config = RunConfig(output_dir=str(folder))
        for place in ("ppo", "sealed", "plain"):
            save_checkpoint(folder / place, first, None, self.config, {"data.prompts": "0" * 64})
        (folder / "plain" / MANIFEST).unlink()
        state = json.loads((folder / "plain" / "trainer.json").read_text())
        state.pop("manifest")
        (folder / "plain" / "trainer.json").write_text(json.dumps(state))
        self.files = tuple(sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()))
        self.expected = self._content(first)
        self.trainer = make_trainer(ema_decay=0.9, score_scale="running", kl_control="adaptive", kl_target=1.0)

    def case(self, random: Random) -> Case:
        name = random.choice(self.files)
        files = {name: damage_file(random, self.folder / name)}
        if name.startswith("sealed/") and not name.endswith(MANIFEST):
            files[f"sealed/{MANIFEST}"] = (self.folder / "sealed" / MANIFEST).read_bytes()
        return Case(files)

    @staticmethod
    def _content(trainer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {**trainer.tensors(), **dict(trainer.weights())}
        return trainer.state(), {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def run(self, case: Case) -> None:
        name = next(iter(case.files))
        place = self.folder / name.partition("/")[0]
        if place.name == "sealed" and not name.endswith(MANIFEST):
            (place / MANIFEST).unlink()
            write_manifest(place, {"done": 1, "score": None})
        resume(place, self.trainer, self.config, {"data.prompts": "0" * 64})
        state, tensors = self._content(self.trainer)
        same = state == self.expected[0] and all(
            torch.equal(tensors[key], one) for key, one in self.expected[1].items()
        )
        if place.name == "ppo" and not same:
            raise Wrong(f"a change of {name} gives different numbers")
        json.dumps(state, allow_nan=False)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise Wrong("loaded a tensor that is not finite")
