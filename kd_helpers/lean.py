"""Chapter 05: what a training step can leave out.

On a CPU, matrix products take only a part of the time of a small student's step. Other parts have no effect on
learning: the work on rows of the embedding table that occur in no training text, random numbers that are finer than
dropout needs, and, in bfloat16, results of LayerNorm that are written in float32 only to be cast again. `lean_training`
leaves them out while a model trains. Afterwards the model is an ordinary model again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    Losses and gradients are those of ordinary training, with three differences: rows of the embedding table that do not
    occur keep their values instead of being shrunk by weight decay; on a CPU dropout draws other masks; and on a CPU
    in bfloat16 what LayerNorm returns is rounded to bfloat16 for all that read it, not for matrix products alone. What
    a model has of its own kind is left as it is: an embedding table that scales its rows, or attention that does not
    go through the interface of transformers, are trained as usual.

    Args:
        model: changed in place while the context lasts: make the optimiser inside, save the model outside. Its
            embedding table becomes `SeenRows`; on a CPU its dropout becomes `CoarseDropout`, and so in attention, and
            `LayerNorm` becomes `RoundedNorm`.
        token_ids: the token ids of each training text, and of the padding if the model's configuration does not say it.
            In eval mode the model takes any other text as well.

    Raises:
        ValueError: the model's output layer shares the embedding table.
    """
    table = model.get_input_embeddings()
    if (output := model.get_output_embeddings()) is not None and output.weight is table.weight:
        raise ValueError(
            "the output layer shares the embedding table, which must then be trained whole; train as usual."
        )
    with contextlib.ExitStack() as undo:  # last in, first out: the trained rows are put back into the table first
        places = list(_places(model, table))
        if all(map(_looks_up_rows, (table, *(getattr(parent, name) for parent, name in places)))):
            seen = SeenRows(table, itertools.chain(token_ids, [_ids_that_models_add(model)])).train(model.training)
            for parent, name in places:
                undo.callback(setattr, parent, name, getattr(parent, name))
                setattr(parent, name, seen)
            undo.callback(seen.write_back)
        if table.weight.device.type == "cpu":
            if model.config._attn_implementation == "sdpa":  # others may add to the scores what is not passed on
                undo.callback(model.set_attn_implementation, "sdpa")
                model.set_attn_implementation(ATTENTION)
            for usual, lean in ((nn.Dropout, CoarseDropout), (nn.LayerNorm, RoundedNorm)):
                modules = [module for module in model.modules() if type(module) is usual]
                undo.callback(_become, modules, usual)
                _become(modules, lean)
        yield


def _places(model: nn.Module, table: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where a model holds its embedding table: encoder and decoder of T5 have modules of their own that share it."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if getattr(child, "weight", None) is table.weight:
                yield parent, name


def _looks_up_rows(table: nn.Module) -> bool:
    """Whether a module gives the rows of its table and nothing else: Gemma and BART scale them."""
    options = (table.max_norm, table.scale_grad_by_freq, table.sparse) if type(table) is nn.Embedding else (True,)
    return not any(options)


def _ids_that_models_add(model: PreTrainedModel) -> list[int]:
    """Token ids that occur in no text: a decoder starts with one, and some models pad texts themselves."""
    ids = (getattr(model.config, name, None) for name in ("pad_token_id", "decoder_start_token_id"))
    rows = model.get_input_embeddings().num_embeddings
    return [index for index in ids if isinstance(index, int) and 0 <= index < rows]


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
        token_ids: the token ids of each training text; that of the table's own padding counts as one that occurs.
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


class RoundedNorm(nn.LayerNorm):
    """`nn.LayerNorm` that returns the precision of the matrix products under autocast on a CPU.

    It computes in float32 as always. autocast would also return float32, and each product that reads the result would
    cast it for itself. Where a sum of such results is normalised again, as in BERT, it is read in that precision too.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any shape that ends with the normalised one in, the same shape out."""
        if not (self.training and torch.is_autocast_enabled("cpu")):
            return super().forward(values)
        precision = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return F.layer_norm(values, self.normalized_shape, self.weight, self.bias, self.eps).to(precision)


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
    groups = query.shape[1] // key.shape[1]  # of heads that share keys and values, as Llama's do
    key, value = (states.repeat_interleave(groups, dim=1) if groups > 1 else states for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (bias := options.get("position_bias")) is not None:
        scores = scores + bias
    if attention_mask is None and _is_causal(module, options):  # as torch is told where no text is padded
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = coarse_dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether a token may look at those before it only; the rule of transformers' own attention."""
    told = options.get("is_causal")
    return getattr(module, "is_causal", True) if told is None else told


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
