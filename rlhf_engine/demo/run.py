"""The demo from end to end: tokenizer, language model, SFT, reward model, PPO, examination."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_engine.config import RunConfig, load_config, refuse_overrides
from rlhf_engine.data import Codec, Example, read_demonstrations, train_tokenizer
from rlhf_engine.data.records import text_of
from rlhf_engine.demo.config import DemoRunConfig
from rlhf_engine.demo.examine import examine
from rlhf_engine.demo.report import write_report
from rlhf_engine.model import LanguageModel
from rlhf_engine.recipes import computing, run_ppo, run_rm, run_sft, save_result, stage_metrics
from rlhf_engine.supervised.sft import FitReport, fit_language_model

Result = TypeVar("Result")
HERE = Path(__file__).parent
DATA = HERE / "data"
CONFIG = HERE / "demo.yaml"
DECIDED = (
    *("seed", "output_dir", "model.path", "reward.path", "reward.function"),
    *("data.demonstrations", "data.comparisons", "data.prompts"),
)
"""Settings that the demo fills in."""
POSITIONS = 256
"""Longest sequence of the models made here."""


def run_demo(
    output: str | Path,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
    say: Callable[[str], object] = print,
    *,
    overwrite: bool = False,
) -> str:
    """Run everything into `output`, with the settings of `demo.yaml`; return the report as text.

    `say` is called at the start and the end of each stage. Raises ValueError over a finished demo without `overwrite`; one that
    was interrupted begins again.
    """
    refuse_overrides(overrides, DECIDED, "the demo, by its options --seed and --output or by its stages,")
    config = with_shipped_data(load_config(CONFIG, overrides, kind=DemoRunConfig), output, seed)
    root, seconds = Path(output), {}
    if (root / "report.json").is_file() and not overwrite:
        raise ValueError(f"{root}: a finished demo is there; replace it with --overwrite, or choose another --output")

    def timed(name: str, stage: Callable[[], Result]) -> Result:
        say(f"{name} ...")
        start = time.perf_counter()
        result = stage()
        seconds[name] = time.perf_counter() - start
        say(f"{name}: {seconds[name]:.0f} s")
        return result

    base = timed("pretrain", lambda: make_base(config))
    sft = timed("sft", lambda: run_sft(starting_from(config, root / "base"), overwrite=True))
    rm = timed("reward model", lambda: run_rm(starting_from(config, root / "sft"), overwrite=True))
    ppo_config = starting_from(replace(config, reward=replace(config.reward, path=str(root / "rm"))), root / "sft")
    ppo = timed("ppo", lambda: run_ppo(ppo_config, overwrite=True))
    examination = timed("examination", lambda: examine(ppo_config, config.demo))
    return write_report(root, config, {"pretrain": base, "sft": sft}, rm, ppo, examination, seconds)


def with_shipped_data(config: DemoRunConfig, output: str | Path, seed: int) -> DemoRunConfig:
    """The config with the demo's own files, an output folder and a seed."""
    files = {name: str(DATA / f"{name}.jsonl") for name in ("demonstrations", "comparisons", "prompts")}
    return replace(config, data=replace(config.data, **files), output_dir=str(output), seed=seed)


def starting_from(config: DemoRunConfig, folder: Path) -> RunConfig:
    """Return the config of a stage that starts from the model in `folder`."""
    return replace(config.without_demo(), model=replace(config.model, path=str(folder)))


def make_base(config: DemoRunConfig) -> FitReport:
    """A tokenizer and a small Llama-family model, trained on `pretrain.txt`, in `output_dir/base`."""
    pages = (DATA / "pretrain.txt").read_text(encoding="utf-8").strip().split("\n\n")
    demonstrations = read_demonstrations(DATA / "demonstrations.jsonl")
    texts = pages + [text for record in demonstrations for text in (text_of(record.prompt), record.response)]
    tokenizer = train_tokenizer(texts, config.demo.vocab_size)
    codec = Codec(tokenizer)
    model = new_model(config, codec)
    documents = [Example((), tuple(codec.encode_response(page))) for page in pages]
    held_out = len(documents) // 20
    with stage_metrics(config, "pretrain") as metrics:
        report = fit_language_model(
            LanguageModel(model, backend=config.backend, **computing(config)),
            documents[held_out:],
            documents[:held_out],
            config.demo.pretrain,
            pad_id=codec.pad_id,
            seed=config.seed,
            log=metrics.write,
            label="pretrain",
        )

    def write(new: Path) -> None:
        model.save_pretrained(new)
        codec.tokenizer.save_pretrained(new)

    save_result(Path(config.output_dir) / "base", write, asdict(report), config)
    return report


def new_model(config: DemoRunConfig, codec: Codec) -> LlamaForCausalLM:
    """A Llama-family model with random weights, drawn by the config's seed."""
    demo = config.demo
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(codec.tokenizer),
            hidden_size=demo.hidden_size,
            intermediate_size=demo.intermediate_size,
            num_hidden_layers=demo.layers,
            num_attention_heads=demo.heads,
            num_key_value_heads=demo.heads,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            # 1 / sqrt(hidden size): at the usual 0.02 a model this narrow starts three times too quiet and learns slower.
            initializer_range=demo.hidden_size**-0.5,
            bos_token_id=None,
            eos_token_id=codec.eos_id,
            pad_token_id=codec.pad_id,
        )
    )
    dtype = getattr(torch, config.dtype)
    return model.to(config.device, dtype)  # pyright: ignore[reportArgumentType]  # a decorator of transformers hides `self`
