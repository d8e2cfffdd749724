"""Commands with adapters: what they write, what they continue from, and what is refused."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.engine.helpers.cli_run import new_model, new_run, rlhf

RANK = "adapter.rank=2"


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Run sft, rm and ppo with adapters once; return the folder of the run."""
    folder = tmp_path_factory.mktemp("adapters")
    new_run(folder, new_model(folder / "base"), updates=2)
    return folder


def run(capsys, folder, command, *sets, options=()):
    code, out, err = rlhf(capsys, command, "--config", folder / "run.yaml", *options, sets=sets)
    assert code == 0, err
    return out


def files(folder):
    return {path.name for path in folder.iterdir()}


def pipeline(capsys, folder):
    """Run the stages that are missing, as a user does: only adapter.rank differs from full fine-tuning."""
    out = folder / "out"
    if not (out / "sft").is_dir():
        run(capsys, folder, "sft", RANK)
    if not (out / "rm").is_dir():
        run(capsys, folder, "rm", RANK, f"model.path={out / 'sft'}")
    if not (out / "ppo").is_dir():
        sets = [
            RANK,
            f"model.path={out / 'sft'}",
            f"reward.path={out / 'rm'}",
            "ppo.value_model=backbone",
            "ppo.ema_decay=0.9",
        ]
        run(capsys, folder, "ppo", *sets)
    return out


def test_every_stage_writes_an_adapter_that_peft_loads(stages, capsys):
    out = pipeline(capsys, stages)
    base = AutoModelForCausalLM.from_pretrained(stages / "base")
    ids = torch.arange(3, 15)[None]
    plain = base(input_ids=ids).logits
    for place in (out / "sft", out / "rm", out / "ppo", out / "ppo" / "ema", out / "ppo" / "value_model"):
        assert {"adapter_config.json", "adapter_model.safetensors", "rlhf_adapter.json"} <= files(place)
        assert not {"config.json", "model.safetensors"} & files(place)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stages / "base"), place).eval()
        assert (loaded(input_ids=ids).logits - plain).abs().max() > 1e-6, place
    assert "reward_head.safetensors" in files(out / "rm") & files(out / "ppo" / "value_model")
    assert json.loads((out / "sft" / "adapter_config.json").read_text())["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
