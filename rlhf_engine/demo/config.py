"""Settings of `rlhf demo` and `rlhf figure`: those of a run and two more sections."""

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
    """Hidden sizes of the models. The SFT model of the last size is the baseline."""
    head_size: Count = 32
    """Size of an attention head; every hidden size must be a multiple of it."""
    shots: Count = 3
    """Demonstrations in front of a prompt of the prompted base model."""
    samples: Count = 2
    """Responses per test prompt and model."""
    prompts: Count | None = None
    """Number of test prompts to use, from the first on; null uses all."""
    ptx_coef: Positive = 0.02
    """ppo.ptx_coef of the PPO-ptx policy (the PPO policy has 0); chosen with `python -m benchmarks.ptx_coef`."""

    def check(self) -> None:
        """Raise ValueError unless attention heads divide every hidden size."""
        for width in self.widths:
            if width % self.head_size:
                raise ValueError(f"widths: got {width}, expected a multiple of head_size {self.head_size}")
        if not self.widths:
            raise ValueError("widths: got none, expected at least one")


@dataclass(frozen=True)
class DemoConfig(Section):
    """The demo's base model, which `rlhf demo --from-scratch` and `rlhf figure` pretrain, and its evaluation."""

    vocab_size: Count = 1536
    """Vocabulary size of the byte-level BPE tokenizer."""
    hidden_size: Count = 256
    """Hidden size of the Llama-family model."""
    intermediate_size: Count = 704
    """Hidden size of its feed-forward layers."""
    layers: Count = 2
    """Number of layers."""
    heads: Count = 8
    """Attention heads per layer."""
    pretrain: SFTConfig = field(default_factory=SFTConfig)
    """Language modelling on plain text; optimizer steps, batches and schedule as in SFT."""
    samples: Count = 16
    """SFT responses per held-out prompt; best-of-n chooses from them."""
    opponents: Count = 4
    """Responses per held-out prompt by PPO, and by SFT with a second seed."""


@dataclass(frozen=True)
class DemoRunConfig(RunConfig):
    """Settings of a run, of the demo and of the figure."""

    figure: FigureConfig = field(default_factory=FigureConfig)
    """Used by `rlhf figure` only."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """Used by `rlhf demo` and `rlhf figure` only."""

    def check(self) -> None:
        """Check the rules of a run, and that pretraining, which has no checkpoints, is not asked for any."""
        super().check()
        if self.demo.pretrain.checkpoint_every is not None:
            raise ValueError(
                f"demo.pretrain.checkpoint_every: got {self.demo.pretrain.checkpoint_every}, expected null: the demo's base "
                "model is trained without checkpoints"
            )

    def optimizers(self) -> dict[str, OptimConfig]:
        """Return the optimizer settings of every stage by the key of its section, pretraining included."""
        return super().optimizers() | {"demo.pretrain": self.demo.pretrain.optim}

    def without_demo(self) -> RunConfig:
        """Return the config that the stages of a run read and save."""
        return RunConfig(**{item.name: getattr(self, item.name) for item in fields(RunConfig)})
