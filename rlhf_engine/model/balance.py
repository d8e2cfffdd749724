"""The loss that balances the experts of a mixture, as transformers adds it to the loss of a language model.

Source: Fedus et al. 2021 (Switch Transformers), equations 4 to 6.
Shapes: B sequences, S positions, N tokens, E experts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

_COEFFICIENT = ("router_aux_loss_coef", "aux_loss_coef")
"""Names of models and configs for the coefficient of the loss."""
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
"""Names of models and configs for the number of experts per token."""

_log = logging.getLogger(__name__)


class RouterBalance:
    """The balancing loss times its coefficient, if a model's config asks for it: `output_router_logits` and the coefficient."""

    def __init__(self, loss: Callable[..., Tensor], coef: float, chosen: int) -> None:
        self.loss, self.coef, self.chosen = loss, coef, chosen

    @classmethod
    def of(cls, model: PreTrainedModel) -> RouterBalance | None:
        """Return the balancing loss of a causal LM, or None if transformers trains this model without one.

        A term of the loss that the config names and that is not added is logged.

        Raises:
            ValueError: the config asks for the loss under names that this class does not know.
        """
        config: Any = model.config.get_text_config()
        name = type(model).__name__
        if z_loss := getattr(config, "z_loss_coefficient", None):
            _log.warning("%s: z_loss_coefficient is %s in its config, but no such loss is added", name, z_loss)
        if not getattr(config, "output_router_logits", False):
            return None
        loss = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if loss is None:
            _log.warning(
                "%s: output_router_logits is true in its config, but transformers has no balancing loss for it, so none is "
                "added",
                name,
            )
            return None
        coef, chosen = (_first_of(names, model, config) for names in (_COEFFICIENT, _CHOSEN))
        if coef is None or chosen is None:
            missing = _COEFFICIENT if coef is None else _CHOSEN
            raise ValueError(
                f"model: the config of {name} asks for the balancing loss of its experts (output_router_logits), which needs "
                f"{' or '.join(missing)}, and has none of them; set output_router_logits to false in its config.json"
            )
        return cls(loss, float(coef), int(chosen)) if coef else None

    def __call__(
        self,
        router_logits: tuple[Tensor, ...],  # of each layer, (B * S, E)
        real: Tensor | None,  # (B, S), False on padding; None: no padding
    ) -> Tensor:  # ()
        """Return the coefficient times the loss over all layers and real tokens."""
        return self.coef * self.loss(router_logits, router_logits[0].shape[-1], self.chosen, real)


def _first_of(names: tuple[str, ...], *objects: Any) -> float | None:
    """Return the first attribute of these names; the model's class has read the values that transformers computes with."""
    values = (getattr(one, name, None) for one in objects for name in names)
    return next((value for value in values if value is not None), None)
