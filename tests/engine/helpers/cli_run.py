"""A tiny run with a user's files, for tests of the command line."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlhf_engine.cli import main
from rlhf_engine.data import train_tokenizer
from tests.engine.helpers.tiny_models import CONFIGS

ANSWERS = ["yes", "no", "maybe so", "I do not know"]


def new_model(folder, seed=0, family="llama_tied", *, texts=ANSWERS, rows=300, **changes):
    """Write a random model with `rows` tokens and a tokenizer trained on `texts`, as a user would provide them."""
    kind, arguments = CONFIGS[family]
    torch.manual_seed(seed)
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    config = kind(vocab_size=rows, **special, **arguments | {"initializer_range": 0.1} | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer(texts, 300).save_pretrained(folder)
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def new_run(folder, model, *, prompts=10, epochs=1, updates=1):
    """Write the config file of a tiny run and the files that it names; return their folder."""
    lines = {
        "demonstrations": [{"prompt": f"q{i}", "response": ANSWERS[i % 4]} for i in range(8)],
        "comparisons": [{"prompt": f"q{i}", "completions": ANSWERS, "ranking": "A > B = C > D"} for i in range(6)],
        "prompts": [
            {"prompt": f"q{i}", "user_id": f"u{i}", "split": "train" if i < 6 else "test"} for i in range(prompts)
        ],
    }
    for name, records in lines.items():
        write_lines(folder / f"{name}.jsonl", records)
    config = {
        "output_dir": str(folder / "out"),
        "model": {"path": str(model)},
        "data": {name: str(folder / f"{name}.jsonl") for name in lines} | {"validation_share": 0.25},
        "sft": {"epochs": epochs, "batch_size": 4, "optim": {"lr": 1e-3}},
        "reward": {"batch_size": 2, "optim": {"lr": 1e-3}},
        "rollout": {"max_prompt_tokens": 8, "max_response_tokens": 6},
        "ppo": {"updates": updates, "rollout_batch": 4, "minibatch": 2, "microbatch": 2, "optim": {"lr": 1e-3}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def rlhf(capsys, command, *arguments, sets=()):
    """Run a command; return its exit code, stdout and stderr. `sets` are overrides of the config."""
    options = [part for override in sets for part in ("--set", override)]
    with pytest.raises(SystemExit) as exit_:
        main([command, *map(str, arguments), *options])
    shown = capsys.readouterr()
    return exit_.value.code or 0, shown.out, shown.err


def start(capsys, folder, command, *sets, options=()):
    """Run a command with the config of `new_run`; return its exit code, output and errors."""
    return rlhf(capsys, command, "--config", folder / "run.yaml", *options, sets=sets)


def run(capsys, folder, command, *sets, options=()):
    """Run a command as `start` does, which must succeed; return its output."""
    code, out, err = start(capsys, folder, command, *sets, options=options)
    assert code == 0, err
    return out
