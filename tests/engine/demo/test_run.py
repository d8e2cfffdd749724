"""`rlhf demo`: the base model that the package contains, what it decides, and the commands that it prints at the end."""

import math
import shlex
from importlib.resources import files

import pytest
from safetensors.torch import load_file

from rlhf_engine.config import load_config
from rlhf_engine.data import read_demonstrations, train_tokenizer
from rlhf_engine.data.records import text_of
from rlhf_engine.demo.config import DemoRunConfig
from rlhf_engine.demo.run import BASE, BASE_SETTINGS, CONFIG, DATA, next_commands, settings
from rlhf_engine.evaluate import perplexity, read_documents
from rlhf_engine.model import LanguageModel
from rlhf_engine.recipes import load_model
from tests.engine.helpers.cli_run import rlhf


@pytest.fixture(scope="module")
def base():
    return load_model(load_config(CONFIG, [f"model.path={BASE}"], kind=DemoRunConfig).without_demo())


def test_the_base_model_has_the_settings_of_the_demo(base):
    model, codec = base
    demo, config = load_config(CONFIG, kind=DemoRunConfig).demo, model.config
    assert (config.hidden_size, config.intermediate_size) == (demo.hidden_size, demo.intermediate_size)
    assert (config.num_hidden_layers, config.num_attention_heads) == (demo.layers, demo.heads)
    assert config.vocab_size == demo.vocab_size == len(codec.tokenizer)
    assert {tensor.dtype.itemsize for tensor in load_file(BASE / "model.safetensors").values()} == {2}
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 5e6


def test_the_tokenizer_is_the_one_that_a_run_from_scratch_trains(base):
    pages = (DATA / "pretrain.txt").read_text(encoding="utf-8").strip().split("\n\n")
    records = list(read_demonstrations(DATA / "demonstrations.jsonl"))
    texts = pages + [text for record in records for text in (text_of(record.prompt), record.response)]
    trained = train_tokenizer(texts, base[1].tokenizer.vocab_size)
    assert trained.get_vocab() == base[1].tokenizer.get_vocab()


def test_the_base_model_knows_the_text_that_pretraining_held_out(base, tmp_path):
    """Below 2.2 per token; a model with random weights has about the size of the vocabulary, 1536."""
    model, codec = base
    documents = (DATA / "pretrain.txt").read_text(encoding="utf-8").strip().split("\n\n")
    (tmp_path / "held_out.txt").write_text("\n\n".join(documents[:100]))
    found = perplexity(
        LanguageModel(model), read_documents(tmp_path / "held_out.txt", codec, tmp_path), pad_id=codec.pad_id
    )
    assert 1 < found < 2.2 and math.isfinite(found)


@pytest.mark.parametrize("key", ["demo.layers", "demo.vocab_size", "demo.pretrain.epochs", "demo.pretrain.optim.lr"])
def test_a_property_of_the_base_model_needs_from_scratch(capsys, tmp_path, key):
    assert key in BASE_SETTINGS
    code, _, shown = rlhf(capsys, "demo", "--output", tmp_path / "demo", "--set", f"{key}=3")
    assert code == 2 and key in shown and "add --from-scratch" in shown and shown.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_the_commands_to_try_next_name_the_demo_and_its_data(tmp_path):
    root = tmp_path / "a demo"
    lines = next_commands(root).replace("\\\n", "").splitlines()[2:]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert [command[:2] for command in commands] == [["rlhf", "generate"], ["rlhf", "ppo"], ["rlhf", "plan"]]
    assert all(str(root / "ppo" / "config.yaml") in command for command in commands)
    assert str(files("rlhf_engine.demo") / "data" / "prompts.jsonl") in commands[0]


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ((), "head"),
        (("adapter.rank=16",), "backbone"),
        (("adapter.rank=16", "ppo.value_model=head"), "head"),
        (("ppo.value_model=backbone",), "backbone"),
    ],
)
def test_a_demo_with_adapters_has_an_adapter_for_the_values(overrides, expected):
    assert settings(overrides).ppo.value_model == expected
