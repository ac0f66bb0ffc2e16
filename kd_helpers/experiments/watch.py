"""What a student was like at certain moments of its training, and its weights at the best of them."""

from __future__ import annotations

import time
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


class Curve:
    """Measures a model after every so many steps, and keeps its weights at the best moment.

    Attributes:
        history: of each moment `step`, `seconds` (of training alone) and the measures.
        weights: of the best moment, by the measure `validation`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        measure: Callable[[], dict[str, float]],
        *,
        steps: int,
        every: int,
        better: Callable[[float, float], bool],
    ) -> None:
        """Begin to count the seconds.

        Args:
            model: that is trained.
            measure: what it is like now; `validation` decides.
            steps: of the training; it is measured after the last, too.
            every: steps between two moments.
            better: whether the first value of `validation` is better than the second.
        """
        self.model, self.measure, self.steps, self.every, self.better = model, measure, steps, every, better
        self.history: list[dict[str, float]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.best: float | None = None
        self.measuring, self.started = 0.0, time.perf_counter()

    def look(self, step: int) -> None:
        """After a step."""
        if step % self.every and step != self.steps:
            return
        now = time.perf_counter()
        measures = self.measure()
        if self.best is None or self.better(measures["validation"], self.best):
            self.best = measures["validation"]
            self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.history.append({"step": step, "seconds": now - self.started - self.measuring, **measures})
        self.measuring += time.perf_counter() - now


def whole_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of a model's weights under the names that they have outside `lean_training`, also within it."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules(remove_duplicate=False):  # T5 holds one table in three places
        if isinstance(module, SeenRows):
            table = state.pop(f"{name}.table.weight")
            table[module.rows >= 0] = state[f"{name}.weight"]
            state[f"{name}.weight"] = table
    return state
