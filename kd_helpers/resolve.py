"""A configuration, resolved: what it names is loaded, and what it leaves to the machine is decided.

A run resolves its configuration once, at the entrance, and passes the result on.
"""

from __future__ import annotations

import dataclasses

import torch

from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, load_splits, require_disjoint
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.models import Tokenizers, load_tokenizers
from kd_helpers.runtime import Machine, machine


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works with.

    Attributes:
        config: every choice.
        data: the splits.
        tokenizers: of teacher and student.
        device: where the models are.
        precision: of the matrix products, with "auto" decided.
    """

    config: DistillConfig
    data: DataSplits
    tokenizers: Tokenizers
    device: torch.device
    precision: torch.dtype

    @property
    def machine(self) -> str:
        """Device and precision, as a provenance names them."""
        return str(Machine(self.device, self.precision))


def resolve(config: DistillConfig, data: DataSplits | None = None) -> Setup:
    """Load the splits and the tokenizers that a configuration names; decide device and precision.

    Args:
        config: every choice.
        data: the splits, if they are loaded already.

    Raises:
        ValueError: two splits share texts, no held-out text has a label, or see `data.load_splits`.
        FileNotFoundError, ConnectionError: see `data.load_splits` and `models.load_tokenizer`.
    """
    if data is None:
        data = load_splits(config)
        _require_scorable(data)
    require_disjoint(data)
    return Setup(config, data, load_tokenizers(config), *machine(config))


def _require_scorable(data: DataSplits) -> None:
    """Refuse held-out splits without labels, by which no student can be measured.

    Raises:
        ValueError: they have none.
    """
    if IGNORE_INDEX in {*data.validation["label"][:], *data.test["label"][:]}:
        raise ValueError(
            "validation and test have no labels, so accuracy can't be measured; give texts with labels as "
            "validation_data and test_data, or use `python -m kd_helpers train` with an empty label_column, which "
            "compares the student with its teacher."
        )
