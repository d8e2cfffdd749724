"""Settings of low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_engine.config.schema import Positive, Section, WholeNumber


@dataclass(frozen=True)
class AdapterConfig(Section):
    """Low-rank adapters (LoRA), which `rlhf sft`, `rlhf rm` and `rlhf ppo` train instead of the weights of the model.

    The weights of the model stay frozen, and all roles share them. An adapter adds `scale * B A` to the weight of a
    linear layer, with `scale = alpha / rank`.
    """

    rank: WholeNumber = 0
    """Rank of the matrices A and B; 0 trains the weights of the model itself."""
    alpha: Positive = 32.0
    """Numerator of the scale."""
    lr_scale: Positive = 10.0
    """Factor by which the learning rate of an adapter is larger than that of the stage, which heads have. The best
    learning rate of LoRA is about ten times that of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret")."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers with adapters, by the end of their names, such as q_proj and v_proj. all-linear selects all linear
    layers except the output layer."""
    rslora: bool = False
    """Use the scale `alpha / sqrt(rank)` (Kalajdzievski 2023), which keeps the step size for large ranks."""
    dropout: float = 0.0
    """Dropout of the input of A. Only 0 is supported: with dropout the ratio of a policy to itself is not 1."""
    dora: bool = False
    """Decompose the weights into magnitude and direction (DoRA). Only false is supported."""

    def check(self) -> None:
        """Raise ValueError for a method that is not supported, or for targets that contradict each other."""
        if self.dora:
            raise ValueError("dora: got True, expected False: DoRA is not supported; use rslora, or plain LoRA")
        if self.dropout != 0.0:
            raise ValueError(
                f"dropout: got {self.dropout}, expected 0.0: with dropout the ratio of a policy to itself is not 1"
            )
        if not self.targets:
            raise ValueError('targets: got an empty list, expected names of linear layers, or ["all-linear"]')
        if "all-linear" in self.targets and len(self.targets) > 1:
            raise ValueError(f"targets: got {list(self.targets)}; all-linear includes the other layers, so set only it")
