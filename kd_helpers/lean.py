"""Chapter 05: what a training step can leave out.

On a CPU, matrix products take less than half of the time of a small student's step. Two other parts of the step have
no effect on learning: the work on rows of the embedding table that occur in no training text, and random numbers that
are finer than dropout needs. `lean_training` leaves both out while a model trains. Afterwards the model is an ordinary
model again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "lean"


@contextlib.contextmanager
def lean_training(model: PreTrainedModel, token_ids: Iterable[Sequence[int]]) -> Iterator[None]:
    """Train `model` on these texts in less time, as long as the context lasts.

    Losses and gradients are those of ordinary training, with two differences: rows of the embedding table that do not
    occur keep their values instead of being shrunk by weight decay, and on a CPU dropout draws other masks.

    Args:
        model: changed in place while the context lasts: make the optimiser inside, save the model outside. Its
            embedding table becomes `SeenRows`; on a CPU its dropout becomes `CoarseDropout`, and so in attention.
        token_ids: the token ids of each training text. In eval mode the model takes any other text as well.

    Raises:
        ValueError: the model's output layer shares the embedding table.
    """
    table = model.get_input_embeddings()
    if (output := model.get_output_embeddings()) is not None and output.weight is table.weight:
        raise ValueError(
            "the output layer shares the embedding table, which must then be trained whole; train as usual."
        )
    seen = SeenRows(table, token_ids).train(model.training)
    with contextlib.ExitStack() as undo:  # last in, first out: the trained rows are put back into the table first
        undo.callback(model.set_input_embeddings, table)
        model.set_input_embeddings(seen)
        if table.weight.device.type == "cpu":
            undo.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(ATTENTION)
            dropouts = [module for module in model.modules() if type(module) is nn.Dropout]
            undo.callback(_become, dropouts, nn.Dropout)
            _become(dropouts, CoarseDropout)
        undo.callback(seen.write_back)
        yield


def _become(modules: Iterable[nn.Module], kind: type[nn.Module]) -> None:
    """Change what modules compute and nothing else about them; both kinds have the same attributes."""
    for module in modules:
        module.__class__ = kind


class SeenRows(nn.Module):
    """An embedding table of which only the rows that occur in the training texts are trained.

    The other rows get no gradient anyway. Yet in a dense table each of them is zeroed, measured for clipping and
    updated by AdamW at every step, only to be shrunk a little by weight decay. Here they stay as they are.

    Args:
        table: the whole table, `[V, H]`; it is frozen, and holds the trained rows again after `write_back`.
        token_ids: the token ids of each training text; the padding's row counts as one that occurs.
    """

    def __init__(self, table: nn.Embedding, token_ids: Iterable[Sequence[int]]) -> None:
        super().__init__()
        occurring = set(itertools.chain.from_iterable(token_ids))
        if table.padding_idx is not None:
            occurring.add(table.padding_idx)
        ids = sorted(occurring)
        self.trainable = table.weight.requires_grad
        self.weight = nn.Parameter(table.weight[ids], requires_grad=self.trainable)
        self.table = table.requires_grad_(False)
        rows = torch.full((table.num_embeddings,), -1, device=table.weight.device)
        rows[ids] = torch.arange(len(ids), device=rows.device)
        self.register_buffer("rows", rows, persistent=False)
        self.padding_row = None if table.padding_idx is None else int(rows[table.padding_idx])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[N, L]` to vectors `[N, L, H]`. In training they must occur in the training texts."""
        rows = self.rows[input_ids]
        if self.training:
            return F.embedding(rows, self.weight, padding_idx=self.padding_row)
        trained = F.embedding(rows.clamp(min=0), self.weight)
        return torch.where((rows >= 0).unsqueeze(-1), trained, self.table(input_ids))

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the trained rows into the whole table, which is trainable again if it was."""
        self.table.weight[self.rows >= 0] = self.weight
        self.table.requires_grad_(self.trainable)


def coarse_dropout(values: torch.Tensor, p: float) -> torch.Tensor:
    """Set each value to 0 with probability p and scale the others by 1 / (1 − p), as in training.

    torch draws a number of 32 bits or more for every value. Here four values share a draw of 64 bits, which takes less
    than a third of the time on a CPU. p becomes a multiple of 2⁻¹⁶: 0.1 becomes 0.100006, and the scale follows.
    """
    dropped = round(p * 2**16)
    if dropped == 0:
        return values
    if dropped == 2**16:
        return values * 0
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    numbers = draws.view(torch.int16)[: values.numel()].view(values.shape)
    kept = (numbers >= dropped - 2**15).to(values.dtype)
    return values * kept.div_(1 - dropped / 2**16)


class CoarseDropout(nn.Dropout):
    """`nn.Dropout` for the CPU, drawing by `coarse_dropout`."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any shape in, the same shape out."""
        return coarse_dropout(values, self.p) if self.training else values


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers calls it: heads `[N, A, L, D]` to `[N, L, A, D]`, the mask True where one may look.

    PyTorch's fused attention is used in eval mode only: on a CPU it has no dropout, and its backward pass is slow for
    short texts.
    """
    if not module.training:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = coarse_dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
