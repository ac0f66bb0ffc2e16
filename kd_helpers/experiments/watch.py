"""What a student was like at certain moments of its training, and its weights at the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from kd_helpers.lean import SeenRows
from kd_helpers.metrics import Predictions, classification_metrics


class Watch:
    """Looks at validation after certain steps of a run.

    Attributes:
        history: measures and `loss` at each of them.
        logits: `last`, and with several moments those of the `best`: by the measure, then by NLL.
        weights: of the best, with several moments.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        predicted: Callable[[], Predictions],
        loss: Callable[[Predictions], float],
        moments: Sequence[int],
        measure: str,
    ) -> None:
        self.student, self.predicted, self.loss, self.measure = student, predicted, loss, measure
        self.moments = frozenset(moments)
        self.history: list[dict[str, float]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.logits: dict[str, torch.Tensor] = {}
        self.best = (-1.0, 0.0)

    def look(self, step: int) -> None:
        """After a step."""
        if step not in self.moments:
            return
        found = self.predicted()
        measures = classification_metrics(found.logits, found.labels)
        self.history.append({"step": step, "loss": self.loss(found), **measures})
        self.logits["last"] = found.logits
        value = (measures[self.measure], -measures["nll"])
        if len(self.moments) > 1 and value > self.best:
            self.best, self.weights, self.logits["best"] = value, whole_weights(self.student), found.logits.clone()


def whole_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of a model's weights under the names that they have outside `lean_training`, also within it."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules(remove_duplicate=False):  # T5 holds one table in three places
        if isinstance(module, SeenRows):
            table = state.pop(f"{name}.table.weight")
            table[module.rows >= 0] = state[f"{name}.weight"]
            state[f"{name}.weight"] = table
    return state
