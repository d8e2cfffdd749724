"""Loading weights: all of them come from the folder, or an error names the missing one."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.families.configs import build
from rlhf_engine.data import train_tokenizer
from rlhf_engine.model.pretrained import load_pretrained, load_tokenizer
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.saving import load_policy
from tests.engine.helpers.tiny_models import FAMILIES, tiny


def load_causal_lm(folder):
    return load_pretrained(AutoModelForCausalLM, folder, attention="eager")


def load_actor_critic(folder):
    return load_policy(folder)


LOADERS = (load_causal_lm, load_actor_critic, RewardModel.load)


def save(folder, family="llama"):
    """Write a folder that every loader reads, and return the path of its weights."""
    model = tiny(family)
    RewardModel.from_causal_lm(model, seed=0).save(folder)
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_loaded(tmp_path, family):
    save(tmp_path, family)
    saved = tiny(family).state_dict()
    loaded = load_causal_lm(tmp_path)
    assert not loaded.training
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("loader", LOADERS)
def test_a_missing_weight_is_named(tmp_path, loader):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(save(tmp_path), lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"the weight .*layers\.1\.mlp\.up_proj\.weight is missing \(1 missing"):
        loader(tmp_path)


def test_a_missing_untied_head_is_named(tmp_path):
    rewrite(save(tmp_path), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"the weight lm_head\.weight is missing"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_shape_that_differs_from_the_config_is_named(tmp_path, loader):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"got shape .*48.* for the weight .*mlp.*, expected .*40"):
        loader(tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_truncated_weights_file_is_named(tmp_path, loader):
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{tmp_path}.*not a whole safetensors file"):
        loader(tmp_path)


@pytest.mark.parametrize(
    "tensors, message",
    [
        (None, "not a whole safetensors file"),
        ({"w": torch.zeros(3)}, r"got tensors \{'w': \(3,\)\}, expected \{'weight': \(32,\), 'bias': \(\)\}"),
        ({"weight": torch.zeros(31), "bias": torch.zeros(())}, r"got tensors .*31"),
    ],
)
def test_an_invalid_head_is_named(tmp_path, tensors, message):
    save(tmp_path)
    path = tmp_path / "reward_head.safetensors"
    path.write_bytes(b"") if tensors is None else save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"reward_head\.safetensors: {message}"):
        RewardModel.load(tmp_path)


def test_an_index_without_its_map_is_named(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: the file has no weight_map"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("content", [None, "{}", '{"version": '])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    train_tokenizer(["yes", "no"], 260).save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == 260
    path = tmp_path / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}: its tokenizer does not load: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gptj", "mpt"])
def test_a_model_without_sdpa_uses_eager_attention_and_logs_it(tmp_path, caplog, family):
    build(family).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(AutoModelForCausalLM, tmp_path)
    assert model.config._attn_implementation == "eager"
    assert "model.attention" in caplog.text and "'eager' is used" in caplog.text


def test_a_model_with_sdpa_keeps_it(tmp_path, caplog):
    build("gemma3").save_pretrained(tmp_path)
    assert load_pretrained(AutoModelForCausalLM, tmp_path).config._attn_implementation == "sdpa"
    assert not caplog.text


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_an_attention_that_is_not_installed_names_the_setting(tmp_path, family):
    build(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^attention: got 'flash_attention_2'.*set model\.attention=eager$"):
        load_pretrained(AutoModelForCausalLM, tmp_path, attention="flash_attention_2")
