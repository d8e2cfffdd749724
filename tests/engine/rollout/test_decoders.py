"""The decoder protocol: both decoders implement it, a generator uses nothing else, and only the selected one is loaded."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from transformers import cache_utils

import rlhf_engine
from rlhf_engine.config import RolloutConfig
from rlhf_engine.rollout import Generator
from rlhf_engine.rollout.decode import make_decoder
from rlhf_engine.rollout.decode.paged import PagedDecoder
from rlhf_engine.rollout.decode.protocol import Decoder
from rlhf_engine.rollout.decode.recurrent import RecurrentDecoder
from rlhf_engine.rollout.decode.slots import SlotDecoder
from tests.engine.helpers.recurrent_models import recurrent_actor
from tests.engine.helpers.sampling import ENDS, make_actor, make_prompts, same_sequence

ROOT = Path(rlhf_engine.__file__).parents[1]
METHODS = [name for name, member in vars(Decoder).items() if inspect.isfunction(member) and not name.startswith("_")]
FIELDS = ["slots", "rows", "cache_bytes"]
RECURRENT_CACHE = hasattr(cache_utils, "DummyLayer")
"""Whether this release of transformers has the cache of recurrent states; if not, sampling refuses such models."""


def shape(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("kind", [SlotDecoder, PagedDecoder, RecurrentDecoder])
def test_an_implementation_has_every_method_with_the_same_arguments(kind):
    assert len(METHODS) == 11 and Decoder not in kind.__mro__
    if kind is RecurrentDecoder and not RECURRENT_CACHE:
        with pytest.raises(ValueError, match=r"no DummyLayer; install transformers 5\.23 to sample from it"):
            kind(recurrent_actor("lfm2"), 4, 32)
        return
    decoder = kind(recurrent_actor("lfm2") if kind is RecurrentDecoder else make_actor(), 4, 32)
    assert decoder.slots == 4 <= decoder.rows and decoder.cache_bytes > 0
    for name in METHODS:
        assert shape(getattr(kind, name)) == shape(getattr(Decoder, name)), name


class Narrow:
    """A decoder with only the members of the protocol."""

    def __init__(self, decoder):
        self._decoder = decoder

    def __getattr__(self, name):
        assert name in (*METHODS, *FIELDS), f"{name} is not in the protocol"
        return getattr(self._decoder, name)


@pytest.mark.parametrize("cache", ["slots", "paged", *(["recurrent"] if RECURRENT_CACHE else [])])
def test_a_generator_uses_only_the_protocol(cache):
    actor, prompts = recurrent_actor("lfm2") if cache == "recurrent" else make_actor(), make_prompts(20)
    layout = "auto" if cache == "recurrent" else cache
    config = RolloutConfig(max_prompt_tokens=20, max_response_tokens=12, batch_size=6, cache=layout)
    marks = {"eos_token_ids": ENDS, "pad_token_id": 0, "seed": 3}
    narrow = Generator(actor, config, **marks, decoder=Narrow(make_decoder(actor, config, 32)))
    found = narrow.generate(prompts, torch.arange(20))
    expected = Generator(actor, config, **marks).generate(prompts, torch.arange(20))
    assert all(same_sequence(found, row, expected, row) for row in range(20))
    assert narrow.metrics() == ({"restarted_sequences": 0} if cache == "paged" else {})
    assert narrow.cache_bytes > 0


def loaded_with(module: str) -> set[str]:
    """Return the engine's modules that importing `module` loads, from the imports outside functions."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        path = ROOT.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not name.startswith("rlhf_engine") or not path.is_file():
            continue
        found.add(name)
        waiting.append(name.rpartition(".")[0])
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return found


def test_only_the_decoder_that_is_used_is_loaded():
    decoders = {f"rlhf_engine.rollout.decode.{name}" for name in ("slots", "cpu", "paged", "pages", "gpu", "recurrent")}
    assert "rlhf_engine.rollout.decode.protocol" in loaded_with("rlhf_engine.ppo.trainer")
    assert not loaded_with("rlhf_engine.ppo.trainer") & decoders
    with_slots = loaded_with("rlhf_engine.rollout.decode.slots") & decoders
    assert {name.rpartition(".")[2] for name in with_slots} == {"slots", "cpu"}
    left_out = decoders - loaded_with("rlhf_engine.rollout.decode.paged")
    assert {name.rpartition(".")[2] for name in left_out} == {"slots", "recurrent"}
