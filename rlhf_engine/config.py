"""Every setting of a run: frozen dataclasses, YAML in and out.

`load_config(path, overrides=["ppo.kl_coef=0.05"])` reads a file, applies command-line overrides and checks names,
types and ranges. Defaults are InstructGPT's where the paper gives a value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_engine.eval_config import EvalConfig, FigureConfig, IterateConfig
from rlhf_engine.hygiene_config import HygieneConfig
from rlhf_engine.memory_config import MemoryConfig
from rlhf_engine.ppo_config import OptimConfig, PPOConfig
from rlhf_engine.schema import Count, Positive, PositiveShare, Section, Seed, Share, WholeNumber


@dataclass(frozen=True)
class ModelConfig(Section):
    """The causal language model that the policy starts from."""

    path: str | None = None
    """Folder of a Hugging Face causal LM and its tokenizer; None where an earlier stage makes the model."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation that transformers is asked for; flash_attention_2 needs a GPU and the package flash-attn, and
    scores, trains and reads prompts. Decoding has an attention of its own, but for eager."""


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the records come from."""

    demonstrations: str | None = None
    """JSONL of prompt, response."""
    comparisons: str | None = None
    """JSONL of prompt, completions, ranking ("D > C > A = B")."""
    prompts: str | None = None
    """JSONL of prompt, user_id and, if wanted, split."""
    pretrain: str | None = None
    """Text for PPO-ptx: .txt with blank lines between documents, JSONL with a field `text`, or a data set's folder."""
    prompt_template: str = "{prompt}\n"
    """Frame of a prompt; `{prompt}` stands for its text."""
    long_prompts: Literal["refuse", "truncate"] = "refuse"
    """What happens to a prompt longer than rollout.max_prompt_tokens: refused, or cut on the left and counted."""
    max_response_tokens: Count = 512
    """Longest answer in the files, EOS included; a longer one is refused."""
    validation_share: PositiveShare = 0.1
    """Share of the demonstrations and of the rankings that is held out for validation."""
    hygiene: HygieneConfig = field(default_factory=HygieneConfig)
    """Cleaning of prompts, before any training."""

    def check(self) -> None:
        """A frame has a place for the prompt."""
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text with {{prompt}} in it")


@dataclass(frozen=True)
class SFTConfig(Section):
    """Supervised fine-tuning on demonstrations."""

    epochs: Count = 16
    """Most passes over the demonstrations; the run stops at the validation minimum before that."""
    batch_size: Count = 32
    """Demonstrations of one optimiser step."""
    microbatch: WholeNumber = 0
    """Demonstrations of one forward and backward pass; 0 takes the whole batch at once."""
    microbatch_tokens: Count | None = None
    """Tokens of one pass, padding counted, in place of `microbatch` demonstrations; a longer one has a pass of its own."""
    evaluate_every: WholeNumber = 0
    """Optimiser steps between validations; 0 validates after each epoch."""
    patience: Count = 2
    """Validations without a new minimum after which the run stops; the weights of the minimum are kept."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of this stage."""

    def check(self) -> None:
        """One size of a pass, not two."""
        if self.microbatch and self.microbatch_tokens is not None:
            raise ValueError(
                f"microbatch: got {self.microbatch} beside microbatch_tokens {self.microbatch_tokens}, expected one of the two"
            )


@dataclass(frozen=True)
class RewardConfig(Section):
    """Training of the reward model on rankings."""

    path: str | None = None
    """Folder of a trained reward model, which PPO scores with; it may be smaller than the policy."""
    function: str | None = None
    """Python function in its place, as module:function or file.py:function. It takes a list of prompts and a list of
    answers and gives a list of floats. Answers are texts, and so are prompts, except that a conversation comes as its list of
    messages, each an object with role and content."""
    epochs: Count = 1
    """Passes over the rankings; more than one over-fits (InstructGPT, appendix C.2)."""
    batch_size: Count = 8
    """Prompts of one optimiser step, each with all its completions and pairs."""
    microbatch: WholeNumber = 0
    """Prompts of one forward and backward pass; 0 takes the whole batch at once."""
    evaluate_every: WholeNumber = 0
    """Optimiser steps between validations; 0 validates at the end only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of this stage."""

    def check(self) -> None:
        """One reward, not two."""
        if self.path is not None and self.function is not None:
            raise ValueError(f"function: got {self.function!r} beside path {self.path!r}, expected one of the two")


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How responses are sampled."""

    max_prompt_tokens: Count = 512
    """Longest prompt, its frame included; data.long_prompts says what happens to a longer one."""
    max_response_tokens: Count = 256
    """Token budget of a response, EOS included."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in the loss alike."""
    top_k: Count | None = None
    """Sample among the k likeliest tokens; None keeps all."""
    top_p: PositiveShare | None = None
    """Sample among the likeliest tokens that hold this probability mass; None keeps all."""
    min_p: Share | None = None
    """Sample among tokens at least this share as likely as the likeliest; None keeps all."""
    stop_token: str | None = None
    """Text of a token that ends an answer as EOS does; OpenAI's of 2019 is a period. None: EOS alone, which SFT teaches."""
    stop_after: WholeNumber = 0
    """First tokens of an answer, this many, in which `stop_token` ends nothing yet; OpenAI's is 16."""
    repetition_penalty: Positive = 1.0
    """Divides the positive logits of tokens that the prompt or the response has already, and multiplies the others (CTRL);
    1 changes nothing. Like the three before it, it says what is sampled from, not whose log-probs PPO learns from."""
    stop: tuple[str, ...] = ()
    """A response that contains one of these texts ends there; they are left out of its text."""
    batch_size: Count = 64
    """Most sequences that are decoded together."""
    cache: Literal["auto", "slots", "paged"] = "auto"
    """Where keys and values lie while sampling: in a slot for the longest sequence each, or in pages that a sequence claims as
    it grows and that samples of one prompt share; auto: slots on the CPU, pages on a GPU."""
    compile: bool | None = None
    """Whether torch compiles the layers for decode steps, in seconds for each power of two of sequences; None: on a GPU, where
    a step has a third of the kernels then, unless products round weights on the way (compute_dtype) or transformers does not
    mark the model's layers. On a CPU it was slower, and made a row's bits depend on its batch."""
    prefill_tokens: Count = 4096
    """Most prompt tokens that one forward pass reads, padding included; a longer prompt goes alone."""
    check_sequences: WholeNumber = 4
    """Sequences of each PPO rollout whose log-probs are compared with a fresh forward pass (`logprob_deviation`); 0: none.
    With ppo.old_logprobs "rescored" all of them are, at no cost."""

    def check(self) -> None:
        """An option that nothing would read is refused."""
        if self.stop_after and self.stop_token is None:
            raise ValueError(f"stop_after: got {self.stop_after}, expected 0; only stop_token reads it")
        if self.stop_after >= self.max_response_tokens:
            raise ValueError(
                f"stop_after: got {self.stop_after}, expected fewer than max_response_tokens {self.max_response_tokens}"
            )


@dataclass(frozen=True)
class DemoConfig(Section):
    """The demo's own stages, before SFT and after PPO: a model from nothing, and its examination."""

    vocab_size: Count = 1536
    """Entries of the byte-level BPE tokenizer."""
    hidden_size: Count = 256
    """Width of the Llama-family model."""
    intermediate_size: Count = 704
    """Width of its feed-forward layers."""
    layers: Count = 2
    """Number of its layers."""
    heads: Count = 8
    """Attention heads of a layer."""
    pretrain: SFTConfig = field(default_factory=SFTConfig)
    """Language modelling on plain text."""
    samples: Count = 16
    """SFT answers to each held-out prompt, among which best-of-n chooses."""
    opponents: Count = 4
    """Answers to each held-out prompt by PPO, and by SFT with another seed."""


@dataclass(frozen=True)
class RunConfig(Section):
    """A whole run: where it happens and the settings of every stage."""

    seed: Seed = 0
    """Seed of initialisation, data order and sampling."""
    output_dir: str = "runs/default"
    """Folder that receives checkpoints, metrics.jsonl, tensorboard/ and plots/."""
    device: str = "cpu"
    """torch device of the models, such as cpu or cuda:0."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. In bfloat16 gradients are summed in float32 and the optimiser steps float32 masters: weights,
    gradients and masters take 10 bytes a parameter, where float32 takes 8; what is saved are activations, copies and time."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products, of sampling as of learning, where the weights are float32: bfloat16 multiplies rounded
    copies of weights and activations, and leaves weights, gradients, log-probs, values and optimiser in float32. It pays on
    GPUs and on processors with bfloat16 instructions; on others it is slower than float32."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of the rlhf_kernels operations; `auto` picks one for each of them and the device."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Supervised fine-tuning."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The reward model."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Reinforcement learning."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Where the bytes live."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """A contest of two models."""
    iterate: IterateConfig = field(default_factory=IterateConfig)
    """Rounds of the whole procedure."""
    figure: FigureConfig = field(default_factory=FigureConfig)
    """Used by `rlhf figure` alone."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """Used by `rlhf demo` and `rlhf figure` alone."""

    def check(self) -> None:
        """float16 is refused: without a scaled loss, gradients below 6e-8 are 0 in it.

        An option that nothing would read is refused, across sections as well.
        """
        if self.dtype == "float16":
            raise ValueError(
                "dtype: got 'float16', expected 'float32' or 'bfloat16'; gradients below 6e-8 are 0 in float16, and there is "
                "no scaling of the loss"
            )
        if self.dtype == "bfloat16" and self.ppo.objective == "trpo":
            raise ValueError(
                "dtype: got 'bfloat16' with ppo.objective 'trpo', expected 'float32': its line search writes weights and no "
                "masters"
            )
        if self.model.attention == "flash_attention_2" and not self.device.startswith("cuda"):
            raise ValueError(
                f"model.attention: got 'flash_attention_2' with device {self.device!r}, expected 'sdpa' or 'eager': "
                "flash-attn runs on CUDA devices alone"
            )
        stages = {"sft": self.sft, "reward": self.reward, "ppo": self.ppo, "demo.pretrain": self.demo.pretrain}
        raw = [name for name, stage in stages.items() if stage.optim.eps_form == "raw"]
        if self.memory.optimizer_state == "8bit" and raw:
            raise ValueError(
                f"{raw[0]}.optim.eps_form: got 'raw', expected 'corrected' with memory.optimizer_state '8bit': torchao would "
                "compile a step for each of its epsilons"
            )
        if not self.output_dir.strip():
            raise ValueError(f"output_dir: got {self.output_dir!r}, expected a folder")
        if self.compute_dtype == "bfloat16" and self.ppo.objective == "trpo":
            raise ValueError(
                "compute_dtype: got 'bfloat16' with ppo.objective 'trpo', expected 'float32': conjugate gradient divides by "
                "curvatures that bfloat16's rounding would drown"
            )
        rollout = self.rollout
        filtered = (rollout.top_k, rollout.top_p, rollout.min_p) != (None,) * 3 or rollout.repetition_penalty != 1.0
        if self.ppo.importance_cap is not None and self.ppo.old_logprobs == "sampled" and not filtered:
            raise ValueError(
                f"ppo.importance_cap: got {self.ppo.importance_cap}, expected None without rollout.top_k, top_p, min_p or "
                "repetition_penalty, where every weight is 1; ppo.old_logprobs 'rescored' reads it too"
            )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `1e-5` is a number and not a string, and that a key stands there once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; YAMLError for a key that it has twice, of which the first value would be lost."""
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"got the key {name!r} twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, or the defaults if `path` is None, and apply overrides such as `ppo.optim.lr=1e-5` in order.

    Raises ValueError naming the file and key for YAML that does not parse, an unknown key, a wrong type, a value out
    of range or an override without `=`.
    """
    given = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(given, override)
    source = ", ".join(filter(None, [str(path or ""), " ".join(overrides)]))
    try:
        return RunConfig.from_dict(given)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None


def flat_settings(tree: dict[str, Any], leave_out: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in nested dictionaries, without the keys and sections of `leave_out`."""
    for name, value in tree.items():
        key = prefix + name
        if key in leave_out:
            continue
        if isinstance(value, dict):
            yield from flat_settings(value, leave_out, key + ".")
        else:
            yield key, value


def refuse_overrides(overrides: Sequence[str], decided: Collection[str], who: str) -> None:
    """ValueError for an override of one of the keys that `who` decides."""
    for override in overrides:
        tree: dict[str, Any] = {}
        _apply_override(tree, override)
        for key, _ in flat_settings(tree):
            if key in decided:
                raise ValueError(f"override {override!r}: {who} decides {key}, expected no value for it")


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write `config` as YAML that `load_config` reads back to an equal config."""
    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{path}: got {type(given).__name__}, expected a mapping of keys to values")
    return given or {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: not valid YAML: {_one_line(error)}") from None
    *parents, name = key.split(".")
    node = tree
    for parent in parents:
        # An unknown section becomes a key that RunConfig refuses by name.
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {parent!r} is not a section")
        node = child
    node[name] = value
