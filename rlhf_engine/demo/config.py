"""Settings of `rlhf demo` and `rlhf figure`: two sections more than a run has."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.run import RunConfig
from rlhf_engine.config.schema import Count, Positive, Section
from rlhf_engine.config.sft import SFTConfig


@dataclass(frozen=True)
class FigureConfig(Section):
    """The paper's figure in miniature (`rlhf figure`): every stage at several model sizes."""

    widths: tuple[Count, ...] = (64, 128, 256)
    """Hidden sizes of the models; the baseline is the SFT model of the last one."""
    head_size: Count = 32
    """Width of an attention head; it divides every hidden size."""
    shots: Count = 3
    """Demonstrations put in front of a prompt for the prompted base model."""
    samples: Count = 2
    """Answers to each test prompt by each model."""
    prompts: Count | None = None
    """Answer the first so many test prompts; null answers all."""
    ptx_coef: Positive = 0.02
    """ppo.ptx_coef of the PPO-ptx policy; the PPO policy next to it has none. `python -m benchmarks.ptx_coef` chose it."""

    def check(self) -> None:
        """Attention heads tile the hidden state."""
        for width in self.widths:
            if width % self.head_size:
                raise ValueError(f"widths: got {width}, expected a multiple of head_size {self.head_size}")
        if not self.widths:
            raise ValueError("widths: got none, expected at least one")


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
class DemoRunConfig(RunConfig):
    """A whole run with the settings of the demo and of the figure."""

    figure: FigureConfig = field(default_factory=FigureConfig)
    """Used by `rlhf figure` only."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """Used by `rlhf demo` and `rlhf figure` only."""

    def check(self) -> None:
        """The rules of a run; and the demo's base model has no checkpoints."""
        super().check()
        if self.demo.pretrain.checkpoint_every is not None:
            raise ValueError(
                f"demo.pretrain.checkpoint_every: got {self.demo.pretrain.checkpoint_every}, expected null: the demo's base "
                "model trains in one go"
            )

    def optimizers(self) -> dict[str, OptimConfig]:
        """Return the optimiser settings of every stage by the key of its section, pretraining included."""
        return super().optimizers() | {"demo.pretrain": self.demo.pretrain.optim}

    def without_demo(self) -> RunConfig:
        """Return the config that the stages of a run read and save."""
        return RunConfig(**{item.name: getattr(self, item.name) for item in fields(RunConfig)})
