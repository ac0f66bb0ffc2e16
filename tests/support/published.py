"""Fixed inputs, and what published code makes of them.

The values in `test_relations` and `test_responses` were computed in float64 with the code that the papers' authors
released, and with torchdistill 1.1.5; each test names which.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    student_logits: torch.Tensor  # [4, 5]
    teacher_logits: torch.Tensor
    labels: torch.Tensor
    student_maps: torch.Tensor  # [4, 3, 6, 6]
    teacher_maps: torch.Tensor  # [4, 5, 6, 6]
    student_embeddings: torch.Tensor  # [4, 7]
    teacher_embeddings: torch.Tensor  # [4, 9]


def inputs() -> Inputs:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    logits, labels = (normal(4, 5), normal(4, 5)), torch.tensor([0, 3, 1, 4])
    return Inputs(*logits, labels, normal(4, 3, 6, 6), normal(4, 5, 6, 6), normal(4, 7), normal(4, 9))
