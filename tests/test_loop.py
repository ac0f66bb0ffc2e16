"""The loop: one epoch in the open, any number of steps with any loss, and how the latter goes on after a crash."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.models import tiny_bert
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

from kd_helpers import checkpoints
from kd_helpers.config import DistillConfig
from kd_helpers.data import training_batches
from kd_helpers.loop import DivergedError, classifier_loss, distill_epoch, fit, recipe, train_classifier
from kd_helpers.methods.distilbert import language_batches
from kd_helpers.methods.hidden_losses import masked_language_loss
from kd_helpers.models import freeze, model_inputs
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.teacher import attach, cached_logits

# One epoch


def one_epoch(student, batches, **options):
    optimizer = make_optimizer(student, learning_rate=1e-3, weight_decay=0.01)
    scheduler = make_scheduler(optimizer, steps=len(list(batches)))
    return distill_epoch(student, batches, optimizer, scheduler, **options)


def test_cached_and_online_teacher_give_the_same_losses_and_weights(own_artifacts, tokenized, tokenizer):
    teacher = freeze(tiny_bert(seed=1))
    teacher_logits = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    students = [tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)]
    online = one_epoch(
        students[0],
        training_batches(tokenized, tokenizer, 16, seed=0),
        temperature=2.0,
        alpha=0.7,
        teacher=teacher,
    )
    cached = one_epoch(
        students[1],
        training_batches(attach(tokenized, teacher_logits), tokenizer, 16, seed=0),
        temperature=2.0,
        alpha=0.7,
    )
    assert_close(online, cached, rtol=1e-6, atol=1e-6)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_epoch_trains_the_student_and_leaves_the_teacher(tokenized, tokenizer):
    teacher, student = freeze(tiny_bert(seed=1)), tiny_bert(seed=2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    start = student.classifier.weight.detach().clone()
    losses = one_epoch(
        student, training_batches(tokenized, tokenizer, 16, seed=0), temperature=2.0, alpha=0.5, teacher=teacher
    )
    assert student.training
    assert not teacher.training
    assert not torch.equal(student.classifier.weight, start)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert len(losses.total) == 8
    assert_close(losses.total, 0.5 * losses.soft + 0.5 * losses.hard)
    assert losses.mean()["total"] == pytest.approx(losses.total.mean().item())


def test_a_student_alone_learns_its_teacher(tokenized, tokenizer):
    teacher, student = freeze(tiny_bert(seed=1)), tiny_bert(seed=2, dropout=0.0)
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)
    batches = training_batches(tokenized, tokenizer, 16, seed=0)
    optimizer = make_optimizer(student, learning_rate=3e-3, weight_decay=0.0)
    scheduler = make_scheduler(optimizer, steps=10_000)
    means = [
        distill_epoch(student, batches, optimizer, scheduler, temperature=2.0, alpha=1.0, teacher=teacher).mean()[
            "soft"
        ]
        for _ in range(5)
    ]
    assert means[-1] < 0.5 * means[0]


def test_gradient_is_clipped(tokenized, tokenizer):
    student = tiny_bert()
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
            seen.append(torch.stack(norms).norm().item())
            return super().step(closure)

    optimizer = Recorder(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    batches = training_batches(tokenized, tokenizer, 16, seed=0)
    distill_epoch(student, batches, optimizer, scheduler, temperature=1.0, alpha=0.0, max_grad_norm=0.01)
    assert max(seen) <= 0.01 * 1.001


def test_mistakes_are_named(tokenized, tokenizer):
    student, teacher = tiny_bert(), tiny_bert(seed=1)
    batches = training_batches(tokenized, tokenizer, 16, seed=0)
    with pytest.raises(ValueError, match="same model"):
        one_epoch(student, batches, temperature=2.0, alpha=0.5, teacher=student)
    with pytest.raises(ValueError, match="train mode"):
        one_epoch(student, batches, temperature=2.0, alpha=0.5, teacher=teacher.train())
    with pytest.raises(ValueError, match="no teacher logits"):
        one_epoch(student, batches, temperature=2.0, alpha=0.5)
    with pytest.raises(
        ValueError, match="the teacher's classes are negative, neutral, positive, class 3, the student's"
    ):
        one_epoch(student, batches, temperature=2.0, alpha=0.5, teacher=freeze(tiny_bert(classes=4)))
    with pytest.raises(ValueError, match="no batches"):
        one_epoch(student, [], temperature=2.0, alpha=0.5)


# Any loss


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return make_optimizer(module, learning_rate=1e-3, weight_decay=0.01)


def linear(steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    return functools.partial(make_scheduler, steps=steps, warmup_ratio=0.2)


def fitted(modules, batches, loss_of, *, steps: int, **options):
    """`fit` with the usual optimiser and schedule, without a bar."""
    usual = {"optimizer": adamw, "scheduler": linear(steps), "description": None}
    return fit(modules, batches, loss_of, steps=steps, **usual | options)


def weights_of(*modules: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": value.clone()
        for number, module in enumerate(modules)
        for name, value in module.state_dict().items()
    }


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names of the weights that are not equal, bit by bit."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def test_fit_is_the_epoch_of_chapter_05(own_artifacts, tokenized, tokenizer):
    """Bit by bit: the same step is made by both."""
    teacher = freeze(tiny_bert(seed=1))
    teacher_logits = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    batches = list(training_batches(attach(tokenized, teacher_logits), tokenizer, 16, seed=0))
    softening = {"temperature": 2.0, "alpha": 0.7}
    by_epoch, by_fit = tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)
    optimizer = adamw(by_epoch)
    losses = distill_epoch(by_epoch, batches, optimizer, linear(8)(optimizer), max_grad_norm=0.5, **softening)
    progress = fitted(by_fit, batches, classifier_loss(by_fit, **softening), steps=8, max_grad_norm=0.5)
    assert differing(weights_of(by_epoch), weights_of(by_fit)) == []
    assert progress.step == 8
    assert set(progress.history[0]["losses"]) == set(losses._fields)
    for name, values in losses._asdict().items():
        assert torch.equal(progress.curve(name), values), name


def test_a_classifier_is_trained_by_fit(tokenized, tokenizer):
    """`train_classifier` adds the loss, the optimiser and the schedule of a configuration, and nothing else."""
    config = DistillConfig(alpha=0.0, max_steps=11, batch_size=16, learning_rate=1e-3, warmup_ratio=0.2, lean=False)
    one, other = tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)
    first = train_classifier(one, training_batches(tokenized, tokenizer, 16, seed=0), config=config, description=None)
    loss_of = classifier_loss(other, temperature=config.temperature, alpha=0.0)
    again = fit(
        other,
        training_batches(tokenized, tokenizer, 16, seed=0),
        loss_of,
        steps=11,
        description=None,
        **recipe(config, 11),
    )
    assert differing(weights_of(one), weights_of(other)) == []
    assert first.history == again.history
    assert [(entry["epoch"], entry["step"]) for entry in first.history] == [(1, 8), (2, 11)]


@pytest.mark.parametrize("kind", [list, iter])
def test_lean_training_needs_a_loader(tokenized, tokenizer, kind):
    student = tiny_bert()
    before = weights_of(student)
    batches = kind(list(training_batches(tokenized, tokenizer, 16, seed=0)))
    with pytest.raises(ValueError, match=r"^lean training needs a loader of tokenized texts; give one, or lean=False"):
        fitted(student, batches, classifier_loss(student, temperature=1.0, alpha=0.0), steps=4, lean=True)
    assert differing(before, weights_of(student)) == []


def test_lean_training_with_a_loader_is_ordinary_training_but_for_rows_that_do_not_occur(tokenized, tokenizer):
    models = [tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)]
    for model, lean in zip(models, (False, True), strict=True):
        loss_of = classifier_loss(model, temperature=1.0, alpha=0.0)
        batches = training_batches(tokenized, tokenizer, 16, seed=0)
        fitted(model, batches, loss_of, steps=10, lean=lean)
    tables = [model.get_input_embeddings() for model in models]
    assert all(type(table) is nn.Embedding for table in tables), "the ordinary table is back in its place"
    occurring = sorted({0, *itertools.chain(*tokenized["input_ids"][:])})
    assert_close(tables[0].weight[occurring], tables[1].weight[occurring], rtol=1e-3, atol=2e-5)
    assert_close(models[0].classifier.weight, models[1].classifier.weight, rtol=1e-3, atol=2e-5)


class HintLoss(NamedTuple):
    """A loss with fields of its own."""

    total: torch.Tensor
    hint: torch.Tensor
    penalty: torch.Tensor


def lines(count: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches that are no texts."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(8, 4, generator=generator)} for _ in range(count)]


def student_and_projection() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh()), nn.Linear(6, 2, bias=False)


def hint_loss(student: nn.Module, projection: nn.Module) -> Callable[[dict[str, torch.Tensor]], HintLoss]:
    def loss_of(batch: dict[str, torch.Tensor]) -> HintLoss:
        hint = (projection(student(batch["x"])) - batch["x"][:, :2]).square().mean()
        penalty = projection.weight.square().mean()
        return HintLoss(hint + 0.5 * penalty, hint, penalty)

    return loss_of


def test_modules_that_are_trained_together_all_learn():
    student, projection = student_and_projection()
    before = weights_of(student, projection)
    fitted([student, projection], lines(), hint_loss(student, projection), steps=12)
    after = weights_of(student, projection)
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


def test_what_is_not_among_the_modules_is_not_trained():
    student, projection = student_and_projection()
    before = weights_of(projection)
    fitted(student, lines(), hint_loss(student, projection), steps=12)
    assert differing(before, weights_of(projection)) == []


def test_the_fields_of_a_loss_are_recorded_under_their_names():
    student, projection = student_and_projection()
    progress = fitted([student, projection], lines(), hint_loss(student, projection), steps=12)
    (entry,) = progress.history
    assert list(entry["losses"]) == ["total", "hint", "penalty", "gradient_norm"]
    assert all(len(values) == 12 for values in entry["losses"].values())
    total, hint, penalty, norm = (progress.curve(name) for name in entry["losses"])
    assert_close(total, hint + 0.5 * penalty)
    assert hint[-1] < hint[0]
    assert bool((norm > 0).all())
    assert entry["validation"] == {}
    assert (entry["epoch"], entry["step"], progress.step) == (1, 12, 12)


def test_a_first_loss_can_be_computed_by_hand():
    """The total of the first step, and the norm of its gradient before clipping."""
    student, projection = student_and_projection()
    student[1].p = 0.0
    loss = hint_loss(student, projection)(lines()[0])
    gradients = torch.autograd.grad(loss.total, [*student.parameters(), *projection.parameters()])
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    progress = fitted([student, projection], lines(), hint_loss(student, projection), steps=1, max_grad_norm=1e-3)
    assert progress.curve("total").item() == pytest.approx(loss.total.item())
    assert progress.curve("gradient_norm").item() == pytest.approx(norm.item(), rel=1e-5)


class RootLoss(NamedTuple):
    total: torch.Tensor
    root: torch.Tensor


def test_a_gradient_that_is_not_finite_is_a_divergence_though_the_losses_are(tmp_path):
    """The square root is 0 at 0, and its slope there infinite."""
    student, _ = student_and_projection()
    made = []

    def loss_of(batch):
        root = (student[0].weight.sum() * (0.0 if len(made) == 2 else 1.0)).abs().sqrt()
        return RootLoss(root + 1.0, root)

    before: dict[str, torch.Tensor] = {}

    def after_step(step: int) -> None:
        made.append(step)
        before.update(weights_of(student))

    with pytest.raises(DivergedError) as caught:
        fitted(
            student, lines(), loss_of, steps=12, checkpoints=tmp_path / "c", checkpoint_steps=1, after_step=after_step
        )
    sentence = str(caught.value)
    assert sentence.startswith("training diverged at step 3 (total 1, root 0, gradient norm ")
    assert "gradient norm inf" in sentence or "gradient norm nan" in sentence
    assert sentence.endswith(f"the last good checkpoint is {tmp_path / 'c' / 'step-00000002'}.")
    assert differing(before, weights_of(student)) == [], "the weights are those of the step before"


def test_a_loader_whose_order_does_not_follow_from_the_epoch_is_refused():
    student, projection = student_and_projection()
    loader = DataLoader([{"x": torch.zeros(4)}] * 8, batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match=r"make it with data\.training_batches, or give a list of batches\.$"):
        fitted([student, projection], loader, hint_loss(student, projection), steps=2)


@pytest.mark.parametrize(
    ("kind", "had"), [(list, "there are 5"), (iter, "the stream had 5")], ids=["list", "generator"]
)
def test_too_few_batches_are_refused(kind, had):
    student, projection = student_and_projection()
    before = weights_of(student)
    with pytest.raises(ValueError, match=rf"^6 steps need as many batches, {had}; give more, or a loader\.$"):
        fitted([student, projection], kind(lines(5)), hint_loss(student, projection), steps=6)
    assert (differing(before, weights_of(student)) == []) == (kind is list), "what is known before is said before"


@pytest.mark.parametrize("kind", [list, iter], ids=["list", "generator"])
def test_more_batches_than_steps_are_left(kind):
    student, projection = student_and_projection()
    batches = kind(lines(9))
    assert fitted([student, projection], batches, hint_loss(student, projection), steps=6).step == 6
    if kind is iter:
        assert len(list(batches)) == 3, "no batch is read that no step needs"


def test_after_each_step_its_number_is_said():
    student, projection = student_and_projection()
    said: list[int] = []
    fitted([student, projection], lines(), hint_loss(student, projection), steps=12, after_step=said.append)
    assert said == list(range(1, 13))


def test_validation_comes_after_each_epoch(tokenized, tokenizer):
    student = tiny_bert()
    batches = training_batches(tokenized, tokenizer, 16, seed=0)  # eight
    seen = []
    progress = fitted(
        student,
        batches,
        classifier_loss(student, temperature=1.0, alpha=0.0),
        steps=20,
        validate=lambda: {"nll": float(len(seen))},
        after_step=seen.append,
    )
    assert [entry["step"] for entry in progress.history] == [8, 16, 20]
    assert [entry["validation"]["nll"] for entry in progress.history] == [8, 16, 20]
    assert progress.losses == {}


def test_the_mode_of_a_validated_student_is_training_again(tokenized, tokenizer):
    student = tiny_bert()
    modes = []
    loss_of = classifier_loss(student, temperature=1.0, alpha=0.0)
    fitted(
        student,
        training_batches(tokenized, tokenizer, 64, seed=0),
        lambda batch: modes.append(student.training) or loss_of(batch),
        steps=5,
        validate=lambda: {"accuracy": float(student.eval().training)},
    )
    assert modes == [True] * 5


# Going on after a crash


class CrashError(Exception):
    pass


def crash_at(step: int) -> Callable[[int], None]:
    """Fail when so many steps are made, before any checkpoint of the last one is written."""

    def after_step(made: int) -> None:
        if made == step:
            raise CrashError

    return after_step


STEPS = 19


class Task(NamedTuple):
    """Something to train anew: the modules, their batches and their loss."""

    modules: list[nn.Module]
    batches: Any
    loss_of: Callable[[Any], Any]
    seen: list[torch.Tensor]  # what the model was given in each step


def of_a_list(tokenized, tokenizer) -> Task:
    student, projection = student_and_projection()
    loss, seen = hint_loss(student, projection), []
    return Task([student, projection], lines(STEPS), lambda batch: seen.append(batch["x"].clone()) or loss(batch), seen)


def of_running_means(tokenized, tokenizer) -> Task:
    """A BatchNorm counts its batches, and keeps means that are no parameters."""
    student, projection = student_and_projection()
    student.insert(1, nn.BatchNorm1d(6))
    loss, seen = hint_loss(student, projection), []
    return Task([student, projection], lines(STEPS), lambda batch: seen.append(batch["x"].clone()) or loss(batch), seen)


def of_a_loader(tokenized, tokenizer) -> Task:
    student, seen = tiny_bert(1, dropout=0.2), []
    loss = classifier_loss(student, temperature=1.0, alpha=0.0)
    batches = training_batches(tokenized, tokenizer, 5, seed=3)
    return Task([student], batches, lambda batch: seen.append(batch["id"].clone()) or loss(batch), seen)


class LanguageLoss(NamedTuple):
    total: torch.Tensor


def of_masked_texts(tokenized, tokenizer) -> Task:
    """Its batches draw the masked tokens from a generator of their own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    student, seen = BertForMaskedLM(BertConfig(**sizes)), []

    def loss_of(batch):
        seen.append(torch.stack([batch["input_ids"], batch["labels"]]))
        masked = batch["labels"] != -100
        inputs = model_inputs(student, batch)
        logits = student.cls(student.bert(**inputs).last_hidden_state[masked])
        return LanguageLoss(masked_language_loss(logits, batch["labels"][masked]))

    return Task([student], language_batches(tokenized, tokenizer, 5, seed=3), loss_of, seen)


@pytest.mark.parametrize("checkpoint_steps", [0, 3])
@pytest.mark.parametrize("crash", [2, 7, 8, 13, STEPS])
@pytest.mark.parametrize("make", [of_a_list, of_running_means, of_a_loader, of_masked_texts])
def test_training_goes_on_bit_by_bit(tmp_path, tokenized, tokenizer, make, crash, checkpoint_steps):
    """Eight batches are an epoch of the loaders, and all of a list are one."""

    def go(task: Task, **options):
        return fitted(task.modules, task.batches, task.loss_of, steps=STEPS, **options)

    texts = tokenized.select(range(40))
    whole, crashed, again = (make(texts, tokenizer) for _ in range(3))
    torch.manual_seed(5)
    expected = go(whole)
    place = {"checkpoints": tmp_path, "checkpoint_steps": checkpoint_steps}
    torch.manual_seed(5)
    with pytest.raises(CrashError):
        go(crashed, after_step=crash_at(crash), **place)
    last = checkpoints.last_checkpoint(tmp_path)
    kept = 0 if last is None else int(last.name.removeprefix("step-"))
    torch.manual_seed(99 if kept else 5)  # another process may be in another state, unless it begins anew
    progress = go(again, **place)
    assert differing(weights_of(*again.modules), weights_of(*whole.modules)) == []
    assert progress.history == expected.history
    assert len(again.seen) == STEPS - kept, "only what is left is done"
    assert all(torch.equal(*pair) for pair in zip(again.seen, whole.seen[kept:], strict=True))
    per_epoch = 8 if make in (of_a_loader, of_masked_texts) else STEPS
    before = crash - 1  # its own checkpoint was not written
    every = before // checkpoint_steps * checkpoint_steps if checkpoint_steps else 0
    assert kept == max(before // per_epoch * per_epoch, every)


@pytest.mark.parametrize("make", [of_a_list, of_a_loader, of_masked_texts])
def test_training_that_is_finished_is_not_made_again(tmp_path, tokenized, tokenizer, make):
    texts = tokenized.select(range(40))
    first, again = make(texts, tokenizer), make(texts, tokenizer)
    histories = [
        fitted(task.modules, task.batches, task.loss_of, steps=STEPS, checkpoints=tmp_path).history
        for task in (first, again)
    ]
    assert again.seen == []
    assert histories[0] == histories[1], "no epoch without a step is added"
    assert differing(weights_of(*first.modules), weights_of(*again.modules)) == []


def test_the_steps_of_every_epoch_add_up():
    """However many steps there are, each is in one entry of the history."""
    for steps in (1, 7, 8):
        student, projection = student_and_projection()
        progress = fitted([student, projection], lines(8), hint_loss(student, projection), steps=steps)
        assert math.fsum(len(entry["losses"]["total"]) for entry in progress.history) == steps


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan])
def test_a_norm_that_undoes_the_gradient_is_refused(norm):
    student, projection = student_and_projection()
    with pytest.raises(ValueError, match=rf"max_grad_norm is {norm}; give a number above 0, or infinity"):
        fitted([student, projection], lines(), hint_loss(student, projection), steps=1, max_grad_norm=norm)


def test_checkpoints_of_other_modules_or_of_more_steps_are_refused(tmp_path):
    student, projection = student_and_projection()
    both, loss = [student, projection], hint_loss(student, projection)
    fitted(both, lines(), loss, steps=12, checkpoints=tmp_path)
    with pytest.raises(ValueError, match="has a checkpoint after 12 steps, and 5 are asked for"):
        fitted(both, lines(), loss, steps=5, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoints in .* are of another model"):
        fitted(both[::-1], lines(), loss, steps=12, checkpoints=tmp_path)
