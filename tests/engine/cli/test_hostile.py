"""Broken inputs through the command line: each ends in one line that names what to change, and in exit code 2.

`edit` writes or changes the files of a tiny run, whose folder is the current one; the model's folder is `base`.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.helpers.cli_run import new_model, new_run, rlhf, write_lines

BASE = "base"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return new_model(tmp_path_factory.mktemp("base"))


def content(path, value):
    """Write a text, bytes, or a JSON value that replaces fields of the file."""

    def edit(run):
        file = run / path
        if isinstance(value, dict):
            file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | value))
        else:
            file.write_bytes(value if isinstance(value, bytes) else value.encode())

    return edit


def config(**fields):
    return content(f"{BASE}/config.json", fields)


def tensors(change):
    def edit(run):
        path = run / BASE / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return edit


def rewards(body):
    return content("rewards.py", f"def reward(prompts, answers):\n    {body}\n")


def lines(name, *records):
    return lambda run: write_lines(run / name, records)


def chat(template):
    """Set a chat template, and demonstrations that are conversations."""

    def edit(run):
        content(f"{BASE}/tokenizer_config.json", {"chat_template": template})(run)
        (run / BASE / "chat_template.jinja").unlink(missing_ok=True)
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
        write_lines(run / "demonstrations.jsonl", [{"messages": messages}, {"messages": messages}])

    return edit


def poisoned(found):
    found["model.norm.weight"][0] = float("nan")


def folder(path):
    return lambda run: (run / path).mkdir(parents=True)


NORM = "model.layers.0.input_layernorm.weight"
MODEL = {
    "config-empty": (content(f"{BASE}/config.json", ""), "config.json: not valid JSON"),
    "config-list": (content(f"{BASE}/config.json", "[]"), "config.json: got list, expected an object"),
    "config-binary": (content(f"{BASE}/config.json", b"\x80\x00\xff"), "config.json"),
    "config-nested": (content(f"{BASE}/config.json", "[" * 100_000), "config.json: not valid JSON"),
    "type-unknown": (config(model_type="nonsense"), "config.json: ValueError"),
    "type-missing": (content(f"{BASE}/config.json", '{"hidden_size": 4}'), "config.json"),
    "type-number": (config(model_type=3), "config.json"),
    "hidden-text": (config(hidden_size="wide"), "hidden_size"),
    "hidden-odd": (config(hidden_size=33), "hidden size (33)"),
    "heads-none": (config(num_attention_heads=0), "base"),
    "heads-uneven": (config(num_key_value_heads=3), "base"),
    "layers-negative": (config(num_hidden_layers=-1), "num_hidden_layers: got -1, expected at least 1"),
    "layers-more": (config(num_hidden_layers=3), "is missing"),
    "vocabulary-none": (config(vocab_size=0), "base"),
    "activation-unknown": (config(hidden_act="nope"), "transformers"),
    "rope-unknown": (config(rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4}), "base"),
    "dtype-unknown": (config(dtype="float7", torch_dtype="float7"), "base"),
    "weights-empty": (content(f"{BASE}/model.safetensors", b""), "not a whole safetensors file"),
    "weights-noise": (content(f"{BASE}/model.safetensors", b"\xff" * 4096), "not a whole safetensors file"),
    "weights-shape": (tensors(lambda found: found.update({NORM: torch.ones(7)})), f"for the weight {NORM}"),
    "weights-missing": (tensors(lambda found: found.pop(NORM)), f"the weight {NORM} is missing"),
    "weights-nan": (tensors(poisoned), "the weight model.norm.weight is not finite"),
    "index-list": (content(f"{BASE}/model.safetensors.index.json", "[]"), "got list, expected an object"),
    "index-shard": (content(f"{BASE}/model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}), "b.saf"),
    "index-number": (content(f"{BASE}/model.safetensors.index.json", {"weight_map": {"a": 3}}), "index.json"),
    "tokenizer-empty": (content(f"{BASE}/tokenizer.json", ""), "its tokenizer does not load"),
    "tokenizer-noise": (content(f"{BASE}/tokenizer.json", b"\x00\xff"), "its tokenizer does not load"),
    "tokenizer-model": (content(f"{BASE}/tokenizer.json", {"model": {"type": "BPE"}}), "its tokenizer does not load"),
    "tokenizer-list": (content(f"{BASE}/tokenizer_config.json", "[]"), "its tokenizer does not load"),
    "tokenizer-text": (content(f"{BASE}/tokenizer_config.json", "{"), "its tokenizer does not load"),
    "generation-text": (content(f"{BASE}/generation_config.json", "{"), "generation_config.json: not valid JSON"),
    "generation-list": (content(f"{BASE}/generation_config.json", "[]"), "generation_config.json: got list"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised with gptq"),
    "quantised-unknown": (config(quantization_config={"quant_method": "mine"}), "quantised with mine"),
    "quantised-list": (config(quantization_config=[1]), "config.json"),
    "own-code": (config(model_type="own", auto_map={"AutoConfig": "own.Own"}), "model.trust_remote_code=true"),
    "adapters": (content(f"{BASE}/adapter_config.json", "{}"), "adapters of peft"),
    "classifier": (config(architectures=["LlamaForSequenceClassification"]), "expected a causal language model"),
    "architectures-text": (config(architectures="Mine"), "base"),
    "architectures-number": (config(architectures=0.05), "architectures: got float, expected a list"),
    "softcap-text": (config(final_logit_softcapping="x"), "final_logit_softcapping in its config: got 'x'"),
    "weights-huge": (tensors(lambda found: found[NORM].fill_(3e38)), "results for ordinary tokens are not finite"),
    "tokenizer-length": (content(f"{BASE}/tokenizer_config.json", {"model_max_length": "x"}), "cannot encode a text"),
    "chat-number": (content(f"{BASE}/tokenizer_config.json", {"chat_template": 0.5}), "chat_template: got float"),
    "chat-divides": (chat("{{ 1 / 0 }}"), "template rejects them: ZeroDivisionError"),
    "chat-syntax": (chat("{% for %}"), "template"),
    "chat-raises": (chat("{{ raise_exception('no such role') }}"), "no such role"),
    "chat-undefined": (chat("{{ messages[9].content.strip() }}"), "template"),
}
DATA = {
    "data-binary": (content("demonstrations.jsonl", b"\x80\xff\x00"), "demonstrations.jsonl"),
    "data-utf16": (content("demonstrations.jsonl", '{"prompt": "q"}'.encode("utf-16")), "demonstrations.jsonl"),
    "data-empty": (content("demonstrations.jsonl", ""), "no records to train on"),
    "data-list": (content("demonstrations.jsonl", "[1]\n"), "demonstrations.jsonl:1"),
    "data-number": (lines("demonstrations.jsonl", {"prompt": 3, "response": "a"}), "demonstrations.jsonl:1"),
    "data-nested": (content("demonstrations.jsonl", "[" * 100_000 + "\n"), "demonstrations.jsonl:1"),
    "data-one": (lines("demonstrations.jsonl", {"prompt": "q", "response": "a"}), "expected at least 2 prompts"),
    "data-surrogate": (
        content("demonstrations.jsonl", '{"prompt": "\\ud800", "response": "a"}\n' * 3),
        "nstrations.jsonl",
    ),
    "data-role": (lines("demonstrations.jsonl", {"messages": [{"role": 1, "content": 2}]}), "demonstrations.jsonl:1"),
    "data-folder": (
        lambda run: ((run / "demonstrations.jsonl").unlink(), folder("demonstrations.jsonl")(run)),
        "demon",
    ),
}
REWARD = {
    "reward-raises": (rewards("raise KeyError('no idea')"), "no idea"),
    "reward-exits": (rewards("raise SystemExit(0)"), "SystemExit"),
    "reward-recurses": (rewards("return reward(prompts, answers)"), "RecursionError"),
    "reward-text": (rewards("return 'good'"), "expected a list of 2 numbers"),
    "reward-count": (rewards("return [1.0]"), "got 1 scores, expected 2"),
    "reward-complex": (rewards("return [1j] * len(answers)"), "expected a number"),
    "reward-none": (rewards("return None"), "expected a list of 2 numbers"),
    "reward-syntax": (content("rewards.py", "def reward(:\n"), "SyntaxError"),
    "reward-import": (content("rewards.py", "import a_module_of_nobody\n"), "a_module_of_nobody"),
    "reward-number": (content("rewards.py", "reward = 3\n"), "'reward' in rewards.py is int"),
}
OUTPUT = {
    "output-file": (content("out", ""), "output_dir"),
    "metrics-folder": (folder("out/metrics.jsonl"), "metrics.jsonl"),
}
SETTINGS = {
    "device": ("device=cuda:99", "device: got 'cuda:99'"),
    "output-below-a-file": ("output_dir=run.yaml/x", "output_dir"),
    "output-too-long": (f"output_dir={'x' * 300}", "File name too long"),
    "model-file": ("model.path=run.yaml", "run.yaml: no such folder"),
    "model-hub": ("model.path=gpt2", "gpt2: no such folder"),
    "key-empty": ("=3", "expected section.key=value"),
    "value-noise": ("seed={", "not valid YAML"),
}


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    shutil.copytree(base, tmp_path / BASE)
    monkeypatch.chdir(tmp_path)
    return new_run(tmp_path, BASE)


def one_line(capsys, command, sets=()):
    """Run a command that must fail; return its line."""
    code, _, err = rlhf(capsys, command, "--config", "run.yaml", sets=sets)
    assert code == 2, err
    # A notice names the format of a file that is not in ours.
    err = "".join(line for line in err.splitlines(keepends=True) if " rows in the format " not in line)
    assert err.startswith("rlhf: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert "an error in" not in err, f"no check foresaw it: {err}"
    return err


@pytest.mark.parametrize("case", [*MODEL, *DATA])
def test_a_broken_model_or_data_set(run, capsys, case):
    edit, expected = (MODEL | DATA)[case]
    edit(run)
    assert expected in one_line(capsys, "sft")
    assert not (run / "out").exists()


@pytest.mark.parametrize("case", REWARD)
def test_a_broken_reward_function(run, capsys, case):
    edit, expected = REWARD[case]
    edit(run)
    assert expected in one_line(capsys, "ppo", ["reward.function=rewards.py:reward", "ppo.value_init=zero"])
    assert not (run / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("case", OUTPUT)
def test_a_broken_output_folder(run, capsys, case):
    edit, expected = OUTPUT[case]
    edit(run)
    assert expected in one_line(capsys, "sft")


@pytest.mark.parametrize("case", SETTINGS)
def test_a_broken_setting(run, capsys, case):
    setting, expected = SETTINGS[case]
    assert expected in one_line(capsys, "sft", [setting])


def test_there_are_enough_cases():
    assert len(MODEL | DATA | REWARD | OUTPUT | SETTINGS) >= 60
