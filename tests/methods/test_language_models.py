"""Small causal models: batches, the shift by one, writing, the losses, the cache of top-k logits, and training."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from kd_helpers import artifacts, checkpoints
from kd_helpers.data import endless
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.methods import language_models
from kd_helpers.methods.language_models import (
    CausalShape,
    LossOf,
    TopLogits,
    cached_texts,
    cached_top_logits,
    causal_batches,
    causal_forward,
    cross_entropy_loss,
    distillation_loss_of,
    draw_tokens,
    held_out_batches,
    held_out_nats,
    id_of,
    make_causal_model,
    nats_of_texts,
    next_tokens,
    on_policy_loss_of,
    padded,
    top_of,
    train_causal_model,
    write_texts,
)
from kd_helpers.models import count_parameters, freeze, weights_digest

V, BEGIN, END = 24, 1, 2
SHAPE = CausalShape(vocabulary=V, width=16, depth=2, heads=2, positions=32)
NEW = 8


def made_texts(count: int, *, seed: int = 0) -> list[list[int]]:
    """A language that is easily learned: the next token is the last one plus 3 or plus 5; 5 to 12 tokens a text."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        text = [BEGIN, int(rng.integers(3, V))]
        while len(text) < rng.integers(4, 12):
            text.append(3 + (text[-1] - 3 + int(rng.choice([3, 5]))) % (V - 3))
        texts.append([*text, END])
    return texts


TEXTS = made_texts(40)


def tiny(*, seed: int = 0, **changes: int) -> LlamaForCausalLM:
    return make_causal_model(SHAPE._replace(**changes), seed=seed)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """It has learned a little, so that its predictions differ from token to token."""
    model = tiny(seed=1)
    train_causal_model(model, causal_batches(TEXTS, 8, seed=0), steps=80, learning_rate=2e-2, description=None)
    return freeze(model)


def trained(model: PreTrainedModel, loss_of: LossOf | None = None, *, steps: int = 12, **options: Any):
    return train_causal_model(
        model,
        causal_batches(TEXTS, 8, seed=0),
        loss_of,
        steps=steps,
        **{"description": None, "learning_rate": 2e-2} | options,
    )


def exact_logits(model: PreTrainedModel, text: list[int]) -> torch.Tensor:
    """At each token of one text but the last, `[tokens − 1, V]`, in float64."""
    return model(input_ids=torch.tensor([text])).logits[0, :-1].detach().double()


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return weights_digest(one) == weights_digest(other)


# --- the model ---


def test_the_model_is_as_large_as_was_asked_for():
    model = tiny(vocabulary=50, width=24, depth=3, heads=2)
    inner = 64  # 8/3 of 24
    layer = 4 * 24 * 24 + 3 * 24 * inner + 2 * 24
    assert count_parameters(model) == 50 * 24 + 3 * layer + 24
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 50)


def test_the_seed_draws_the_weights_and_nothing_else():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, again, other = tiny(seed=4), tiny(seed=4), tiny(seed=5)
    assert torch.equal(torch.rand(2), expected)
    assert same_weights(one, again)
    assert not same_weights(one, other)


def test_training_and_evaluation_compute_the_same(teacher):
    batch = padded(TEXTS[:4])
    model = tiny()
    assert torch.equal(causal_forward(model.train(), batch).logits, causal_forward(model.eval(), batch).logits)


# --- texts ---


def test_a_batch_holds_its_texts_and_says_which():
    for batch in causal_batches(TEXTS, 8, seed=0, pad_id=7):
        assert batch["input_ids"].dtype == torch.int64
        for ids, mask, number in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["id"], strict=True):
            text = ids[mask].tolist()
            assert text in TEXTS
            assert id_of(text) == number
            assert bool((ids[~mask] == 7).all())
            assert mask.tolist() == sorted(mask.tolist(), reverse=True), "padding stands on the right"
        assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1], "no longer than needed"


def test_every_text_comes_once_an_epoch_in_an_order_of_the_seed():
    def epochs(seed: int) -> list[list[int]]:
        batches = causal_batches(TEXTS, 8, seed=seed)
        found = []
        for epoch in range(2):
            batches.batch_sampler.set_epoch(epoch)
            torch.rand(3)  # what else is drawn does not matter
            found.append([int(number) for batch in batches for number in batch["id"]])
        return found

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again
    assert first != other
    assert first[0] != first[1]
    for order in (*first, *other):
        assert Counter(order) == Counter(map(id_of, TEXTS))


def test_a_batch_knows_its_step_over_all_epochs_also_after_a_start_in_the_middle():
    batches = causal_batches(TEXTS, 8, seed=0)
    stream = endless(batches)
    steps = [next(stream) for _ in range(12)]
    assert [int(batch["step"]) for batch in steps] == list(range(12))
    batches.batch_sampler.set_epoch(1, start=3)
    rest = list(batches)
    assert [int(batch["step"]) for batch in rest] == [8, 9]
    assert all(torch.equal(one["id"], two["id"]) for one, two in zip(rest, steps[8:10], strict=True))


def test_held_out_texts_come_from_short_to_long():
    lengths = [int(n) for batch in held_out_batches(TEXTS, 7) for n in batch["attention_mask"].sum(dim=1)]
    assert lengths == sorted(map(len, TEXTS))


def test_an_id_is_made_of_all_tokens_and_their_order():
    assert id_of([1, 23]) == id_of((1, 23))
    assert len({id_of(text) for text in ([1, 23], [12, 3], [23, 1], [1, 2, 3], [1])}) == 5
    assert 0 <= id_of([1, 23]) < 2**63


# --- predicting ---


def test_each_prediction_stands_beside_the_token_that_followed():
    logits = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    found = next_tokens(logits, ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    assert torch.equal(found.logits, logits[:, :3])
    assert found.labels.tolist() == [[6, 7, 8], [10, IGNORE_INDEX, IGNORE_INDEX]]
    assert found.mask.tolist() == [[True, True, True], [True, False, False]]
    assert found.logits.data_ptr() == logits.data_ptr(), "nothing is copied"


def test_after_a_prompt_only_what_was_written_counts():
    found = next_tokens(torch.zeros(1, 5, 3), torch.tensor([[5, 6, 7, 8, 0]]), torch.tensor([[0, 0, 1, 1, 0]]))
    assert found.labels.tolist() == [[IGNORE_INDEX, 7, 8, IGNORE_INDEX]]


def test_padding_has_no_effect_on_what_is_predicted(teacher):
    """No attention mask is given, which is right only as long as padding stands behind the text."""
    batch = padded(TEXTS[:6], pad_id=5)
    masked = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    found = causal_forward(teacher, batch)
    assert found.mask.sum() < found.mask.numel()
    assert_close(found.logits[found.mask], masked[found.mask])
    for row, text in enumerate(TEXTS[:6]):
        alone = causal_forward(teacher, padded([text])).logits[0]
        assert_close(found.logits[row, : len(text) - 1], alone)


def test_held_out_nats_are_the_mean_over_all_tokens(teacher):
    nats, count = 0.0, 0
    for text in TEXTS:
        log_p = teacher(input_ids=torch.tensor([text])).logits[0].double().log_softmax(dim=-1)
        nats -= sum(log_p[place, token].item() for place, token in enumerate(text[1:]))
        count += len(text) - 1
    student = tiny().train()
    for batch_size in (1, 7, 64):
        assert held_out_nats(teacher, held_out_batches(TEXTS, batch_size)) == pytest.approx(nats / count, rel=1e-5)
    assert held_out_nats(student, held_out_batches(TEXTS)) == pytest.approx(math.log(V), rel=0.05)
    assert student.training, "its mode is the same afterwards"


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary():
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert held_out_nats(model, held_out_batches(TEXTS)) == pytest.approx(math.log(V), rel=1e-6)


# --- writing ---


def naive_texts(model, prompts, *, temperature: float, seed: int, end_id: int | None = None) -> list[list[int]]:
    """Without a cache and without batches: the whole text is read anew for each token."""
    draws = np.random.default_rng(seed).random((len(prompts), NEW), dtype=np.float32)
    texts = []
    for prompt, numbers in zip(prompts, draws, strict=True):
        text = list(prompt)
        for number in numbers:
            logits = model(input_ids=torch.tensor([text])).logits[0, -1].detach().double()
            shares = (logits / temperature).softmax(dim=-1) if temperature else torch.zeros(V)
            reached, token = 0.0, int(logits.argmax())
            for candidate, share in enumerate(shares.tolist()):
                reached += share
                if temperature and number < reached:
                    token = candidate
                    break
            text.append(token)
            if token == end_id:
                break
        texts.append(text)
    return texts


PROMPTS = [[BEGIN], [BEGIN, 5, 8], [BEGIN], [BEGIN, 9], [BEGIN, 4, 7], [BEGIN]]


@pytest.mark.parametrize("end_id", [None, END])
@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 2.0])
def test_written_with_a_cache_and_in_batches_texts_are_those_written_one_by_one(teacher, temperature, end_id):
    expected = naive_texts(teacher, PROMPTS, temperature=temperature, seed=3, end_id=end_id)
    for batch_size in (1, 2, 64):
        found = write_texts(
            teacher,
            PROMPTS,
            new_tokens=NEW,
            temperature=temperature,
            seed=3,
            end_id=end_id,
            batch_size=batch_size,
        )
        assert found == expected
    if end_id is None:
        assert {len(text) - len(prompt) for text, prompt in zip(found, PROMPTS, strict=True)} == {NEW}
    elif temperature == 1.0:
        assert any(text[-1] == END for text in found)
        assert any(text[-1] != END for text in found)
        assert all(END not in text[:-1] for text in found)


def test_the_seed_decides_what_is_written_and_nothing_else_does(teacher):
    def written(seed: Any, **options: Any) -> list[list[int]]:
        return write_texts(teacher, [[BEGIN]] * 4, new_tokens=NEW, seed=seed, **options)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = written(0)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    torch.rand(3)
    assert written(0) == first
    assert written([0, 1]) == written([0, 1])
    assert len({str(written(seed)) for seed in (0, 1, [0, 1], [0, 2])}) == 4
    assert len(set(map(tuple, first))) > 1, "texts of one prompt differ"
    assert len(set(map(tuple, written(0, temperature=0)))) == 1


def test_tokens_are_drawn_as_often_as_they_are_probable():
    logits = torch.tensor([0.3, -math.inf, 1.2, -0.5])
    draws = torch.from_numpy(np.random.default_rng(0).random(40_000, dtype=np.float32))
    for temperature in (0.5, 1.0, 2.0):
        drawn = draw_tokens(logits.expand(len(draws), -1), draws, temperature)
        shares = torch.bincount(drawn, minlength=4) / len(draws)
        assert_close(shares, (logits / temperature).softmax(dim=-1), atol=0.01, rtol=0)
        assert shares[1] == 0


@pytest.mark.parametrize("size", [2, 1000, 50_000])
def test_every_draw_below_one_gives_a_token_that_can_come(size):
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = logits[:, -1] = -math.inf
    if size == 2:
        logits[:, 0] = 0
    for draw in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        tokens = draw_tokens(logits, torch.full((3,), float(draw)), 1.0)
        assert bool(logits.gather(1, tokens.unsqueeze(1)).isfinite().all())


def test_each_step_reads_one_token_and_writing_ends_with_the_last_text(teacher, monkeypatch):
    read, original = [], teacher.forward

    def noted(*given, input_ids, **options):
        read.append(tuple(input_ids.shape))
        return original(*given, input_ids=input_ids, **options)

    monkeypatch.setattr(teacher, "forward", noted)
    texts = write_texts(teacher, [[BEGIN, 5, 8]] * 3, new_tokens=29, seed=0, end_id=END)
    assert max(map(len, texts)) < 32, "all have ended"
    assert read == [(3, 3)] + [(3, 1)] * (max(map(len, texts)) - 4)


def test_a_model_with_dropout_writes_without_it_and_stays_in_its_mode():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    ).train()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)
    first = write_texts(model, [[BEGIN]] * 3, new_tokens=NEW)
    assert write_texts(model, [[BEGIN]] * 3, new_tokens=NEW) == first == naive_of(model)
    assert model.training


def naive_of(model: PreTrainedModel) -> list[list[int]]:
    model.eval()
    found = naive_texts(model, [[BEGIN]] * 3, temperature=1.0, seed=0)
    model.train()
    return found


# --- the losses ---


def test_cross_entropy_is_the_mean_over_tokens_and_has_no_soft_part(teacher):
    batch = padded(TEXTS[:8])
    loss = cross_entropy_loss(teacher)(batch)
    assert loss.total.item() == pytest.approx(held_out_nats(teacher, [batch]), rel=1e-5)
    assert torch.equal(loss.total, loss.hard)
    assert loss.soft.item() == 0


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation_loss_follows_the_definition(teacher, alpha, beta):
    student, batch, temperature = tiny(), padded(TEXTS[:8]), 2.0
    loss = distillation_loss_of(student, teacher, alpha=alpha, temperature=temperature, beta=beta)(batch)
    soft, hard, count = 0.0, 0.0, 0
    for text in TEXTS[:8]:
        z_s, z_t = (
            model(input_ids=torch.tensor([text])).logits[0, :-1].detach().double() for model in (student, teacher)
        )
        p, q = (z_t / temperature).softmax(-1), (z_s / temperature).softmax(-1)
        m = beta * p + (1 - beta) * q
        if beta in (0, 1):
            one, other = (p, q) if beta == 0 else (q, p)
            rows = (one * (one / other).log()).sum(-1)
        else:
            rows = (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)
        soft += temperature**2 * rows.sum().item()
        hard -= z_s.log_softmax(-1)[torch.arange(len(text) - 1), text[1:]].sum().item()
        count += len(text) - 1
    soft, hard = soft / count, hard / count
    assert loss.total.item() == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-4)
    assert loss.hard.item() == pytest.approx(hard, rel=1e-5)
    assert loss.soft.item() == (pytest.approx(soft, rel=1e-4) if alpha else 0)


def test_a_teacher_without_a_say_does_not_run(teacher, monkeypatch):
    student = tiny()
    ran = []
    loss_of = distillation_loss_of(student, teacher, alpha=0.0)
    monkeypatch.setattr(teacher, "forward", lambda *_, **__: ran.append(1))
    assert torch.equal(loss_of(padded(TEXTS[:4])).total, cross_entropy_loss(student)(padded(TEXTS[:4])).total)
    assert ran == []


def test_the_teacher_stays_as_it_is_and_gets_no_gradient(teacher):
    before, student = weights_digest(teacher), tiny()
    trained(student, distillation_loss_of(student, teacher, alpha=0.5), steps=3)
    assert weights_digest(teacher) == before
    assert all(parameter.grad is None for parameter in teacher.parameters())


WAYS: dict[str, Callable[[PreTrainedModel, PreTrainedModel], LossOf]] = {
    "cross-entropy": lambda student, teacher: cross_entropy_loss(student),
    "forward KL": lambda student, teacher: distillation_loss_of(student, teacher, alpha=1.0),
    "half of each": lambda student, teacher: distillation_loss_of(student, teacher, alpha=0.5, temperature=2.0),
    "reverse KL": lambda student, teacher: distillation_loss_of(student, teacher, alpha=1.0, beta=1.0),
    "JSD": lambda student, teacher: distillation_loss_of(student, teacher, alpha=1.0, beta=0.5),
    "on-policy": lambda student, teacher: on_policy(student, teacher, share=1.0),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_learning_lowers_its_loss(teacher, name):
    student = tiny()
    progress = trained(student, WAYS[name](student, teacher), steps=50)
    total = progress.curve("total")
    assert total.shape == (50,)
    assert total[-5:].mean() < 0.7 * total[:5].mean()
    assert not student.training


def test_from_texts_that_its_teacher_wrote_a_student_learns_the_language(teacher):
    """Sequence-level distillation."""
    written = write_texts(teacher, [[BEGIN]] * 60, new_tokens=NEW, seed=0, end_id=END)
    student, held_out = tiny(), held_out_batches(made_texts(20, seed=1))
    train_causal_model(student, causal_batches(written, 8, seed=0), steps=80, learning_rate=2e-2, description=None)
    assert held_out_nats(student, held_out) < 0.75 * math.log(V)


def test_trained_on_texts_a_model_predicts_others_of_their_kind():
    student, held_out = tiny(), held_out_batches(made_texts(20, seed=1))
    trained(student, steps=80)
    assert held_out_nats(student, held_out) < 0.6 * math.log(V)


# --- on-policy ---


def on_policy(student, teacher, *, share: float, offline: LossOf | None = None, **options: Any) -> LossOf:
    usual = {"prompt_tokens": 2, "new_tokens": NEW, "seed": 0, "end_id": END}
    offline = cross_entropy_loss(student) if offline is None else offline
    return on_policy_loss_of(student, teacher, offline, share=share, **usual | options)


def test_with_a_share_of_zero_it_is_the_offline_loss(teacher):
    one, other = tiny(), tiny()
    offline = trained(one, distillation_loss_of(one, teacher, alpha=0.7))
    within = distillation_loss_of(other, teacher, alpha=0.7)
    online = trained(other, on_policy(other, teacher, share=0.0, offline=within))
    assert same_weights(one, other)
    assert online.history == offline.history


def test_the_share_of_batches_is_written_by_the_student(teacher):
    student = tiny()
    offline, total = [], 200
    loss_of = on_policy(
        student,
        teacher,
        share=0.3,
        offline=lambda batch: offline.append(int(batch["step"])) or cross_entropy_loss(student)(batch),
        new_tokens=1,
    )
    batch = padded(TEXTS[:2])
    for step in range(total):
        loss_of({**batch, "step": torch.tensor(step)})
    assert 1 - len(offline) / total == pytest.approx(0.3, abs=0.1)
    again: list[int] = []
    repeated = on_policy(student, teacher, share=0.3, offline=lambda batch: again.append(int(batch["step"])))
    for step in range(total):
        repeated({**batch, "step": torch.tensor(step)})
    assert again == offline, "which they are depends on the seed and the step"


def test_a_batch_of_the_student_is_judged_by_the_teacher_where_the_student_wrote(teacher):
    student, batch = tiny(), {**padded(TEXTS[:6]), "step": torch.tensor(4)}
    loss = on_policy(student, teacher, share=1.0, temperature=2.0, beta=1.0, seed=9)(batch)
    prompts = [text[:2] for text in TEXTS[:6]]
    written = write_texts(student, prompts, new_tokens=NEW, seed=[9, 4], end_id=END)
    summed, count = 0.0, 0
    for text, prompt in zip(written, prompts, strict=True):
        q, p = ((exact_logits(model, text) / 2).softmax(-1) for model in (student, teacher))
        rows = (q * (q / p).log()).sum(-1)[len(prompt) - 1 :]
        assert len(rows) == len(text) - len(prompt)
        summed, count = summed + 4 * rows.sum().item(), count + len(rows)
    assert loss.total.item() == pytest.approx(summed / count, rel=1e-4)
    assert torch.equal(loss.total, loss.soft)
    assert loss.hard.item() == 0


def test_the_prompt_of_a_short_text_leaves_its_last_token_to_be_written(teacher):
    student, seen = tiny(), []
    batch = {**padded([[BEGIN, END], [BEGIN, 5, 8, END]]), "step": torch.tensor(0)}
    original = language_models.write_texts

    def note(model, prompts, **options):
        seen.extend(prompts)
        return original(model, prompts, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(language_models, "write_texts", note)
        on_policy(student, teacher, share=1.0, prompt_tokens=3)(batch)
    assert seen == [[BEGIN], [BEGIN, 5, 8]]


def test_no_gradient_passes_through_the_writing_and_all_weights_learn(teacher):
    student = tiny()
    loss = on_policy(student, teacher, share=1.0)({**padded(TEXTS[:6]), "step": torch.tensor(0)})
    loss.total.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())


@pytest.mark.parametrize("crash", [2, 5, 9])
@pytest.mark.parametrize("every", [0, 2])
def test_interrupted_and_resumed_it_ends_in_the_same_weights(tmp_path, teacher, crash, every):
    """Five batches are an epoch. What the student writes after the resumption is what it would have written."""

    class CrashError(Exception):
        pass

    def run(folder: Path | None, *, crash_at: int | None = None) -> tuple[PreTrainedModel, Any, list[Any]]:
        student, seen = tiny(), []
        within = distillation_loss_of(student, teacher, alpha=0.5)

        def noted(batch: dict[str, torch.Tensor]):
            if int(batch["step"]) == crash_at:
                raise CrashError
            loss = loss_of(batch)
            seen.append((int(batch["step"]), loss.hard.item() == 0))
            return loss

        loss_of = on_policy(student, teacher, share=0.5, offline=within)
        progress = trained(student, noted, steps=12, checkpoints=folder, checkpoint_steps=every)
        return student, progress, seen

    whole, expected, all_seen = run(None)
    assert {sampled for _, sampled in all_seen} == {True, False}
    with pytest.raises(CrashError):
        run(tmp_path, crash_at=crash)
    last = checkpoints.last_checkpoint(tmp_path)
    kept = 0 if last is None else int(last.name.removeprefix("step-"))
    torch.rand(7)  # what else was drawn does not matter
    resumed, progress, seen = run(tmp_path)
    assert seen == all_seen[kept:]
    assert same_weights(whole, resumed)
    assert progress.history == expected.history


def test_products_may_be_in_bfloat16_and_losses_stay_in_float32(teacher):
    curves = []
    for precision in (torch.float32, torch.bfloat16):
        student = tiny()
        within = distillation_loss_of(student, teacher, alpha=0.5)
        either, kinds = on_policy(student, teacher, share=0.3, offline=within), []

        def noted(batch, loss_of=either, kinds=kinds):
            loss = loss_of(batch)
            kinds.append({part.dtype for part in loss})
            return loss

        curves.append(trained(student, noted, steps=6, precision=precision).curve("total"))
        assert kinds == [{torch.float32}] * 6
    assert not torch.equal(*curves)
    assert_close(curves[0][:2], curves[1][:2], rtol=0.02, atol=0.02)


def test_other_seeds_write_other_texts(teacher):
    """Or the test above would show nothing."""
    students = [tiny(), tiny()]
    for seed, student in enumerate(students):
        trained(student, on_policy(student, teacher, share=1.0, seed=seed), steps=2)
    assert not same_weights(*students)


# --- cached teacher logits ---


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_logits_from_the_cache_give_the_loss_of_the_teacher_online(
    own_artifacts, teacher, temperature, dtype, within
):
    cached = cached_top_logits(teacher, TEXTS, k=V, temperature=temperature, dtype=dtype)
    for batch in causal_batches(TEXTS, 8, seed=0):
        gradients = []
        for source in (teacher, cached):
            student = tiny()
            loss = distillation_loss_of(student, source, alpha=1.0, temperature=temperature)(batch)
            loss.total.backward()
            gradients.append((loss.total.detach(), student.lm_head.weight.grad))
        assert_close(gradients[1], gradients[0], rtol=within, atol=within)


def test_some_logits_from_the_cache_give_the_loss_by_its_definition(own_artifacts, teacher):
    k, temperature, student = 5, 2.0, tiny()
    cached = cached_top_logits(teacher, TEXTS, k=k, temperature=temperature)
    for tail in (True, False):
        summed, count = 0.0, 0
        for text in TEXTS[:8]:
            z_s, z_t = (exact_logits(model, text) / temperature for model in (student, teacher))
            p, q = z_t.softmax(-1), z_s.softmax(-1)
            top = z_t.topk(k).indices
            p, q = p.gather(-1, top), q.gather(-1, top)
            if tail:
                p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=-1) for x in (p, q))
            else:
                p = p / p.sum(-1, keepdim=True)
            summed += temperature**2 * (p * (p / q).log()).sum().item()
            count += len(text) - 1
        loss = distillation_loss_of(student, cached, alpha=1.0, temperature=temperature, tail=tail)(padded(TEXTS[:8]))
        assert loss.soft.item() == pytest.approx(summed / count, rel=1e-3)


def test_trained_from_the_cache_a_student_ends_as_with_its_teacher(own_artifacts, teacher):
    cached = cached_top_logits(teacher, TEXTS, k=V, dtype=torch.float32)
    one, other = tiny(), tiny()
    online = trained(one, distillation_loss_of(one, teacher, alpha=0.5))
    offline = trained(other, distillation_loss_of(other, cached, alpha=0.5))
    assert_close(online.curve("total"), offline.curve("total"), rtol=1e-4, atol=1e-4)


def test_rounded_logits_keep_the_probability_of_all_k_together():
    logits = 6 * torch.randn(500, 400, generator=torch.Generator().manual_seed(0)) + 30
    for temperature in (0.7, 1.0, 3.0):
        p = (logits.double() / temperature).softmax(dim=-1)
        stored = top_of(logits, k=8, temperature=temperature, dtype=torch.float16)
        log_p = stored["logits"].double() / temperature - stored["log_total"].double().unsqueeze(-1)
        expected = p.gather(-1, stored["tokens"].long())
        assert_close(log_p.exp().sum(-1), expected.sum(-1), rtol=1e-5, atol=1e-6)
        assert_close(log_p.exp(), expected, rtol=0.02, atol=1e-4)
        assert stored["logits"].dtype == torch.float16
        assert stored["log_total"].dtype == torch.float32


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_tokens_are_stored_in_as_few_bytes_as_they_need(vocabulary, dtype):
    logits = torch.zeros(1, vocabulary)
    logits[0, -1] = 1
    stored = top_of(logits, k=2, temperature=1.0, dtype=torch.float16)
    assert stored["tokens"].dtype == dtype
    assert stored["tokens"][0, 0] == vocabulary - 1


def test_the_cache_is_found_again_and_depends_on_what_it_is_made_of(own_artifacts, teacher, monkeypatch):
    ran = []
    original = language_models._run_teacher
    monkeypatch.setattr(language_models, "_run_teacher", lambda *given: ran.append(1) or original(*given))

    def cached(model=teacher, texts=TEXTS, **options: Any) -> TopLogits:
        return cached_top_logits(model, texts, **{"k": 4} | options)

    first = cached()
    assert len(ran) == 1
    for again in (cached(), cached(texts=TEXTS[::-1]), cached(texts=[*TEXTS, TEXTS[0]])):
        assert all(torch.equal(getattr(again, name), getattr(first, name)) for name in ("ids", "logits", "log_total"))
    assert len(ran) == 1
    for number, change in enumerate(
        (
            {"k": 5},
            {"temperature": 2.0},
            {"dtype": torch.float32},
            {"texts": [*TEXTS[1:], [BEGIN, 3, 3, END]]},
            {"model": freeze(tiny(seed=7))},
            {"precision": torch.bfloat16},
        ),
        start=2,
    ):
        cached(**change)
        assert len(ran) == number, change
    monkeypatch.setattr(language_models, "made_by", lambda *modules: {"source": "another"})
    cached()
    assert len(ran) == 8
    assert not list(own_artifacts.glob("checkpoints/[!.]*")), "the parts are removed"


def test_an_interrupted_pass_goes_on_where_it_was(own_artifacts, teacher, monkeypatch):
    whole = cached_top_logits(teacher, TEXTS, k=4, root=own_artifacts / "whole")
    monkeypatch.setattr(language_models, "SHARD", 16)  # three parts
    calls, original = [], language_models.top_of

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given, **options)

    monkeypatch.setattr(language_models, "top_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_top_logits(teacher, TEXTS, k=4)
    again = cached_top_logits(teacher, TEXTS, k=4)
    assert len(calls) == 4, "the first part was not made again"
    assert torch.equal(whole.ids, again.ids)
    assert_close(whole.logits, again.logits, rtol=1e-2, atol=1e-3)
    assert_close(whole.log_total, again.log_total, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_cache_is_said_and_rebuilt(own_artifacts, teacher, damage):
    good = cached_top_logits(teacher, TEXTS, k=4)
    file = next(own_artifacts.rglob("top_logits.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content) if damage == "flip" else file.unlink()
    with pytest.warns(UserWarning, match="damaged; it is built anew"):
        rebuilt = cached_top_logits(teacher, TEXTS, k=4)
    assert torch.equal(good.logits, rebuilt.logits)


def test_what_is_stored_is_small_and_sealed(own_artifacts, teacher):
    cached = cached_top_logits(teacher, TEXTS, k=4)
    (folder,) = own_artifacts.glob("teacher_top_logits/[!.]*")
    assert artifacts.is_intact(folder)
    tokens = sum(len(text) - 1 for text in set(map(tuple, TEXTS)))  # what stands there twice is stored once
    stored = safetensors.torch.load_file(folder / "top_logits.safetensors")
    assert stored["logits"].shape == stored["tokens"].shape == (tokens, 4)
    per_token = sum(stored[name].nbytes for name in ("logits", "tokens", "log_total")) / tokens
    assert per_token == 4 * (2 + 2) + 4
    assert cached.vocabulary == V


def test_rows_beyond_the_end_of_a_text_may_be_asked_for(own_artifacts, teacher):
    """Also of the text that is stored last, the longest."""
    cached = cached_top_logits(teacher, TEXTS, k=4)
    last = max(TEXTS, key=lambda text: (len(text), text))
    ids, length = torch.tensor([id_of(last)]), len(last) - 1
    short, long = cached.lookup(ids, length), cached.lookup(ids, length + 5)
    assert all(torch.equal(one, other[:, :length]) for one, other in zip(short, long, strict=True))


def test_lookup_is_by_text(own_artifacts, teacher):
    cached = cached_top_logits(teacher, TEXTS, k=V, dtype=torch.float32)
    batch = padded([TEXTS[5], TEXTS[0], TEXTS[5]])
    length = batch["input_ids"].shape[1] - 1
    found = causal_forward(teacher, batch)
    logits, tokens, log_total = cached.lookup(batch["id"], length)
    assert logits.shape == tokens.shape == (3, length, V)
    expected = found.logits.log_softmax(dim=-1).gather(-1, tokens.long())
    assert_close((logits - log_total.unsqueeze(-1))[found.mask], expected[found.mask], rtol=1e-5, atol=1e-5)
    unknown = torch.tensor([id_of(TEXTS[0]), 15])
    sentence = (
        "1 of 2 texts have no cached logits of the teacher (the first has id 15); compute them for these texts "
        "(cached_top_logits)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        cached.lookup(unknown, 4)


# --- refusals ---


def refused(call: Callable[[], object], sentence: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()
    assert len(sentence) <= 350


def test_shapes_that_make_no_model_are_refused():
    refused(
        lambda: tiny(width=18, heads=4),
        "width is 18, which 4 heads can't share in pairs of numbers; give a multiple of 8.",
    )
    refused(lambda: tiny(depth=0), "depth is 0; give a whole number of at least 1.")
    refused(lambda: tiny(width=1.5), "width is 1.5; give a whole number of at least 1.", TypeError)


def test_texts_that_say_nothing_are_refused():
    for call in (lambda texts: causal_batches(texts, seed=0), held_out_batches):
        refused(lambda call=call: call([]), "there are no texts; give at least one.")
        refused(
            lambda call=call: call([[1, 2], [1], [], [3, 4]]),
            "2 texts have fewer than two tokens (the first is number 1), so there is nothing to predict in them; leave "
            "them out.",
        )


def test_tokens_that_the_model_does_not_know_are_refused():
    refused(
        lambda: causal_forward(tiny(), padded([[1, 2, 24]])),
        "the texts have tokens from 1 to 24, the model knows 0 to 23; use the tokenizer that it was made for.",
    )


def test_prompts_and_numbers_that_make_no_text_are_refused(teacher):
    nothing = "a prompt has no tokens, or there is none; begin each text with one token at least."
    refused(lambda: write_texts(teacher, [], new_tokens=1), nothing)
    refused(lambda: write_texts(teacher, [[1], []], new_tokens=1), nothing)
    refused(
        lambda: write_texts(teacher, [[1], [1, 2, 3]], new_tokens=30),
        "3 tokens of a prompt and 30 new ones are more than the model's 32 positions; set new_tokens to at most 29, or "
        "shorten the prompts.",
    )
    refused(lambda: write_texts(teacher, [[1]], new_tokens=0), "new_tokens is 0; give a whole number of at least 1.")
    with pytest.raises(TypeError, match=r"end_id is \[2, 3\]; give a whole number of at least 0"):
        write_texts(teacher, [[1]], new_tokens=1, end_id=[2, 3])
    refused(
        lambda: write_texts(teacher, [[1]], new_tokens=1, temperature=-1.0),
        "temperature is -1.0; give a finite number greater than 0.",
    )


OTHER_VOCABULARY = (
    "the student's vocabulary has 24 tokens, the teacher's 32, so their logits can't be compared: use one tokenizer "
    "for both (and cut heads that are padded beyond it), train the student on texts that the teacher writes (sequence "
    "level), or compare sorted probabilities (ULD, arXiv 2402.12030)."
)


def test_other_vocabularies_are_refused_before_anything_is_trained(own_artifacts):
    other = freeze(tiny(vocabulary=32))
    cached = cached_top_logits(other, TEXTS, k=4)
    for call in (
        lambda: distillation_loss_of(tiny(), other),
        lambda: distillation_loss_of(tiny(), cached),
        lambda: on_policy(tiny(), other, share=0.5),
    ):
        refused(call, OTHER_VOCABULARY)


def test_numbers_out_of_range_are_refused(teacher):
    refused(
        lambda: distillation_loss_of(tiny(), teacher, alpha=1.5),
        "alpha is 1.5; give a finite number between 0 (labels only) and 1 (teacher only).",
    )
    refused(
        lambda: distillation_loss_of(tiny(), teacher, temperature=0.0),
        "temperature is 0.0; give a finite number greater than 0.",
    )
    refused(
        lambda: distillation_loss_of(tiny(), teacher, beta=2.0),
        "beta is 2.0; give a number between 0 (forward KL) and 1 (reverse KL).",
    )
    refused(
        lambda: on_policy(tiny(), teacher, share=1.5),
        "share is 1.5; give the share of batches that the student writes, between 0 and 1.",
    )
    refused(
        lambda: on_policy(tiny(), teacher, share=0.5, prompt_tokens=0),
        "prompt_tokens is 0; give a whole number of at least 1.",
    )
    refused(
        lambda: on_policy(tiny(), teacher, share=0.5, prompt_tokens=3, new_tokens=30),
        "3 tokens of a prompt and 30 new ones are more than the model's 32 positions; set new_tokens to at most 29, or "
        "shorten the prompts.",
    )
    refused(
        lambda: on_policy(tiny(), teacher, share=0.5)(padded(TEXTS[:2])),
        "the batch does not say which step it is for; give batches of causal_batches.",
    )


def test_models_that_are_no_teacher_and_student_are_refused(teacher):
    student = tiny()
    with pytest.raises(ValueError, match="the teacher is in train mode"):
        distillation_loss_of(student, tiny(seed=1).train())
    with pytest.raises(ValueError, match="teacher and student are the same model"):
        distillation_loss_of(student, student)
    with pytest.raises(ValueError, match="the teacher is in train mode"):
        cached_top_logits(tiny().train(), TEXTS, k=4)


def test_what_a_cache_cannot_serve_is_refused(own_artifacts, teacher):
    cached = cached_top_logits(teacher, TEXTS, k=4, temperature=2.0)
    refused(
        lambda: distillation_loss_of(tiny(), cached, temperature=1.0),
        "the teacher's logits were cached for temperature 2.0, from which the rest of its probability at temperature "
        "1.0 can't be told; cache them again for that one.",
    )
    refused(
        lambda: distillation_loss_of(tiny(), cached, temperature=2.0, beta=0.5),
        "beta is 0.5, but of cached top-k logits only forward KL (beta 0) can be computed: the others ask the teacher "
        "about every token that the student finds likely; give the teacher itself.",
    )
    refused(lambda: cached_top_logits(teacher, TEXTS, k=25), "k is 25; give a whole number from 1 to 24.")


def test_a_teacher_that_diverged_is_not_cached(own_artifacts):
    model = freeze(tiny())
    model.model.embed_tokens.weight[5] = math.nan
    refused(
        lambda: cached_top_logits(model, TEXTS, k=4),
        "the teacher's logits are not all finite; it diverged, so train it anew.",
    )
    assert not list(own_artifacts.glob("teacher_top_logits/[!.]*"))


# --- texts that a teacher has written once ---


def test_cached_texts_are_those_that_the_teacher_writes(teacher, own_artifacts, monkeypatch):
    prompts = [TEXTS[0][:3], TEXTS[1][:2], TEXTS[2][:3]]
    asked = {"new_tokens": 6, "temperature": 0.7}
    first = cached_texts(teacher, prompts, seed=5, **asked)
    assert first == write_texts(teacher, prompts, seed=[5, 0], **asked)
    monkeypatch.setattr(language_models, "write_texts", None)  # so that nothing can be written any more
    assert cached_texts(teacher, prompts, seed=5, **asked) == first


@pytest.mark.parametrize("change", [{"seed": 6}, {"temperature": 0.8}, {"new_tokens": 5}, {"prompts": [[1], [2]]}])
def test_other_choices_write_other_texts(teacher, own_artifacts, change):
    choices = {"prompts": [[1], [1], [2], [3]], "new_tokens": 6, "temperature": 0.7, "seed": 5}
    first = cached_texts(teacher, **choices)
    assert cached_texts(teacher, **choices | change) != first
    assert len(list((own_artifacts / "teacher_texts").glob("*/texts.json"))) == 2


def test_an_interrupted_pass_goes_on_with_the_next_texts(teacher, own_artifacts, monkeypatch):
    prompts = [[token] for token in range(1, 7)]
    monkeypatch.setattr(language_models, "SHARD", 2)
    whole = cached_texts(teacher, prompts, new_tokens=4, root=own_artifacts / "undisturbed")
    calls, real = [], language_models.write_texts

    def breaks_down(model, some, **options):
        calls.append(some)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, some, **options)

    monkeypatch.setattr(language_models, "write_texts", breaks_down)
    with pytest.raises(KeyboardInterrupt):
        cached_texts(teacher, prompts, new_tokens=4)
    assert cached_texts(teacher, prompts, new_tokens=4) == whole
    assert calls == [prompts[:2], prompts[2:4], prompts[4:], prompts[4:]]


def test_a_teacher_in_train_mode_writes_nothing(own_artifacts):
    with pytest.raises(ValueError, match="train mode"):
        cached_texts(tiny(seed=1).train(), [[1]], new_tokens=2)


def test_nats_of_texts_keep_their_order_and_the_mode(teacher):
    model = tiny(seed=2).train()
    mixed = [TEXTS[0], TEXTS[1][:3], TEXTS[2]]
    nats = nats_of_texts(model, mixed)
    for text, values in zip(mixed, nats, strict=True):
        log_p = torch.log_softmax(model(torch.tensor([list(text)])).logits[0].double(), dim=-1)
        assert values == pytest.approx([-log_p[i, text[i + 1]].item() for i in range(len(text) - 1)], rel=1e-4)
    assert model.training


def test_of_long_texts_few_are_run_at_a_time(own_artifacts, teacher, monkeypatch):
    """So that the logits of a batch find room, however large the vocabulary."""
    whole = nats_of_texts(teacher, TEXTS), cached_top_logits(teacher, TEXTS, k=4, root=own_artifacts / "whole")
    monkeypatch.setattr(language_models, "MOST_LOGITS", 3 * max(map(len, TEXTS)) * V)
    seen, original = [], language_models.causal_forward

    def spy(model, batch):
        seen.append(len(batch["input_ids"]))
        return original(model, batch)

    monkeypatch.setattr(language_models, "causal_forward", spy)
    for text, expected in zip(nats_of_texts(teacher, TEXTS), whole[0], strict=True):
        assert text == pytest.approx(expected, rel=1e-4)
    assert max(seen) == 3
    assert_close(cached_top_logits(teacher, TEXTS, k=4).log_total, whole[1].log_total, rtol=1e-3, atol=1e-3)
    assert max(seen) == 3
    assert sum(seen) >= 2 * len(set(map(tuple, TEXTS)))
