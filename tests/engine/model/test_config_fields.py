"""Every field of every supported config is read, or declared harmless with a reason; dropout and noise are off in training."""

import pytest
import torch
import transformers

from benchmarks.families import fields
from benchmarks.families.checks import gradients
from benchmarks.families.configs import FAMILIES, build

KINDS = {kind: family for family, (kind, _) in reversed(FAMILIES.items())}
"""One family for each class of configs."""


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):  # only the classes of the modules matter
        return {family: build(family) for family in KINDS.values()}


def test_every_field_is_read_or_declared_harmless(models):
    found = {family: fields.unread(model, family) for family, model in models.items()}
    assert not {family: names for family, names in found.items() if names}


def test_what_a_causal_lm_reads_after_its_trunk_is_read_by_the_engine(models):
    found = {family: fields.unread_after_the_trunk(model) for family, model in models.items()}
    assert not {family: names for family, names in found.items() if names}


def test_a_new_field_is_noticed(models, monkeypatch):
    kind = transformers.LlamaConfig
    monkeypatch.setitem(kind.__annotations__, "logits_twist", float)
    assert fields.unread(models["llama"], "llama") == ["logits_twist"]


def test_what_is_declared_harmless_has_no_reader(models, monkeypatch):
    declared = set(fields.HARMLESS)
    monkeypatch.setattr(fields, "HARMLESS", {})
    found = {kind: fields.unread(models[family], family) for kind, family in KINDS.items()}
    assert declared <= {name for kind, names in found.items() for one in names for name in (one, f"{kind}.{one}")}


NOISE = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "mixtral": {"router_jitter_noise": 0.5, "attention_dropout": 0.5},
    "phimoe": {"input_jitter_noise": 0.5},
    "minimax_m2": {"router_jitter_noise": 0.5},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", NOISE)
def test_dropout_and_the_noise_of_routers_are_off_in_training(family, checkpointing):
    assert gradients(family, checkpointing=checkpointing, **NOISE[family]) <= 1e-4
