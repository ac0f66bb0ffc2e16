"""Chapter 13: small causal language models, and three ways of distilling them.

A causal language model predicts each token of a text from those before it. A teacher can help a student to learn that:

- *token by token* (`distillation_loss_of`): on given texts the student learns the teacher's probabilities for every
  next token, by forward KL, reverse KL or a Jensen-Shannon divergence. The teacher runs beside the student, or ran once
  and its k largest logits were cached (`cached_top_logits`).
- *at sequence level* (Kim and Rush, "Sequence-Level Knowledge Distillation", 2016, arXiv 1606.07947): the teacher
  writes texts, `write_texts(teacher, …)`, and the student learns them as if they were data, `cross_entropy_loss`. The
  paper's teacher writes its likeliest translation, found by beam search. A story has no likeliest version worth
  telling, so here the teacher samples; `temperature=0` writes the likeliest token each time.
- *on-policy* (Agarwal et al., GKD, 2023, arXiv 2306.13649): the student writes, and learns what the teacher would have
  predicted at each token of the student's own text (`on_policy_loss_of`). No gradient passes through the writing, so
  with reverse KL this is not MiniLLM (arXiv 2306.08543), which adds a policy gradient.

All of them are losses for `loop.fit`. Shapes: B texts, L tokens of each, V tokens in the vocabulary, k of them cached.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kd_helpers import artifacts
from kd_helpers.checkpoints import Progress, build_parts
from kd_helpers.config import DistillConfig, require_alpha, require_temperature, require_whole
from kd_helpers.data import BucketBatchSampler, LengthSortedBatchSampler, text_id
from kd_helpers.loop import fit, recipe
from kd_helpers.losses import (
    IGNORE_INDEX,
    DistillationLoss,
    require_beta,
    require_same_vocabulary,
    token_hard_loss,
    token_soft_loss,
    token_soft_loss_top_k,
)
from kd_helpers.models import Batch, model_digest, require_eval_mode, require_teacher_and_student
from kd_helpers.provenance import made_by
from kd_helpers.runtime import autocast, evaluating

BATCH_SIZE = 32
LEARNING_RATE = 5e-3
WARMUP = 0.05  # share of the steps in which the learning rate rises
SHARD = 2048  # texts; an interrupted pass of the teacher loses at most this many
MOST_LOGITS = 2**27  # of a batch that is measured or cached: half a gigabyte in float32

Text = Sequence[int]  # token ids
LossOf = Callable[[Batch], DistillationLoss]
SoftOf = Callable[["NextTokens", Batch], torch.Tensor]


# --- the model ---


class CausalShape(NamedTuple):
    """The size of a causal language model.

    Attributes:
        vocabulary: tokens that it knows, V.
        width: numbers in a hidden state.
        depth: layers.
        heads: of the attention in each layer.
        positions: tokens of the longest text.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    positions: int = 512


def make_causal_model(shape: CausalShape, *, seed: int) -> LlamaForCausalLM:
    """A Llama of this size with random weights.

    A Llama, since small models of today are built this way (SmolLM2, for one), and since no weight is spent on what a
    small model can do without: positions are rotations, not a table that is learned, and the output layer shares the
    embedding table, so that the vocabulary is paid for once. There is no dropout, so training depends on nothing but
    the weights at the start and the batches. The hidden layer of an MLP is 8/3 as wide as the model, so that its three
    matrices have as many weights as the two that are four times as wide in a GPT-2.

    Args:
        shape: its size.
        seed: draws the weights.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a size is below 1, or the heads cannot share the width.
    """
    for name, value in shape._asdict().items():
        require_whole(name, value, minimum=1)
    if shape.width % (2 * shape.heads):
        raise ValueError(
            f"width is {shape.width}, which {shape.heads} heads can't share in pairs of numbers; give a multiple of "
            f"{2 * shape.heads}."
        )
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=8 * -(-shape.width // 3),  # a multiple of 8
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


# --- texts ---


class StepBatchSampler(BucketBatchSampler):
    """Batches of texts of similar length that know which step of the training they are for.

    `step` counts the batches from 0, over all epochs. It follows from the epoch and the place in it, so it is the same
    in a run that was resumed.
    """

    step = 0

    def __iter__(self) -> Iterator[list[int]]:
        for place, rows in enumerate(super().__iter__(), start=self.start):
            self.step = self.epoch * len(self) + place
            yield rows


def causal_batches(texts: Sequence[Text], batch_size: int = BATCH_SIZE, *, seed: int, pad_id: int = 0) -> DataLoader:
    """Batches to train on, in another order in every epoch.

    Args:
        texts: token ids, at least two a text; of one length, or padded in the batch, on the right.
        batch_size: B.
        seed: of the order.
        pad_id: the token that fills a row. It has no effect: nothing before it sees it, and no loss counts it.

    Returns:
        A loader of `input_ids` and `attention_mask` `[B, L]`, `id` `[B]` (a number made of the text's tokens, see
        `id_of`) and `step`, the number of the batch, counted from 0 over all epochs.

    Raises:
        ValueError: there are no texts, or one has a single token or none.
    """
    _require_texts(texts)
    sampler = StepBatchSampler([len(text) for text in texts], batch_size, seed=seed)

    def collate(rows: list[Text]) -> Batch:
        return {**padded(rows, pad_id), "step": torch.tensor(sampler.step)}

    return _loader(texts, sampler, collate)


def held_out_batches(texts: Sequence[Text], batch_size: int = 64) -> DataLoader:
    """Batches to measure on: from the shortest text to the longest, always in the same order, without `step`.

    Raises:
        ValueError: see `causal_batches`.
    """
    _require_texts(texts)
    return _loader(texts, LengthSortedBatchSampler([len(text) for text in texts], batch_size), padded)


def _loader(texts: Sequence[Text], sampler: Any, collate: Callable[[list[Text]], Batch]) -> DataLoader:
    # A generator, or each pass would draw from the one that everything else draws from.
    return DataLoader(texts, batch_sampler=sampler, collate_fn=collate, generator=torch.Generator())


def padded(texts: Sequence[Text], pad_id: int = 0) -> Batch:
    """One batch of texts: `input_ids` and `attention_mask` `[B, L]`, `id` `[B]`; shorter texts end in padding."""
    length = max(len(text) for text in texts)
    return {
        "input_ids": torch.tensor([[*text, *[pad_id] * (length - len(text))] for text in texts]),
        "attention_mask": torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts]),
        "id": torch.tensor([id_of(text) for text in texts]),
    }


def id_of(text: Text) -> int:
    """A number that says which text this is: texts of the same tokens share it, on every machine."""
    return text_id(" ".join(map(str, text)))


def _require_texts(texts: Sequence[Text]) -> None:
    if len(texts) == 0:
        raise ValueError("there are no texts; give at least one.")
    short = [number for number, text in enumerate(texts) if len(text) < 2]
    if short:
        raise ValueError(
            f"{len(short):,} texts have fewer than two tokens (the first is number {short[0]}), so there is nothing to "
            "predict in them; leave them out."
        )


# --- predicting ---


class NextTokens(NamedTuple):
    """Predictions side by side with what they predict.

    Attributes:
        logits: `[B, L − 1, V]`, after each token but the last.
        labels: the tokens that followed, `[B, L − 1]`, −100 where they do not count.
        mask: True where they count, `[B, L − 1]`.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


def next_tokens(logits: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor) -> NextTokens:
    """Shift by one: the logits at token t are the prediction of token t + 1. Nowhere else is anything shifted.

    Args:
        logits: `[B, L, V]`, as a causal model computes them.
        input_ids: the tokens that it read, `[B, L]`.
        mask: `[B, L]`, 1 for the tokens that count *as predicted*: all that are no padding, or those that were written
            after a prompt. The first token of a text is never predicted.
    """
    counts = mask[:, 1:].bool()
    return NextTokens(logits[:, :-1], input_ids[:, 1:].masked_fill(~counts, IGNORE_INDEX), counts)


def causal_forward(model: PreTrainedModel, batch: Batch, mask: torch.Tensor | None = None) -> NextTokens:
    """Run a causal model on a batch, with gradients where they are on.

    Args:
        model: any causal language model of transformers.
        batch: of `causal_batches`, `held_out_batches` or `padded`.
        mask: which tokens count, see `next_tokens`; None takes all that are no padding.

    Raises:
        ValueError: a token is not in the model's vocabulary.
    """
    ids = batch["input_ids"]
    vocabulary = model.config.vocab_size
    if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"the texts have tokens from {int(ids.min())} to {int(ids.max())}, the model knows 0 to {vocabulary - 1}; "
            "use the tokenizer that it was made for."
        )
    ids = ids.to(model.device, non_blocking=True)
    mask = batch["attention_mask"] if mask is None else mask
    # No attention mask is needed: padding stands on the right, where no token looks.
    logits = model(input_ids=ids, use_cache=False).logits
    return next_tokens(logits, ids, mask.to(model.device, non_blocking=True))


def held_out_nats(model: PreTrainedModel, batches: Iterable[Batch], precision: torch.dtype = torch.float32) -> float:
    """The mean negative log-likelihood of a token in nats, over all tokens of all texts but the first of each.

    Args:
        model: its mode is the same afterwards.
        batches: of `held_out_batches`.
        precision: dtype of the matrix products.
    """
    summed, count = 0.0, 0
    with evaluating(model), torch.no_grad(), autocast(model.device, precision):
        for batch in batches:
            predicted = causal_forward(model, batch)
            tokens = int(predicted.mask.sum())
            summed += token_hard_loss(predicted.logits, predicted.labels).item() * tokens
            count += tokens
    return summed / count


def nats_of_texts(model: PreTrainedModel, texts: Sequence[Text]) -> list[list[float]]:
    """The negative log-likelihood in nats of every token but the first of each text, in the order of the texts."""
    found: dict[int, list[float]] = {}
    with evaluating(model), torch.no_grad():
        for batch in held_out_batches(texts, _batch_size(model, texts)):
            predicted = causal_forward(model, batch)
            nats = F.cross_entropy(predicted.logits.float().transpose(1, 2), predicted.labels, reduction="none")
            lengths = predicted.mask.sum(dim=1).tolist()
            rows = zip(batch["id"].tolist(), nats.tolist(), lengths, strict=True)
            found |= {text: values[:length] for text, values, length in rows}
    return [found[id_of(text)] for text in texts]


def _batch_size(model: PreTrainedModel, texts: Sequence[Text]) -> int:
    """64 texts, or as many as have at most `MOST_LOGITS` logits."""
    longest = max((len(text) for text in texts), default=1)
    return max(1, min(64, MOST_LOGITS // (longest * model.config.vocab_size)))


# --- writing ---


@torch.no_grad()
def write_texts(
    model: PreTrainedModel,
    prompts: Sequence[Text],
    *,
    new_tokens: int,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    end_id: int | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Let a model continue prompts, token by token.

    Keys and values of the tokens that were read are kept (the KV cache), so each step reads one token a text. Prompts
    of the same length are continued together, so nothing is padded. Every text draws from its own random numbers, one a
    token, whatever else is written beside it; two models that get the same seed draw from the same numbers.

    Args:
        model: any causal language model of transformers; its mode is the same afterwards.
        prompts: token ids, at least one each.
        new_tokens: that are written after each prompt, at most.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: a whole number of at least 0, or several that together are one.
        end_id: the token that ends a text; it is kept. None writes all `new_tokens`.
        batch_size: texts that are written at a time.

    Returns:
        For each prompt the whole text, the prompt included.

    Raises:
        TypeError: a number is no whole one, or there are several tokens that end a text.
        ValueError: a prompt is empty, the text would be longer than the model has positions, or a number is out of
            range.
    """
    require_whole("batch_size", batch_size, minimum=1)
    if end_id is not None:
        require_whole("end_id", end_id, minimum=0)
    require_writable(model, prompts, new_tokens, temperature)
    draws = torch.from_numpy(np.random.default_rng(seed).random((len(prompts), new_tokens), dtype=np.float32))
    texts = [list(prompt) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with evaluating(model):
        for _, group in itertools.groupby(by_length, key=lambda row: len(prompts[row])):
            alike = list(group)
            for rows in (alike[start : start + batch_size] for start in range(0, len(alike), batch_size)):
                begun = torch.tensor([list(prompts[row]) for row in rows], device=model.device)
                written = _continue(model, begun, draws[rows].to(model.device), temperature, end_id)
                for row, tokens in zip(rows, written.tolist(), strict=True):
                    texts[row] += tokens[: tokens.index(end_id) + 1] if end_id in tokens else tokens
    return texts


def _continue(
    model: PreTrainedModel, prompts: torch.Tensor, draws: torch.Tensor, temperature: float, end_id: int | None
) -> torch.Tensor:
    """What the model writes after prompts `[B, P]` with random numbers `[B, new]`: tokens `[B, at most new]`.

    A text that has ended goes on here until all have; the caller cuts it.
    """
    read, cache, written = prompts, None, []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    for draw in draws.unbind(dim=1):
        output = model(input_ids=read, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = draw_tokens(output.logits[:, -1], draw, temperature)
        written.append(token)
        ended |= token == (-1 if end_id is None else end_id)
        if bool(ended.all()):
            break
        read = token.unsqueeze(-1)
    return torch.stack(written, dim=1)


def draw_tokens(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
    """A token `[B]` from each row of logits `[B, V]`, with the probability that the model gives it at this temperature.

    The tokens share the numbers from 0 to 1 among themselves, each as much as it is probable; the token is drawn into
    whose part the random number falls.

    Args:
        logits: `[B, V]`.
        draws: random numbers `[B]`, evenly spread over [0, 1), in float32.
        temperature: at 0 the likeliest token is taken, and no random number matters.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    bounds = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # A share of the total, which is not exactly 1; so no token beyond the last one can be drawn.
    return torch.searchsorted(bounds, (draws * bounds[:, -1]).unsqueeze(-1), right=True).squeeze(-1)


def require_writable(model: PreTrainedModel, prompts: Sequence[Text], new_tokens: int, temperature: float) -> None:
    """Refuse what `write_texts` can't write; its arguments."""
    require_whole("new_tokens", new_tokens, minimum=1)
    if temperature != 0:
        require_temperature(temperature)
    if len(prompts) == 0 or min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("a prompt has no tokens, or there is none; begin each text with one token at least.")
    longest = max(len(prompt) for prompt in prompts)
    positions = getattr(model.config, "max_position_embeddings", None) or longest + new_tokens
    if longest >= positions:
        raise ValueError(f"a prompt has {longest} tokens and the model {positions} positions; shorten the prompts.")
    if longest + new_tokens > positions:
        raise ValueError(
            f"{longest} tokens of a prompt and {new_tokens} new ones are more than the model's {positions} positions; "
            f"set new_tokens to at most {positions - longest}, or shorten the prompts."
        )


# --- losses ---


def cross_entropy_loss(student: PreTrainedModel) -> LossOf:
    """Learn the texts themselves: the loss without a teacher, and that of sequence-level distillation."""

    def loss_of(batch: Batch) -> DistillationLoss:
        own = causal_forward(student, batch)
        hard = token_hard_loss(own.logits, own.labels)
        return DistillationLoss(hard, torch.zeros_like(hard), hard)

    return loss_of


def distillation_loss_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel | TopLogits,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    beta: float = 0.0,
    tail: bool = True,
) -> LossOf:
    """`alpha · soft + (1 − alpha) · hard`: learn what the teacher predicts at each token, and the texts themselves.

    Args:
        student: learns.
        teacher: a frozen model that runs on every batch (online), or what `cached_top_logits` found.
        alpha: weight of the soft loss in [0, 1].
        temperature: T of the soft loss; a cache serves one T.
        beta: the divergence of the soft loss, see `losses.token_soft_loss`: 0 is forward KL, 1 reverse KL.
        tail: of cached logits, see `losses.token_soft_loss_top_k`.

    Raises:
        ValueError: the vocabularies differ, the two can't be teacher and student, a number is out of range, or a cache
            does not serve this temperature or beta.
    """
    require_alpha(alpha)
    if isinstance(teacher, TopLogits):
        soft_of = _cached_soft_loss(student, teacher, temperature, beta, tail)
    else:
        soft_of = _online_soft_loss(student, teacher, temperature, beta)

    def loss_of(batch: Batch) -> DistillationLoss:
        own = causal_forward(student, batch)
        hard = token_hard_loss(own.logits.detach() if alpha == 1 else own.logits, own.labels)
        # A part of weight 0 is left out rather than multiplied by 0, and a teacher that has no say does not run.
        if alpha == 0:
            return DistillationLoss(hard, torch.zeros_like(hard), hard)
        soft = soft_of(own, batch)
        if alpha == 1:
            return DistillationLoss(soft, soft, hard)
        return DistillationLoss(alpha * soft + (1 - alpha) * hard, soft, hard)

    return loss_of


def _online_soft_loss(student: PreTrainedModel, teacher: PreTrainedModel, temperature: float, beta: float) -> SoftOf:
    require_temperature(temperature)
    require_beta(beta)
    require_teacher_and_student(teacher, student)
    require_eval_mode(teacher)
    require_same_vocabulary(student.config.vocab_size, teacher.config.vocab_size)

    def soft_of(own: NextTokens, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            logits = causal_forward(teacher, batch).logits.to(own.logits.device)
        return token_soft_loss(own.logits, logits, own.mask, temperature=temperature, beta=beta)

    return soft_of


def _cached_soft_loss(
    student: PreTrainedModel, teacher: TopLogits, temperature: float, beta: float, tail: bool
) -> SoftOf:
    require_temperature(temperature)
    require_same_vocabulary(student.config.vocab_size, teacher.vocabulary)
    if temperature != teacher.temperature:
        raise ValueError(
            f"the teacher's logits were cached for temperature {teacher.temperature}, from which the rest of its "
            f"probability at temperature {temperature} can't be told; cache them again for that one."
        )
    if beta != 0:
        raise ValueError(
            f"beta is {beta}, but of cached top-k logits only forward KL (beta 0) can be computed: the others ask the "
            "teacher about every token that the student finds likely; give the teacher itself."
        )

    def soft_of(own: NextTokens, batch: Batch) -> torch.Tensor:
        found = (tensor.to(own.logits.device) for tensor in teacher.lookup(batch["id"], own.mask.shape[1]))
        return token_soft_loss_top_k(own.logits, *found, own.mask, temperature=temperature, tail=tail)

    return soft_of


def on_policy_loss_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    offline: LossOf,
    *,
    share: float,
    prompt_tokens: int,
    new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    beta: float = 1.0,
    sampling_temperature: float = 1.0,
    end_id: int | None = None,
) -> LossOf:
    """Let the student write some of its batches, and learn from the teacher's predictions for them (GKD, 2306.13649).

    A batch is written with the probability `share`, the paper's λ: the student continues the first tokens of the
    batch's own texts, and the loss is `token_soft_loss` at the tokens that it wrote. Otherwise the batch is learned
    `offline`. What is drawn depends on `seed` and the number of the step alone, so a run that is resumed draws the same
    again. Through the writing no gradient passes.

    Args:
        student: writes and learns.
        teacher: a frozen model.
        offline: the loss of the other batches, as `distillation_loss_of` makes it.
        share: λ from 0 to 1, the share of batches that the student writes.
        prompt_tokens: that the student is given of each text; of a shorter text, all but its last token.
        new_tokens: that it writes, at most.
        seed: decides which batches are written, and what.
        temperature: T of the loss.
        beta: the divergence, see `losses.token_soft_loss`; the paper's choice for this depends on the task.
        sampling_temperature: divides the logits when the student writes.
        end_id: the token that ends a text.

    Returns:
        A loss for batches of `causal_batches`, which know their step. Of a batch that was written, `hard` is 0.

    Raises:
        ValueError: see `distillation_loss_of` and `write_texts`; or `share` lies outside [0, 1]; of the loss: a batch
            does not know its step.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; give the share of batches that the student writes, between 0 and 1.")
    require_whole("prompt_tokens", prompt_tokens, minimum=1)
    require_writable(student, [range(prompt_tokens)], new_tokens, sampling_temperature)
    soft_of = _online_soft_loss(student, teacher, temperature, beta)

    def loss_of(batch: Batch) -> DistillationLoss:
        if "step" not in batch:
            raise ValueError("the batch does not say which step it is for; give batches of causal_batches.")
        moment = [seed, int(batch["step"])]
        if np.random.default_rng([*moment, 1]).random() >= share:
            return offline(batch)
        written, counts = written_by_student(
            student,
            batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            temperature=sampling_temperature,
            seed=moment,
            end_id=end_id,
        )
        own = causal_forward(student, written, counts)
        soft = soft_of(own, written)
        return DistillationLoss(soft, soft, torch.zeros_like(soft))

    return loss_of


def written_by_student(
    student: PreTrainedModel,
    batch: Batch,
    *,
    prompt_tokens: int,
    new_tokens: int,
    temperature: float,
    seed: Sequence[int],
    end_id: int | None,
) -> tuple[Batch, torch.Tensor]:
    """Let a student go on from the first tokens of a batch's texts.

    Args:
        student: writes.
        batch: `input_ids` and `attention_mask` `[B, L]`, padded on either side.
        prompt_tokens: that it is given of each text; of a shorter text, all but its last token.
        new_tokens: see `write_texts`, as for the others.
        temperature: divides the logits.
        seed: several whole numbers.
        end_id: the token that ends a text.

    Returns:
        The texts as `padded` makes them, on the CPU, and 1 for the tokens that the student wrote, `[B, L]`.
    """
    rows = zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool(), strict=True)
    texts = [ids[is_token].tolist() for ids, is_token in rows]
    prompts = [text[: max(1, min(prompt_tokens, len(text) - 1))] for text in texts]
    written = padded(
        write_texts(student, prompts, new_tokens=new_tokens, temperature=temperature, seed=seed, end_id=end_id)
    )
    places = torch.arange(written["input_ids"].shape[1])
    given = places < torch.tensor([[len(prompt)] for prompt in prompts])
    return written, written["attention_mask"].masked_fill(given, 0)


# --- what a teacher has done once ---


def cached_texts(
    teacher: PreTrainedModel,
    prompts: Sequence[Text],
    *,
    new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
    root: Path | None = None,
) -> list[list[int]]:
    """`write_texts`, found again in the cache or written and kept there: the texts of sequence-level distillation.

    They are stored under a fingerprint of the teacher's weights and configuration, the prompts, what was asked for and
    the code. An interrupted pass goes on after the last `SHARD` texts that were finished.

    Args:
        teacher: frozen.
        prompts: see `write_texts`, as are the others.
        new_tokens: that are written after each prompt, at most.
        temperature: divides the logits.
        seed: a whole number of at least 0.
        end_id: the token that ends a text.
        root: the artifacts folder that holds the cache; `artifacts_dir()` when left out.

    Raises:
        ValueError: see `write_texts`; or the teacher is in train mode.
    """
    require_eval_mode(teacher)
    asked = {"new_tokens": new_tokens, "temperature": temperature, "end_id": end_id}
    key = artifacts.fingerprint(
        {
            **made_by("kd_helpers.methods.language_models"),
            "teacher": model_digest(teacher),
            "prompts": [list(prompt) for prompt in prompts],
            "asked": [*asked.values(), seed],
        }
    )
    root = artifacts.artifacts_dir() if root is None else root
    folder, shards = root / "teacher_texts" / key, root / "checkpoints" / key

    def write_some(number: int, some: Sequence[Text], _bar: tqdm, target: Path) -> None:
        artifacts.save_json(target / "texts.json", write_texts(teacher, some, seed=[seed, number], **asked))

    def write(target: Path) -> None:
        made = build_parts(shards, prompts, write_some, size=SHARD, description="The teacher writes", unit="text")
        texts = [text for part in made for text in artifacts.load_json(part / "texts.json")]
        artifacts.save_json(target / "texts.json", texts)

    artifacts.get_or_build(folder, write)
    shutil.rmtree(shards, ignore_errors=True)
    return artifacts.load_json(folder / "texts.json")


@dataclasses.dataclass(frozen=True)
class TopLogits:
    """The k largest logits of a teacher at every token of a set of texts.

    There is one row for each prediction: a text of L tokens has L − 1. The rows of all texts, n together, stand one
    after the other.

    Attributes:
        ids: int64 `[texts]`, see `id_of`.
        lengths: int64 `[texts]`, rows of each text.
        logits: `[n, k]`, minus the largest of the row.
        tokens: `[n, k]`, the tokens that they belong to.
        log_total: float32 `[n]`, the logarithm of `Σ exp(z / T)` over the whole vocabulary, of the same logits.
        temperature: T.
        vocabulary: V.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    log_total: torch.Tensor
    temperature: float
    vocabulary: int

    def lookup(self, ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the texts `ids` `[B]` the logits and tokens `[B, length, k]` and the totals `[B, length]`.

        Rows beyond the end of a text hold something; the mask of the batch leaves them out.

        Raises:
            ValueError: a text has no cached logits.
        """
        unknown = ids[~torch.isin(ids, self.ids)]
        if len(unknown):
            raise ValueError(
                f"{len(unknown):,} of {len(ids):,} texts have no cached logits of the teacher (the first has id "
                f"{int(unknown[0])}); compute them for these texts (cached_top_logits)."
            )
        order = torch.argsort(self.ids)
        texts = order[torch.searchsorted(self.ids[order], ids)]
        ends = self.lengths.cumsum(dim=0)[texts].unsqueeze(-1)
        rows = ends - self.lengths[texts].unsqueeze(-1) + torch.arange(length)
        rows = rows.minimum(ends - 1)
        return self.logits[rows], self.tokens[rows], self.log_total[rows]


def cached_top_logits(
    teacher: PreTrainedModel,
    texts: Sequence[Text],
    *,
    k: int = 32,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float16,
    precision: torch.dtype = torch.float32,
    root: Path | None = None,
) -> TopLogits:
    """The teacher's k largest logits at every token of the texts: read from the cache, or computed once and kept there.

    They are stored under a fingerprint of the teacher's weights and configuration, the texts, what was asked for and
    the code, and looked up by what a text says, never by its place. An interrupted pass goes on after the last `SHARD`
    texts that were finished.

    Args:
        teacher: frozen.
        texts: token ids; what is given twice is computed once.
        k: logits of each token, at most V.
        temperature: T of the loss that they are for.
        dtype: that the logits are stored in. float16 rounds a logit by at most a 2,048th of its distance to the largest
            one; the sum of the k probabilities is kept.
        precision: dtype of the teacher's matrix products.
        root: the artifacts folder that holds the cache; `artifacts_dir()` when left out.

    Raises:
        ValueError: the teacher is in train mode or computes logits that are not finite, a text has a single token, or k
            or T are out of range.
    """
    vocabulary = teacher.config.vocab_size
    require_whole("k", k, minimum=1, maximum=vocabulary)
    require_temperature(temperature)
    require_eval_mode(teacher)
    _require_texts(texts)
    of_id = {id_of(text): text for text in texts}
    key = artifacts.fingerprint(
        {
            **made_by("kd_helpers.methods.language_models"),
            "teacher": model_digest(teacher),
            "texts": sorted(of_id),
            "asked": [k, float(temperature), str(dtype)],
            "precision": str(precision),
        }
    )
    root = artifacts.artifacts_dir() if root is None else root
    folder, shards = root / "teacher_top_logits" / key, root / "checkpoints" / key
    in_order = sorted(of_id.values(), key=lambda text: (len(text), *text))  # one order, whichever they were given in

    def run_teacher(_number: int, some: Sequence[Text], _bar: tqdm, target: Path) -> None:
        _run_teacher(teacher, some, k, temperature, dtype, precision, target)

    def compute(target: Path) -> None:
        made = build_parts(shards, in_order, run_teacher, size=SHARD, description="Running the teacher", unit="text")
        parts = [_read(part) for part in made]
        _write(target, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    artifacts.get_or_build(folder, compute)
    shutil.rmtree(shards, ignore_errors=True)
    return TopLogits(**_read(folder), temperature=temperature, vocabulary=vocabulary)


def _run_teacher(
    teacher: PreTrainedModel,
    texts: Sequence[Text],
    k: int,
    temperature: float,
    dtype: torch.dtype,
    precision: torch.dtype,
    target: Path,
) -> None:
    found = []
    with torch.no_grad(), autocast(teacher.device, precision):
        for batch in held_out_batches(texts, _batch_size(teacher, texts)):
            predicted = causal_forward(teacher, batch)
            top = top_of(predicted.logits[predicted.mask], k=k, temperature=temperature, dtype=dtype)
            found.append({"ids": batch["id"], "lengths": predicted.mask.sum(dim=1), **top})
    _write(target, {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]})


def top_of(logits: torch.Tensor, *, k: int, temperature: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is stored of logits `[n, V]`: `logits` and `tokens` `[n, k]`, and `log_total` `[n]`, see `TopLogits`.

    Raises:
        ValueError: the logits are not finite.
    """
    logits = logits.float()
    if not bool(logits.isfinite().all()):
        raise ValueError("the teacher's logits are not all finite; it diverged, so train it anew.")
    top = (logits - logits.amax(dim=-1, keepdim=True)).topk(k)
    kept = top.values.to(dtype)
    # The logarithm of the probability of all k together. The total is made to give it with the logits as rounded.
    log_share = (logits / temperature).gather(-1, top.indices).logsumexp(-1) - (logits / temperature).logsumexp(-1)
    return {
        "logits": kept,
        "tokens": top.indices.to(torch.int16 if logits.shape[-1] <= 2**15 else torch.int32),
        "log_total": (kept.float() / temperature).logsumexp(-1) - log_share,
    }


def _write(target: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, target / "top_logits.safetensors")


def _read(folder: Path) -> dict[str, torch.Tensor]:
    # Read into memory: a mapped file would change under us if it were damaged or replaced later.
    return safetensors.torch.load((folder / "top_logits.safetensors").read_bytes())


# --- training ---


def train_causal_model(
    model: PreTrainedModel,
    batches: DataLoader | Sequence[Batch],
    loss_of: LossOf | None = None,
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    precision: torch.dtype = torch.float32,
    validate: Callable[[], dict[str, float]] | None = None,
    after_step: Callable[[int], None] | None = None,
    checkpoints: Path | None = None,
    checkpoint_steps: int = 0,
    description: str | None = "Training the language model",
) -> Progress:
    """`loop.fit` with the optimiser and the schedule of this chapter, the same for every loss.

    Args:
        model: learns, in place.
        batches: of `causal_batches`, repeated as often as it takes; or at least `steps` of them.
        loss_of: of `distillation_loss_of` or `on_policy_loss_of`; None is `cross_entropy_loss`.
        steps: optimiser steps.
        learning_rate: its peak.
        precision: of the matrix products; losses are always float32.
        validate: see `loop.fit`.
        after_step: see `loop.fit`.
        checkpoints: see `loop.fit`.
        checkpoint_steps: see `loop.fit`.
        description: of the progress bar; None shows none.

    Returns:
        See `loop.fit`; the losses are `total`, `soft` and `hard`.

    Raises:
        ValueError: there are fewer batches than steps.
        DivergedError: a loss or a gradient is not finite.
    """
    progress = fit(
        model,
        batches,
        cross_entropy_loss(model) if loss_of is None else loss_of,
        steps=steps,
        **recipe(DistillConfig(learning_rate=learning_rate, warmup_ratio=WARMUP), steps),
        precision=precision,
        validate=validate,
        after_step=after_step,
        checkpoints=checkpoints,
        checkpoint_steps=checkpoint_steps,
        description=description,
    )
    model.eval()
    return progress
