"""Errors of the memory plan, and their messages."""

import json
import re
from dataclasses import replace

import pytest
from transformers import RwkvConfig

from benchmarks.families.recurrent import DENSE
from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.planner import MemoryPlan, ModelShape, UnknownMemoryError, Workload
from rlhf_engine.planner.report import refuse
from rlhf_engine.planner.strategies import _tried
from tests.engine.helpers.plans import RUN, SMALL
from tests.engine.helpers.recurrent_models import config_of


def test_an_unknown_architecture_names_the_fields_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"model_type 'rwkv' without num_attention_heads/n_head.*expected one of gpt2"):
        ModelShape.from_config(RwkvConfig(num_hidden_layers=2, hidden_size=8, vocab_size=10))
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ValueError, match=r"nonesuch.*vocab_size, hidden_size/n_embd, intermediate_size"):
        ModelShape.of(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"got 'no/such', expected a folder with a config.json, or one of qwen2.5-0.5b"
    ):
        ModelShape.of("no/such")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "abc"}, "'hidden_size'.*expected int, got str"),
        (
            {"hidden_size": 64, "num_attention_heads": 5},
            r"\(64\) is not a multiple of the number of attention heads \(5\)",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0, expected at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: got 0, expected at least 1"),
        ({"model_type": ["a"]}, "TypeError: unhashable"),
        ({"torch_dtype": "float99"}, "float99"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0, expected at least 1"),
        ({"hidden_size": -64, "num_attention_heads": 4}, "hidden_size: got -64, expected at least 1"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of 4"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: got 0, expected at least 1"),
    ],
)
def test_a_config_that_describes_no_model_is_refused_with_its_file(tmp_path, fields, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama"} | fields))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{words}"):
        ModelShape.of(str(tmp_path))


def test_a_prompt_longer_than_the_context_is_refused():
    config = RunConfig.from_dict({"rollout": {"max_prompt_tokens": 40, "max_response_tokens": 24}})
    assert Workload.of(config, SMALL, None).length == 64
    with pytest.raises(
        ValueError, match="max_prompt_tokens 40 and max_response_tokens 24, expected at most 63 together"
    ):
        Workload.of(config, SMALL, SMALL)


def test_trpo_is_not_planned():
    config = RunConfig.from_dict({"ppo": {"objective": "trpo", "trpo": {}}, "model": {"attention": "eager"}})
    with pytest.raises(ValueError, match=r"ppo\.objective: got 'trpo', whose memory the plan does not know"):
        Workload.of(config, SMALL, None)


def test_a_budget_that_is_too_small_is_refused_with_the_missing_bytes():
    shape = ModelShape.of("qwen2.5-0.5b")
    workload = Workload(shape, shape, 64, 64, 16, 16, 16, 16, device="cuda")
    peak = MemoryPlan.of(workload).peak
    refuse(MemoryPlan.of(replace(workload, budget=peak)))
    with pytest.raises(ValueError, match=r"which is 102.4 MiB too small.*would fit \(\d"):
        refuse(MemoryPlan.of(replace(workload, budget=peak - 2**30 // 10)))
    with pytest.raises(ValueError, match=r"no strategy that was tried fits, the smallest peak is \d+\.\d\d GiB with"):
        refuse(MemoryPlan.of(replace(workload, budget=2**30)))
    with pytest.raises(ValueError, match=r"which is 9 bytes too small"):
        refuse(MemoryPlan.of(replace(workload, budget=peak - 9)))


def test_tried_strategies_are_compatible_with_the_rest_of_the_config():
    """8-bit state supports only one form of epsilon, and the current value of a setting is tried too."""
    shape = ModelShape.of("qwen2.5-0.5b")

    def states(**memory):
        sets = [f"memory.{name}={value}" for name, value in memory.items()]
        found = {}
        for form in ("corrected", "raw"):
            config = load_config(None, ["device=cuda", f"ppo.optim.eps_form={form}", *sets])
            workload = replace(Workload.of(config, shape, shape), budget=12 * 2**30)
            found[form] = {one.plan.workload.optimizer_state for one in _tried(workload)}
        return found

    assert states() == {"corrected": {"resident", "8bit", "host"}, "raw": {"resident", "host"}}
    always = load_config(None, ["device=cuda", "adapter.rank=4", "rollout.merge_adapters=always"])
    tried = list(_tried(replace(Workload.of(always, shape, shape), budget=12 * 2**30)))
    assert tried and {one.plan.workload.quant for one in tried} == {"none"}
    on_cpu = replace(RUN, optimizer_state="host", budget=2**30)  # on a CPU it is tried only as the current value
    assert "host" in {one.plan.workload.optimizer_state for one in _tried(on_cpu)}


def test_quantised_strategies_have_adapters_and_known_layers():
    tried = list(_tried(replace(RUN, budget=2**30)))
    quantised = [one.plan.workload for one in tried if one.plan.workload.quant != "none"]
    assert {one.quant for one in quantised} == {"int8", "nf4"} and all(one.adapter for one in quantised)
    recurrent = ModelShape.from_config(config_of("mamba2", DENSE["mamba2"]))
    tried = list(_tried(replace(RUN, policy=recurrent, reward=None, budget=2**30)))
    assert tried and {one.plan.workload.quant for one in tried} == {"none"}
    config = load_config(None, ["model.quant=int8", "adapter.rank=2"])
    with pytest.raises(UnknownMemoryError, match=r"model\.quant: got 'int8' for a model with recurrent states"):
        Workload.of(config, recurrent, None)
    with pytest.raises(ValueError, match=r"model\.quant: got 'int8' with adapter\.rank 0"):
        Workload.of(load_config(None, ["model.quant=int8"]), ModelShape.of("qwen2.5-0.5b"), None)
