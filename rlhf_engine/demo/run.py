"""The demo from end to end: base model, SFT, reward model, PPO, and an evaluation by a judge."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_engine.config import OptimConfig, RunConfig, SFTConfig, load_config, refuse_overrides
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
    *("seed", "output_dir", "model.path", "reward.path", "reward.function", "reward.url"),
    *("data.demonstrations", "data.comparisons", "data.prompts"),
)
"""Settings that the demo decides."""
BASE = DATA / "base"
"""The base model that the package contains: `rlhf demo --from-scratch --seed 0` wrote it."""
WITH_ADAPTERS = ("ppo.value_model=backbone",)
"""Settings of a demo with adapters, which overrides replace. The value function is an adapter that starts as the reward
model's: on the states of the policy's adapter, the reward model's head predicts badly, and PPO's first updates learn little."""
BASE_SETTINGS = (
    *(f"demo.{name}" for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads")),
    *(f"demo.pretrain.{item.name}" for item in fields(SFTConfig) if item.name != "optim"),
    *(f"demo.pretrain.optim.{item.name}" for item in fields(OptimConfig)),
)
"""Settings of the base model, which only a run from scratch reads."""
POSITIONS = 256
"""Largest sequence length of the base model, in tokens."""
NEXT = """To try next:

  rlhf generate --config {root}/ppo/config.yaml --set model.path={root}/ppo --prompts {prompts} --split test \\
      --output {root}/answers.jsonl                           # sample responses from the policy
  rlhf ppo --config {root}/ppo/config.yaml --set ppo.kl_coef=0.1 --set output_dir={root}/kl_0.1   # a stronger KL penalty
  rlhf plan --config {root}/ppo/config.yaml                   # the bytes of this run in every phase"""
"""Text with commands for a finished demo in the folder `root`."""


def run_demo(
    output: str | Path,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
    say: Callable[[str], object] = print,
    *,
    overwrite: bool = False,
    from_scratch: bool = False,
) -> str:
    """Run every stage into `output` with the settings of `demo.yaml`; return the report as text.

    The stages start from the base model that the package contains; with `from_scratch`, a base model is pretrained first. `say`
    is called at the start and the end of each stage.

    Raises:
        ValueError: `output` has a finished demo and `overwrite` is False (an interrupted demo starts again); or an override
            sets what the demo decides, or a property of the base model without `from_scratch`.
    """
    refuse_overrides(overrides, DECIDED, "the demo, by its options --seed and --output or by its stages,")
    if not from_scratch:
        _refuse_base_settings(overrides)
    config = with_shipped_data(settings(overrides), output, seed)
    root, seconds = Path(output), {}
    if (root / "report.json").is_file() and not overwrite:
        raise ValueError(
            f"{root}: contains a finished demo; replace it with --overwrite, or choose a different --output"
        )
    names = ("pretrain",) * from_scratch + ("sft", "reward model", "ppo", "evaluation")

    def timed(name: str, stage: Callable[[], Result]) -> Result:
        number = f"{names.index(name) + 1}/{len(names)}"
        say(f"[{number}] {name} ...")
        start = time.perf_counter()
        result = stage()
        seconds[name] = time.perf_counter() - start
        say(f"[{number}] {name}: {seconds[name]:.0f} s")
        return result

    fits, base = {}, BASE
    if from_scratch:
        fits["pretrain"], base = timed("pretrain", lambda: make_base(config)), root / "base"
    fits["sft"] = timed("sft", lambda: run_sft(starting_from(config, base), overwrite=True))
    rm = timed("reward model", lambda: run_rm(starting_from(config, root / "sft"), overwrite=True))
    ppo_config = starting_from(replace(config, reward=replace(config.reward, path=str(root / "rm"))), root / "sft")
    ppo = timed("ppo", lambda: run_ppo(ppo_config, overwrite=True))
    examination = timed("evaluation", lambda: examine(ppo_config, config.demo))
    return write_report(root, config, fits, rm, ppo, examination, seconds)


def next_commands(root: Path) -> str:
    """Return commands that work on the finished demo in `root`, for a shell."""
    return NEXT.format(root=shlex.quote(str(root)), prompts=shlex.quote(str(DATA / "prompts.jsonl")))


def settings(overrides: tuple[str, ...]) -> DemoRunConfig:
    """Return the config of `demo.yaml` with `WITH_ADAPTERS`, if it has adapters, and the overrides."""
    config = load_config(CONFIG, overrides, kind=DemoRunConfig)
    return load_config(CONFIG, (*WITH_ADAPTERS, *overrides), kind=DemoRunConfig) if config.adapter.rank else config


def _refuse_base_settings(overrides: tuple[str, ...]) -> None:
    try:
        refuse_overrides(overrides, BASE_SETTINGS, "the base model that the package contains")
    except ValueError as error:
        raise ValueError(f"{error}; add --from-scratch to pretrain a base model with it") from None


def with_shipped_data(config: DemoRunConfig, output: str | Path, seed: int) -> DemoRunConfig:
    """Return the config with the demo's files, an output folder and a seed."""
    files = {name: str(DATA / f"{name}.jsonl") for name in ("demonstrations", "comparisons", "prompts")}
    return replace(config, data=replace(config.data, **files), output_dir=str(output), seed=seed)


def starting_from(config: DemoRunConfig, folder: Path) -> RunConfig:
    """Return the config of a stage that starts from the model in `folder`."""
    return replace(config.without_demo(), model=replace(config.model, path=str(folder)))


def make_base(config: DemoRunConfig) -> FitReport:
    """Train a tokenizer and a small Llama-family model on `pretrain.txt`; write both to `output_dir/base`.

    The weights are stored in bfloat16, which halves the bytes that the package contains.
    """
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
        deepcopy(model).to(torch.bfloat16).save_pretrained(new)  # pyright: ignore[reportArgumentType]  # as in new_model
        codec.tokenizer.save_pretrained(new)

    save_result(Path(config.output_dir) / "base", write, asdict(report), config)
    return report


def new_model(config: DemoRunConfig, codec: Codec) -> LlamaForCausalLM:
    """Return a Llama-family model with random weights, drawn by the config's seed."""
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
            # 1 / sqrt(hidden size): with the usual 0.02 the activations of so narrow a model start three times too small,
            # and it learns more slowly.
            initializer_range=demo.hidden_size**-0.5,
            bos_token_id=None,
            eos_token_id=codec.eos_id,
            pad_token_id=codec.pad_id,
        )
    )
    dtype = getattr(torch, config.dtype)
    return model.to(config.device, dtype)  # pyright: ignore[reportArgumentType]  # a decorator of transformers hides `self`
