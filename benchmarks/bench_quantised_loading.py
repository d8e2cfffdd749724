"""Peak memory of loading a model with quantised layers, each format in a separate process.

Measured: the peak resident set above the resident set after the imports. The files are in float32. The bound is 1.15 times the
bytes of the loaded model plus the float32 bytes of one layer. "none" loads the same model unquantised, for comparison.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import MB, Check, Session, Worker, alternate_workers, report
from rlhf_engine.model.pretrained import load_pretrained
from rlhf_engine.model.quantised import FORMATS, check_device, quantised_bytes
from rlhf_engine.planner import ModelShape

NAME = "quantised_loading"
FIELDS = {"model_type": "llama", "vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 2816}
FIELDS |= {"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}
"""A model of 107 million weights, 426 MB in float32."""
QUICK = {"num_hidden_layers": 1, "vocab_size": 1000}
ALLOWED, FLOAT = 1.15, torch.float32.itemsize


def worker(session: Session, *, fields: dict, folder: str, quant: str) -> None:
    """Load the model once, as one step of the session."""
    check_device(quant, "cpu")  # imports the package of the format
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))  # imports the code of the model
    session.baseline()
    session.ready()
    while session.begin():
        model = load_pretrained(AutoModelForCausalLM, folder, quant=quant)
        session.end()
        del model


def loaded_bytes(shape: ModelShape, quant: str) -> int:
    """Return the bytes of a model in a format."""
    if quant == "none":
        return shape.parameters * FLOAT
    inside = sum(layers * quantised_bytes(quant, rows, columns) for layers, rows, columns in shape.matrices())
    return (shape.parameters - shape.layer_matrices) * FLOAT + inside


def main(*, quick: bool = False) -> None:
    """Write the model to a temporary folder, and load it in every format; a small one if `quick`."""
    fields = FIELDS | (QUICK if quick else {})
    shape, checks = ModelShape.from_fields(fields), []
    layer = FLOAT * shape.layer_matrices // shape.layers
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(folder)
        rows = []
        for quant in ("none", *FORMATS):
            case = {"fields": fields, "folder": folder, "quant": quant}
            loaded = loaded_bytes(shape, quant)
            note = f"{loaded / MB:.0f} MB loaded, {layer / MB:.0f} MB per layer"
            target = "benchmarks.bench_quantised_loading:worker"
            one = Worker(quant, target, case, start_limit=300, step_limit=600, note=note)
            (row,) = alternate_workers([one], rounds=1, warmup=0)
            rows.append(row)
            if quant != "none":
                share = None if row.error else row.extra_mb * MB / (ALLOWED * loaded + layer)
                checks.append(Check(f"{quant}: peak by {ALLOWED} of the model and a layer", share, 1.0))
    report(NAME, "peak memory of loading a quantised model", rows, checks=checks)


def test_quantised_loading() -> None:
    shape = ModelShape.from_fields(FIELDS)
    assert loaded_bytes(shape, "nf4") < loaded_bytes(shape, "int8") < loaded_bytes(shape, "none") == 426_315_776
