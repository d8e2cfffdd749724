"""The loss that balances the experts of a mixture, as transformers adds it to the loss of a language model.

Source: Fedus et al. 2021 (Switch Transformers), equations 4 to 6.
Shapes: B sequences, S positions, N tokens, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
"""Names of configs for the number of experts per token."""


class RouterBalance:
    """The balancing loss times its coefficient, if a model's config asks for it: `output_router_logits` and the coefficient.

    Without both, `of` returns None, as transformers then trains without it.
    """

    def __init__(self, loss: Callable[..., Tensor], coef: float, chosen: int) -> None:
        self.loss, self.coef, self.chosen = loss, coef, chosen

    @classmethod
    def of(cls, model: PreTrainedModel) -> RouterBalance | None:
        """Return the balancing loss of a causal LM, or None if transformers trains this model without one."""
        config: Any = model.config.get_text_config()
        coef = float(getattr(config, "router_aux_loss_coef", None) or 0.0)
        loss = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        chosen = next((value for name in _CHOSEN if (value := getattr(config, name, None)) is not None), None)
        chosen = getattr(model, "num_experts_per_tok", chosen)
        if not getattr(config, "output_router_logits", False) or coef == 0.0 or loss is None or chosen is None:
            return None
        return cls(loss, coef, chosen)

    def __call__(
        self,
        router_logits: tuple[Tensor, ...],  # of each layer, (B * S, E)
        real: Tensor | None,  # (B, S), False on padding; None: no padding
    ) -> Tensor:  # ()
        """Return the coefficient times the loss over all layers and real tokens."""
        return self.coef * self.loss(router_logits, router_logits[0].shape[-1], self.chosen, real)
