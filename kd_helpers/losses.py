"""Chapters 03 and 13: the distillation loss of a classifier, and the losses of tokens.

    total = alpha · T² · KL(softmax(z_T / T) ‖ softmax(z_S / T)) + (1 − alpha) · CE(z_S, y)

z_S and z_T are the logits of student and teacher, y the labels, T the temperature, and **alpha weights
the soft loss**. From Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015,
arXiv 1503.02531), section 2. Shapes: N examples, C classes.

Logits for every token of a text, `[B, L, V]`, need a mask and another mean. These losses refuse them; the second half
of this module has the losses for them. Shapes there: B texts, L tokens of each, V tokens in the vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kd_helpers.config import require_alpha, require_temperature

IGNORE_INDEX = -100  # the label of a text that has none (the convention of PyTorch's cross-entropy)


class DistillationLoss(NamedTuple):
    """The loss and its two parts, scalars in float32. Only `total` is weighted by alpha."""

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor


def soft_targets(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities `softmax(z / T)`, shape `[..., C]` as the logits (1503.02531, equation 1).

    T = 1 gives the model's own probabilities; a higher T moves them towards the uniform distribution.

    Raises:
        ValueError: T is not a finite number above 0.
    """
    require_temperature(temperature)
    return F.softmax(logits.float() / temperature, dim=-1)


def soft_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """`T² · KL(p_T ‖ q_S)`, mean over the N examples, in nats; logits `[N, C]`, result a scalar; 0 where N is 0.

    The factor T² keeps the size of the gradient while T changes: it shrinks like 1/T² without it
    (1503.02531, section 2). No gradient reaches `teacher_logits`. From T of about 1,000 on the value has few right
    digits, since T² multiplies the rounding of the logarithms in float32; the gradient has more.

    Raises:
        ValueError: the logits are not `[N, C]`, the shapes differ, or T is not a finite number above 0.
    """
    require_temperature(temperature)
    _require_rows_of_classes(student_logits)
    require_same_shape(student_logits, teacher_logits)
    for whose, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if are_probabilities(logits):
            warnings.warn(
                f"the {whose}'s logits look like probabilities (every row sums to 1); the loss takes the outputs "
                "before the softmax.",
                stacklevel=2,
            )
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    # Divided by N, not by N · C as reduction="mean" would: that weakens the soft loss C times.
    return temperature**2 * (F.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(1, len(log_q)))


def hard_loss(student_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the labels, mean over the examples that have one; logits `[N, C]`, labels `[N]`.

    Label −100 means "no label". A batch without any label gives exactly 0, with a gradient of 0.

    Raises:
        ValueError: the logits are not `[N, C]`, a label is neither −100 nor in 0 … C − 1, or there is not one whole
            number for each row.
    """
    _require_rows_of_classes(student_logits)
    if labels.shape != student_logits.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}, the logits shape "
            f"{tuple(student_logits.shape)}; give a whole number for each row."
        )
    labels = labels.long()  # unsigned bytes hold no −100: compared with it they would take 156 for "no label"
    _require_labels_in_range(labels, classes=student_logits.shape[-1])
    labelled = (labels != IGNORE_INDEX).sum().clamp(min=1)
    summed = F.cross_entropy(student_logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return summed / labelled


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
) -> DistillationLoss:
    """`alpha · soft + (1 − alpha) · hard`, computed in float32 whatever the dtype of the logits.

    Args:
        student_logits: `[N, C]`.
        teacher_logits: `[N, C]`, or None when alpha is 0; the soft loss is then reported as 0.
        labels: `[N]`, −100 where a text has no label.
        temperature: T > 0.
        alpha: weight of the soft loss in [0, 1].

    Raises:
        ValueError: a value or shape does not fit; one sentence says which.
    """
    require_alpha(alpha)
    hard = hard_loss(student_logits, labels)
    if teacher_logits is None:
        if alpha > 0:
            raise ValueError(f"alpha is {alpha} but there are no teacher logits; give them, or set alpha=0.")
        soft = torch.zeros_like(hard)
    else:
        soft = soft_loss(student_logits, teacher_logits, temperature)
    # A part of weight 0 is left out rather than multiplied by 0: 0 · inf would poison the total.
    if alpha == 0:
        return DistillationLoss(hard, soft.detach(), hard)
    if alpha == 1:
        return DistillationLoss(soft, soft, hard.detach())
    return DistillationLoss(alpha * soft + (1 - alpha) * hard, soft, hard)


def are_probabilities(logits: torch.Tensor) -> bool:
    """Whether every one of N ≥ 2 rows `[N, C]` is a distribution, which real logits are not by accident.

    It is checked on a CPU only: on a GPU every step would have to wait for the result.
    """
    if logits.device.type != "cpu" or logits.ndim != 2 or len(logits) < 2:
        return False
    values = logits.detach().float()
    return bool((values >= 0).all()) and bool(((values.sum(dim=-1) - 1).abs() < 0.01).all())


def _require_rows_of_classes(logits: torch.Tensor) -> None:
    """With a third dimension the soft loss would be L times too large, and the hard loss wrong where L = C."""
    if logits.ndim != 2:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}; this loss takes one row of class logits for each example, "
            "[N, C]. For the logits of tokens, [B, L, V], use token_soft_loss and token_hard_loss of "
            "kd_helpers.losses, which leave padding out."
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}, so there is one class, whose probability is always 1; give "
            "at least two classes (a regression has none)."
        )


def require_same_shape(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
    """Refuse logits of student and teacher that are not for the same examples and classes.

    Raises:
        ValueError: the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits have shape {tuple(student_logits.shape)} but teacher logits "
            f"{tuple(teacher_logits.shape)}; both need the same examples and the same classes."
        )


def _require_labels_in_range(labels: torch.Tensor, *, classes: int) -> None:
    # On a GPU this check would make every step wait for the device; cross_entropy asserts there itself.
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    allowed = (labels == IGNORE_INDEX) | ((labels >= 0) & (labels < classes))
    if not bool(allowed.all()):
        wrong = int(labels[~allowed][0])
        raise ValueError(f"label {wrong} is out of range; labels run from 0 to {classes - 1}, or −100 for none.")


# --- Tokens ---
#
# A softmax over a vocabulary of 32,000 for 32 texts of 1,024 tokens takes 4 GB in float32, and a loss needs several. So
# the losses go through the tokens in chunks. Of each chunk the sum is kept, and the gradient, which is computed at
# once: nothing else has to be kept, or computed again. Each loss is a mean over the tokens that count. Values at other
# tokens, above all padding, have no effect whatever they are, and where no token counts the loss and its gradient are
# exactly 0.

# Logits that are looked at together: 1 MB in float32, which the cache of a CPU's core holds, or half a gigabyte of a
# GPU's memory, since many small pieces would keep a GPU waiting. With a head it is more on a CPU as well, since each
# chunk adds a gradient as large as the head.
CHUNK_VALUES = 2**18
CHUNK_VALUES_WITH_HEAD = 2**21
CHUNK_VALUES_ELSEWHERE = 2**27


class StatesAndHead(NamedTuple):
    """Logits that are not computed yet: `states @ weight.T`, a chunk of tokens at a time.

    The token losses take it in the place of logits `[B, L, V]`, which then never exist as a whole, nor do their
    gradients. A head that does more than this product (a bias, a scale, a cap on the logits) needs the logits.

    Attributes:
        states: the last hidden states, `[B, L, H]`.
        weight: of the output layer, `[V, H]`.
    """

    states: torch.Tensor
    weight: torch.Tensor


TokenLogits = torch.Tensor | StatesAndHead


def token_hard_loss(student_logits: TokenLogits, labels: torch.Tensor, *, chunk: int | None = None) -> torch.Tensor:
    """Cross-entropy with the tokens that come next, mean over the labels that are not −100, in nats and float32.

    Args:
        student_logits: `[B, L, V]`, at each position those for its own label (see `language_models.next_tokens`).
        labels: token ids `[B, L]`, −100 where a position does not count.
        chunk: tokens that are looked at together, at least one of each text; None: see `CHUNK_VALUES`.

    Raises:
        ValueError: the shapes do not fit, or a label is neither −100 nor in 0 … V − 1.
    """
    vocabulary = _require_tokens("student logits", student_logits, "labels", labels)
    labels = labels.long()
    _require_labels_in_range(labels, classes=vocabulary)

    def cross_entropy(student: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(student, chosen, reduction="sum")

    return _mean_over_tokens(
        cross_entropy, labels != IGNORE_INDEX, student_logits, labels, vocabulary=vocabulary, chunk=chunk
    )


def token_soft_loss(
    student_logits: TokenLogits,
    teacher_logits: TokenLogits,
    mask: torch.Tensor,
    *,
    temperature: float,
    beta: float = 0.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """`T² · D(p_T, q_S)`, mean over the tokens that count, in nats and float32, where beta chooses the divergence D.

    | beta | D | |
    |---|---|---|
    | 0 | KL(p ‖ q) | forward: q must cover all that p finds likely |
    | 1 | KL(q ‖ p) | reverse: q must avoid all that p finds unlikely |
    | between | β · KL(p ‖ m) + (1 − β) · KL(q ‖ m), where m = β · p + (1 − β) · q | generalised Jensen-Shannon |

    From Agarwal et al., "On-Policy Distillation of Language Models" (2023, arXiv 2306.13649), equation 1. JSD(β)
    itself goes to 0 at both ends: JSD(β) / β tends to KL(p ‖ q) for small β, so 0 and 1 are cases of their own. Where p
    and q are close, JSD(β) is β · (1 − β) times either KL: its gradient at β = 0.5 is a quarter of theirs.
    The paper takes the mean within each text first; here, as in trl, each token counts the same. trl's
    `generalized_jsd_loss` is this loss without the factor T².

    Args:
        student_logits: `[B, L, V]`, or states and head.
        teacher_logits: of the same tokens, `[B, L, V]`, or states and head; no gradient reaches them.
        mask: `[B, L]`, 1 or True for the tokens that count.
        temperature: T > 0.
        beta: from 0 to 1.
        chunk: tokens that are looked at together, at least one of each text; None: see `CHUNK_VALUES`.

    Raises:
        ValueError: shapes or vocabularies do not fit, T is not a finite number above 0, or beta lies outside [0, 1].
    """
    require_temperature(temperature)
    require_beta(beta)
    vocabulary = _require_tokens("student logits", student_logits, "the mask", mask)
    require_same_vocabulary(vocabulary, _require_tokens("teacher logits", teacher_logits, "the mask", mask))
    if isinstance(teacher_logits, StatesAndHead):
        teacher_logits = StatesAndHead(*(tensor.detach() for tensor in teacher_logits))

    def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_p = F.log_softmax(_logits(teacher, teacher_logits) / temperature, dim=-1)
        if beta == 0:
            return _kl(log_p, log_q)
        if beta == 1:
            return _kl(log_q, log_p)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)

    return temperature**2 * _mean_over_tokens(
        divergence,
        mask,
        student_logits,
        _rows(teacher_logits).detach(),
        vocabulary=vocabulary,
        chunk=chunk,
    )


def token_soft_loss_top_k(
    student_logits: TokenLogits,
    top_logits: torch.Tensor,
    top_ids: torch.Tensor,
    log_total: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float,
    tail: bool = True,
    chunk: int | None = None,
) -> torch.Tensor:
    """`T² · KL(p_T ‖ q_S)` where only the k likeliest tokens of the teacher are known, mean over the tokens that count.

    With `tail` the missing probability `1 − Σ p_i` stays: all other tokens together are one more outcome, of which the
    student is told the sum and not how to share it out. Otherwise it is dealt to the k tokens (p is renormalised, and
    the student taught to give the others nothing). That is biased: Anshumann et al., "Sparse Logit Sampling" (2025,
    arXiv 2503.16870).

    The tail's mass at T follows from the k logits only together with `log_total`, and that depends on T: from the
    logits of a cache for T = 1 nobody can tell how flat the tail becomes at T = 2. So a cache serves one temperature.

    Args:
        student_logits: `[B, L, V]`, or states and head.
        top_logits: the teacher's k largest logits, `[B, L, k]`.
        top_ids: their tokens, whole numbers `[B, L, k]`.
        log_total: the logarithm of the teacher's `Σ exp(z / T)` over the whole vocabulary, `[B, L]`.
        mask: `[B, L]`, 1 or True for the tokens that count.
        temperature: T > 0, the one of `log_total`.
        tail: keep the missing probability as one more outcome; otherwise `log_total` is not used.
        chunk: tokens that are looked at together, at least one of each text; None: see `CHUNK_VALUES`.

    Raises:
        ValueError: the shapes do not fit, or T is not a finite number above 0.
    """
    require_temperature(temperature)
    vocabulary = _require_tokens("student logits", student_logits, "the mask", mask)
    k = top_logits.shape[-1]
    if not top_logits.shape == top_ids.shape == (*mask.shape, k) or log_total.shape != mask.shape or k > vocabulary:
        raise ValueError(
            f"top_logits have shape {tuple(top_logits.shape)}, top_ids {tuple(top_ids.shape)} and log_total "
            f"{tuple(log_total.shape)}; for this mask give {[*mask.shape, 'k']}, the same, and {[*mask.shape]}, with k "
            f"at most {vocabulary}."
        )

    def divergence(student: torch.Tensor, top: torch.Tensor, ids: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ids = ids.long()
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_q_top = log_q.gather(-1, ids)
        log_p_top = top.float() / temperature
        if not tail or k == vocabulary:
            return _kl(F.log_softmax(log_p_top, dim=-1), log_q_top)
        log_p_top = log_p_top - total.float().unsqueeze(-1)
        p_tail = (1 - log_p_top.exp().sum(dim=-1)).clamp(min=0)
        # The sum of the others, not 1 minus that of the k: what the student gives to them may be far below 1e-7.
        log_q_tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
        return _kl(log_p_top, log_q_top) + (torch.xlogy(p_tail, p_tail) - p_tail * log_q_tail).sum()

    teacher = (tensor.detach() for tensor in (top_logits, top_ids, log_total))
    return temperature**2 * _mean_over_tokens(
        divergence, mask, student_logits, *teacher, vocabulary=vocabulary, chunk=chunk
    )


def require_beta(beta: float) -> None:
    """Refuse a beta outside [0, 1]."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta is {beta!r}; give a number between 0 (forward KL) and 1 (reverse KL).")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; give a number between 0 (forward KL) and 1 (reverse KL).")


def require_same_vocabulary(student: int, teacher: int) -> None:
    """Refuse to compare logits of vocabularies of two sizes: there the same position means two different tokens."""
    if student != teacher:
        raise ValueError(
            f"the student's vocabulary has {student:,} tokens, the teacher's {teacher:,}, so their logits can't be "
            "compared: use one tokenizer for both (and cut heads that are padded beyond it), train the student on "
            "texts that the teacher writes (sequence level), or compare sorted probabilities (ULD, arXiv 2402.12030)."
        )


def _mean_over_tokens(
    summed: Callable[..., torch.Tensor],
    mask: torch.Tensor,
    student_logits: TokenLogits,
    *others: torch.Tensor,
    vocabulary: int,
    chunk: int | None,
) -> torch.Tensor:
    """The mean of a loss over the tokens whose mask is set.

    Args:
        summed: takes the student's logits `[n, V]` in float32 and rows `[n, …]` of each of the `others`, and returns
            the sum of their losses.
        mask: `[B, L]`.
        student_logits: `[B, L, V]`, or states and head; the gradient reaches nothing else.
        others: `[B, L, …]`.
        vocabulary: V.
        chunk: tokens in one call of `summed`, but at least one of each text; None: see `CHUNK_VALUES`.
    """
    rows = _rows(student_logits)
    weight = student_logits.weight if isinstance(student_logits, StatesAndHead) else None
    if chunk is None:
        on_cpu = CHUNK_VALUES if weight is None else CHUNK_VALUES_WITH_HEAD
        chunk = (on_cpu if rows.device.type == "cpu" else CHUNK_VALUES_ELSEWHERE) // vocabulary
    mask = mask.bool()
    # Cut along the texts' length, so that logits without their last position need not be copied to be cut.
    length = max(1, chunk // max(1, len(mask)))
    total = _SumOverChunks.apply(summed, length, torch.is_grad_enabled(), mask, rows, weight, *others)
    return total / mask.sum().clamp(min=1)


class _SumOverChunks(torch.autograd.Function):
    """The sum of a loss over tokens, and its gradient, a chunk after the other.

    The gradient takes the memory that the logits' gradient takes anyway, and no chunk is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        summed: Callable[..., torch.Tensor],
        length: int,
        recorded: bool,
        mask: torch.Tensor,
        rows: torch.Tensor,
        weight: torch.Tensor | None,
        *others: torch.Tensor,
    ) -> torch.Tensor:
        """Go through the chunks, each `length` tokens of every text; for the other arguments see `_mean_over_tokens`.

        Here autograd records nothing, so `recorded` says whether it does where the loss is asked for.
        """
        of_rows, of_weight = (recorded and needed for needed in ctx.needs_input_grad[4:6])
        ctx.gradients = (
            torch.zeros_like(rows) if of_rows else None,
            torch.zeros_like(weight, dtype=torch.float32) if of_weight else None,  # a sum of many small parts
        )
        ctx.weight_type = None if weight is None else weight.dtype
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        head = None if weight is None else weight.detach().requires_grad_(of_weight)
        for first in range(0, mask.shape[1], length):
            cut = (slice(None), slice(first, first + length))
            counts = mask[cut]
            with torch.set_grad_enabled(of_rows or of_weight):
                chosen = rows[cut][counts].detach().requires_grad_(of_rows)
                logits = chosen if head is None else F.linear(chosen, head)
                loss = summed(logits.float(), *(other[cut][counts] for other in others))
            total += loss.detach()
            wanted = [tensor for tensor in (chosen, head) if tensor is not None and tensor.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted)) if wanted else iter(())
            if of_rows:
                ctx.gradients[0][cut][counts] = next(found)
            if of_weight:
                ctx.gradients[1].add_(next(found))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[Any, ...]:
        """The gradients, times that of what was made of the sum."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of this loss was used already; compute the loss again.")
        of_rows, of_weight = (None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        if of_weight is not None:
            of_weight = of_weight.to(ctx.weight_type)
        return None, None, None, None, of_rows, of_weight, *(None for _ in ctx.needs_input_grad[6:])


def _rows(logits: TokenLogits) -> torch.Tensor:
    """What is cut into chunks: logits `[B, L, V]`, or the states `[B, L, H]` that they are made of."""
    return logits.states if isinstance(logits, StatesAndHead) else logits


def _logits(rows: torch.Tensor, source: TokenLogits) -> torch.Tensor:
    """The logits `[n, V]` of some rows of `source`, in float32."""
    return (F.linear(rows, source.weight) if isinstance(source, StatesAndHead) else rows).float()


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q), summed over rows."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _require_tokens(whose: str, logits: TokenLogits, name: str, of_tokens: torch.Tensor) -> int:
    """Refuse what is not one row for each token; returns the size of the vocabulary."""
    rows = _rows(logits)
    if rows.ndim != 3 or rows.shape[:2] != of_tokens.shape:
        raise ValueError(
            f"{whose} have shape {tuple(rows.shape)} and {name} {tuple(of_tokens.shape)}; give [B, L, V] and [B, L], "
            "for the same tokens of the same texts."
        )
    if not isinstance(logits, StatesAndHead):
        return rows.shape[-1]
    if logits.weight.ndim != 2 or logits.weight.shape[1] != rows.shape[-1]:
        raise ValueError(
            f"the states have shape {tuple(rows.shape)}, the head's weight {tuple(logits.weight.shape)}; give "
            "[B, L, H] and [V, H]."
        )
    return len(logits.weight)
