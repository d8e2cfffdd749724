"""Checkpoints that would load with a part dropped or misread are refused, and code from a folder runs only if trusted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_engine.model.pretrained import load_pretrained, load_tokenizer
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.saving import load_policy
from tests.engine.helpers.cli_run import new_model, new_run, rlhf
from tests.engine.helpers.tiny_models import tiny


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def causal(folder):
    return load_pretrained(AutoModelForCausalLM, folder)


QUANTISED = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "mxfp4": {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints_are_refused_in_one_line(tmp_path, method):
    RewardModel.from_causal_lm(tiny(), 0).save(tmp_path)
    tiny().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **{"quantization_config": None} | QUANTISED[method])
    for loader in (causal, load_policy, RewardModel.load):
        with pytest.raises(ValueError, match=f"got weights quantised with {method}, expected float32") as caught:
            loader(tmp_path)
        assert "\n" not in str(caught.value)


def test_files_and_weights_of_quantised_models_are_noticed_without_a_config(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(ValueError, match="got weights quantised with gptq"):
        causal(tmp_path)
    (tmp_path / "quantize_config.json").unlink()
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    # The scales of such a weight are a separate tensor, which a causal LM does not have.
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="got weights quantised with the dtype F8_E4M3"):
        causal(tmp_path)


@pytest.mark.parametrize(
    "family, field", [("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("granite", "num_hidden_layers")]
)
def test_hundreds_of_layers_without_weights_are_refused_before_they_are_built(tmp_path, family, field):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    layers = content[field]
    (tmp_path / "config.json").write_text(json.dumps(content | {field: 1_000_000}))
    with pytest.raises(ValueError, match=f"config.json: got 1000000 layers, and its weights are of {layers}$"):
        load_pretrained(AutoModelForCausalLM, tmp_path)


def test_a_model_of_a_different_kind_is_refused(tmp_path):
    RewardModel.from_causal_lm(tiny("llama_tied"), 0).save(tmp_path / "rm")
    with pytest.raises(
        ValueError,
        match=r"rm: got a LlamaModel \(architectures in its config.json\), expected a causal language model, such as "
        r"LlamaForCausalLM; set a reward model as reward.path or eval.judge$",
    ):
        causal(tmp_path / "rm")
    (tmp_path / "rm" / "reward_model.json").unlink()
    with pytest.raises(ValueError, match=r"such as LlamaForCausalLM$"):
        causal(tmp_path / "rm")


def test_a_causal_lm_is_no_reward_model(tmp_path):
    tiny("llama_tied").save_pretrained(tmp_path / "sft")
    with pytest.raises(
        ValueError,
        match=r"sft is not a reward model \(it has no reward_model.json\); give the folder that rlhf rm wrote, or a sequence "
        "classifier with one label$",
    ):
        RewardModel.load(tmp_path / "sft")


@pytest.mark.parametrize("head", ["score.weight", "v_head.summary.weight", "classifier.dense.weight"])
def test_a_head_is_never_dropped(tmp_path, head):
    """The config describes a causal LM, and with tied embeddings nothing is missing."""
    tiny("llama_tied").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {head: torch.ones(1, 32)}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"the weight {head} is no part of LlamaForCausalLM and would be lost \(1 such"
    ):
        causal(tmp_path)


def test_unused_weights_within_the_trunk_are_logged(tmp_path, caplog):
    """A smaller number of layers in config.json is a known way to cut a model."""
    tiny().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", num_hidden_layers=1)
    assert len(causal(tmp_path).model.layers) == 1
    assert (
        "9 weights are not used by LlamaForCausalLM, the first is model.layers.1.input_layernorm.weight" in caplog.text
    )


def test_formats_that_are_not_read_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the file config.json is missing; the folder holds adapters of peft"):
        causal(tmp_path)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got adapters of peft; merge them"):
        causal(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model.safetensors is missing; the folder holds weights in pickle files"):
        causal(tmp_path)


# ---- code in a model's folder ----

CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model


class MineConfig(Qwen2Config):
    model_type = "mine"


class Mine(Qwen2ForCausalLM):
    config_class = MineConfig


class MineModel(Qwen2Model):
    config_class = MineConfig
"""
PLACES = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine", "AutoModel": "mine.MineModel"}


@pytest.fixture
def remote(tmp_path):
    """Return a run whose model needs the code in its folder."""
    base = new_model(tmp_path / "base", family="qwen2_tied")
    edit(base / "config.json", model_type="mine", auto_map=PLACES)
    (base / "mine.py").write_text(CODE)
    return new_run(tmp_path, base)


def test_code_of_a_folder_runs_only_if_it_is_trusted(remote, capsys):
    out, config = remote / "out", ("--config", remote / "run.yaml")
    code, _, err = rlhf(capsys, "sft", *config)
    assert code == 2 and "needs Python code from its folder (auto_map)" in err and "model.trust_remote_code=true" in err
    assert not out.exists()
    trusted = "model.trust_remote_code=true"
    assert rlhf(capsys, "sft", *config, sets=[trusted])[0] == 0
    assert rlhf(capsys, "rm", *config, sets=[trusted])[0] == 0
    sets = [trusted, f"model.path={out / 'sft'}", f"reward.path={out / 'rm'}"]
    assert rlhf(capsys, "ppo", *config, sets=sets)[0] == 0
    assert rlhf(capsys, "ppo", *config, "--resume", sets=[*sets, "ppo.updates=2"])[0] == 0
    model = AutoModelForCausalLM.from_pretrained(out / "ppo", trust_remote_code=True)
    assert type(model).__name__ == "Mine" and (out / "ppo" / "mine.py").is_file()
    with pytest.raises(ValueError, match=r"trust_remote_code"):
        RewardModel.load(out / "rm")


def test_a_tokenizer_with_code_never_asks_on_the_terminal(remote, capsys, monkeypatch):
    """An answer on the terminal would never come from a run in the background."""

    def asked(question=""):
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", asked)
    path = remote / "base" / "tokenizer_config.json"
    edit(path, tokenizer_class="Mine", auto_map={"AutoTokenizer": [None, "words.Mine"]})
    (remote / "base" / "words.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    clean = ("data", "clean", "--in", remote / "prompts.jsonl", "--out", remote / "clean", "--tokenizer", path.parent)
    code, _, err = rlhf(capsys, *clean)
    assert code == 2 and err.startswith(f"rlhf: {path}: the model needs Python code from its folder")
    assert rlhf(capsys, *clean, sets=["model.trust_remote_code=true"])[0] == 0
    assert type(load_tokenizer(path.parent, trust_remote_code=True)).__name__ == "Mine"
