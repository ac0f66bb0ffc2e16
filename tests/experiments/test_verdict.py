"""A verdict on one's own texts: the plan, the runs, the choices, and the answers."""

from __future__ import annotations

import dataclasses
import itertools
import types

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
from support.models import tiny_bert
from support.own_texts import own_config

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import load_splits, tokenize, training_batches
from kd_helpers.experiments import verdict as verdicts
from kd_helpers.experiments import verdict_plan, verdict_runs, watch
from kd_helpers.experiments.judgement import CANNOT_TELL, DOES_NOT_PAY, PAYS, UNFINISHED
from kd_helpers.experiments.signals import BASELINE, Signal
from kd_helpers.experiments.verdict import (
    COMMONEST,
    STOPPED,
    TEACHER,
    TFIDF,
    Opened,
    class_differences,
    difference,
    make_rivals,
    questions,
    verdict,
)
from kd_helpers.experiments.verdict_plan import (
    ENOUGH_STEPS,
    FEWEST_SEEDS,
    Plan,
    Speed,
    improves,
    loss_of_guessing,
    make_plan,
    plan_within,
    run_all,
    run_seconds,
    teacher_seconds,
    within_budget,
)
from kd_helpers.experiments.verdict_runs import (
    DISTILLED,
    MORE,
    TRANSFER,
    UNIFORM,
    Ground,
    arms_of,
    labels_of,
    prepare,
    run_logits,
    with_enough_epochs,
)
from kd_helpers.experiments.watch import Watch, whole_weights
from kd_helpers.lean import lean_training
from kd_helpers.loop import DivergedError
from kd_helpers.metrics import Predictions, classification_metrics, predict
from kd_helpers.models import Tokenizers
from kd_helpers.resolve import Setup, resolve
from kd_helpers.teacher import TeacherLogits

PLAN = Plan(lengths=(4, 8), seeds=(3, 3))


@pytest.fixture
def small(tmp_path, own_artifacts, tokenizer) -> DistillConfig:
    """Two classes, tiny models."""
    return own_config(tmp_path, tokenizer)


def test_a_verdict_has_every_part_and_the_same_again_trains_nothing(small, monkeypatch):
    whole = verdict(small, plan=PLAN, report=lambda plan: None)
    names = {BASELINE, UNIFORM, DISTILLED, TRANSFER, STOPPED, COMMONEST, TFIDF}
    assert set(whole["choices"]["candidates"]) == names
    by_name = {row["name"]: row for row in whole["table"]}
    assert by_name.keys() == names | {TEACHER}
    assert by_name[TFIDF]["accuracy"] == 1.0, "the words tell the classes apart"
    assert by_name[COMMONEST]["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert "nll" not in by_name[TFIDF]
    assert [entry["question"] for entry in whole["questions"]] == ["baseline", "baseline", "teacher", "rivals"]
    assert {row["model"] for row in whole["costs"]} == {"teacher", "student"}
    assert whole["sizes"]["transfer"]["all"] == 40
    assert whole["sizes"]["test"]["all"] == 32
    assert whole["seeds"] == 3
    assert whole["steps"] in PLAN.lengths

    monkeypatch.setattr(verdict_runs, "fit", None)
    again = verdict(small, plan=PLAN, report=lambda plan: None)
    assert {key: again[key] for key in ("questions", "table", "choices")} == {
        key: whole[key] for key in ("questions", "table", "choices")
    }


def test_choices_do_not_see_the_test_split(small, monkeypatch):
    """Whatever the students would predict for test, the choices stay what they are."""
    read, opened = verdicts.run_logits, []

    def seen(run, moment, split):
        opened.append(split)
        return read(run, moment, split)

    monkeypatch.setattr(verdicts, "run_logits", seen)
    monkeypatch.setattr(verdict_plan, "run_logits", seen)
    ground = prepare(resolve(small))
    runs, rivals = run_all(ground, PLAN), make_rivals(ground)
    before = verdicts.choose(ground, runs, rivals)
    assert set(opened) == {"validation"}
    for entries in runs.runs.values():
        for entry in entries:
            file = artifacts.artifacts_dir() / entry["folder"] / "test.safetensors"
            logits = safetensors.torch.load(file.read_bytes())
            safetensors.torch.save_file({name: -value for name, value in logits.items()}, file)
    assert verdicts.choose(ground, runs, rivals) == before


def test_arms_of_a_seed_start_alike_and_see_the_same_texts(small):
    """With alpha 0 a distilled student is the baseline, to the last bit."""
    ground = prepare(resolve(small.replace(alpha=0.0)))
    runs = run_all(ground, PLAN)
    of = {arm: verdicts._logits(runs, arm, "validation") for arm in (BASELINE, DISTILLED, TRANSFER)}
    np.testing.assert_array_equal(of[BASELINE], of[DISTILLED])
    assert np.abs(of[BASELINE] - of[TRANSFER]).max() > 0
    assert np.abs(of[BASELINE][0] - of[BASELINE][1]).max() > 0


def test_the_best_moment_is_the_best_on_validation(small):
    ground = prepare(resolve(small))
    runs = run_all(ground, PLAN)
    labels = torch.tensor(labels_of(ground.setup.data.validation))
    for entry in runs.runs[BASELINE]:
        best = max(moment["accuracy"] for moment in entry["history"])
        logits = torch.tensor(run_logits(entry, "best", "validation"))
        assert classification_metrics(logits, labels)["accuracy"] == best


def test_weights_within_lean_training_are_those_outside_it(tokenizer, splits):
    model = tiny_bert(vocabulary=len(tokenizer))
    texts = tokenize(splits.train, tokenizer, 16)
    with lean_training(model, texts["input_ids"][:]):
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        kept = whole_weights(model)
    outside = model.state_dict()
    assert kept.keys() == outside.keys()
    assert all(torch.equal(value, outside[name]) for name, value in kept.items())
    batches = list(training_batches(texts, tokenizer, 16, seed=0))
    before = predict(model, batches).logits
    torch.nn.init.zeros_(model.classifier.weight)
    model.load_state_dict(kept)
    assert torch.equal(predict(model, batches).logits, before)


# ---- The plan

FAST = Speed(student_step=0.05, teacher_step=0.2, student_text=0.001, teacher_text=0.002)


@pytest.fixture(scope="module")
def tweets():
    config = DistillConfig(train_size=2500, teacher_train_size=10_000)
    return config, load_splits(config)


def test_a_larger_budget_gives_longer_runs_or_more_seeds(tweets):
    config, data = tweets
    plans = [make_plan(minutes * 60.0, FAST, config, data) for minutes in (5, 30, 120)]
    assert [plan.rough for plan in plans] == [True, False, False]
    assert (plans[0].tries, plans[0].rates) == (0, (3.0,)), "few steps are best used at the higher rate"
    assert plans[1].rates == plans[2].rates == (1.0, 3.0)
    for plan, minutes in zip(plans[1:], (30, 120), strict=True):
        a_try = run_seconds(plan.lengths[-1], 1, FAST, data)
        assert plan.tries * a_try <= 0.1 * minutes * 60
        shorter = [one / two for one, two in itertools.pairwise(plan.lengths)]
        assert all(0.45 < ratio < 0.55 for ratio in shorter), "each length is about twice the one before"
    reached = [(plan.lengths[-1], plan.seeds[-1]) for plan in plans]
    assert reached == sorted(reached)
    assert reached[0] < reached[2]
    for plan, minutes in zip(plans[1:], (30, 120), strict=True):
        assert plan.seconds <= minutes * 60 * 1.01
        assert min(plan.seeds) >= FEWEST_SEEDS
        assert list(plan.seeds) == sorted(plan.seeds, reverse=True), "shorter runs leave time for more seeds"


def test_a_budget_that_is_too_small_gives_the_smallest_plan(tweets):
    config, data = tweets
    plan = make_plan(1.0, FAST, config, data)
    assert plan.rough
    assert plan.exceeds
    slow = dataclasses.replace(FAST, student_step=20.0)
    assert make_plan(1800.0, slow, config, data).rough, "on a slow machine also with a budget of half an hour"
    assert not make_plan(1800.0, FAST, config, data).exceeds
    assert plan.lengths == (60, 125)
    assert plan.seeds == (2, 2)
    assert plan.seconds > 1


def test_a_teacher_that_would_take_the_budget_gets_fewer_epochs_and_then_fewer_labels(tweets):
    config, data = tweets
    few = dataclasses.replace(data, teacher_train=data.teacher_train.select(range(320)))
    enough = with_enough_epochs(config, few)
    fewer_epochs, same = within_budget(150.0, FAST, config, few)
    assert config.teacher_epochs < fewer_epochs.teacher_epochs < enough.teacher_epochs
    assert len(same.teacher_train) == 320
    same_epochs, fewer = within_budget(200.0, FAST, config, data)
    assert same_epochs.teacher_epochs == config.teacher_epochs
    assert len(fewer.teacher_train) < 10_000
    assert teacher_seconds(same_epochs, FAST, fewer) < 0.6 * 200
    same_epochs, whole = within_budget(10_000.0, FAST, config, data)
    assert same_epochs == config
    assert (len(whole.train), len(whole.teacher_train)) == (2500, 10_000)


def test_texts_without_labels_do_not_cost_the_labels_their_time():
    """The teacher reads as many as a tenth of the budget allows; the rest is left out."""
    config = DistillConfig(train_size=2000, transfer_size=20_000, teacher_train_size=2000)
    data, slow = load_splits(config), dataclasses.replace(FAST, teacher_text=0.01)
    cut, fewer = within_budget(1000.0, slow, config, data)
    assert len(fewer.transfer) == 10_000
    assert fewer.transfer["id"][:] == data.transfer["id"][:10_000]
    assert len(fewer.train) == len(fewer.teacher_train) == 2000
    assert cut.teacher_epochs >= config.teacher_epochs
    assert len(within_budget(10_000.0, slow, config, data)[1].transfer) == 20_000


@pytest.mark.parametrize(("budget", "tokens"), [(900.0, 64), (40_000.0, 128)])
def test_texts_are_cut_where_a_budget_allows_too_few_steps(monkeypatch, tokenizer, splits, budget, tokens):
    """The time of a step here is in proportion to the tokens."""

    def speed(setup):
        share = setup.config.max_length / 128
        return Speed(share, share, 0.01 * share, 0.01 * share)

    monkeypatch.setattr(verdict_plan, "stored_speed", speed)
    monkeypatch.setattr(verdict_plan, "FEWEST_TOKENS", 64)
    long = datasets.Dataset.from_dict(
        {"id": range(400), "text": ["word " * 200] * 400, "label": [0, 1] * 200},
    )
    data = dataclasses.replace(splits, train=long, teacher_train=long, transfer=long.select([]))
    setup = Setup(
        DistillConfig(max_length=128), data, Tokenizers(tokenizer, tokenizer), torch.device("cpu"), torch.float32
    )
    cut, plan = plan_within(budget, setup)
    assert cut.config.max_length == tokens
    assert (plan.lengths[-1] >= ENOUGH_STEPS) == (tokens == 128)
    short = long.map(lambda row: {"text": "word"})
    data = dataclasses.replace(data, train=short, teacher_train=short)
    same, _ = plan_within(budget, dataclasses.replace(setup, data=data))
    assert same.config.max_length == 128, "a cut would save nothing"


def test_few_labels_mean_more_epochs_for_the_teacher(tweets):
    config, data = tweets
    few = dataclasses.replace(data, teacher_train=data.teacher_train.select(range(64)))
    assert with_enough_epochs(config, few).teacher_epochs * 2 >= verdict_runs.TEACHER_STEPS
    assert with_enough_epochs(config, data).teacher_epochs == config.teacher_epochs
    assert with_enough_epochs(config.replace(teacher_epochs=0), few).teacher_epochs == 0


def test_labels_that_only_the_teacher_saw_have_an_arm_of_their_own(tweets):
    config, data = tweets
    assert list(arms_of(config, data)) == [BASELINE, UNIFORM, DISTILLED, MORE]
    same = dataclasses.replace(data, teacher_train=data.train)
    assert list(arms_of(config, same)) == [BASELINE, UNIFORM, DISTILLED]


@pytest.mark.parametrize(
    ("loss", "right", "expected"),
    [
        (0.95, 200, True),  # the loss falls by more than 1% of that of guessing, (0.9 · 2² + 0.1) ln 3 = 4.06
        (0.97, 200, False),
        (1.5, 200, False),
        (0.9999, 240, True),  # the loss hardly moves, but a tenth of the texts is learned
        (0.9999, 203, False),  # not more than chance
        (0.9999, 160, False),
    ],
)
def test_twice_the_steps_help_where_the_loss_falls_or_the_measure_rises(monkeypatch, loss, right, expected):
    data = load_splits(DistillConfig(train_size=64))
    data = dataclasses.replace(data, validation=data.validation.select(range(400)))
    labels = labels_of(data.validation)
    ground = Ground(types.SimpleNamespace(data=data), None, None, {})

    def run(loss: float, right: int) -> dict:
        """So many texts are right; those that both runs get right are the same."""
        return {"history": [{"loss": loss}], "classes": np.where(np.arange(400) < right, labels, (labels + 1) % 3)}

    monkeypatch.setattr(verdict_plan, "best_classes", lambda run: run["classes"])
    signal = Signal("tuned", temperature=2.0, alpha=0.9)
    assert improves(ground, signal, run(1.0, 200), run(loss, right)) == expected


def test_the_loss_of_guessing_is_that_of_a_student_without_a_preference():
    """Whatever the targets: the cross-entropy of any of them with equal probabilities is ln C."""
    torch.manual_seed(0)
    labels, ids = torch.tensor([0, 2, 1, 2]), torch.arange(4)
    guessed = Predictions(ids, torch.zeros(4, 3), labels)
    for signal in (
        Signal(),
        Signal("tuned", temperature=2.0, alpha=0.9),
        Signal("uniform", temperature=4.0, alpha=1.0),
    ):
        teacher = TeacherLogits(ids, torch.randn(4, 3)) if signal.alpha else None
        found = verdict_runs.validation_loss(signal, teacher, guessed)
        assert loss_of_guessing(signal, 3) == pytest.approx(found, rel=1e-5)


def made_up_losses(
    monkeypatch, losses: dict[int, dict[str, float]], diverges: tuple[int, str] | None = None
) -> list[tuple[int, int, str]]:
    """Runs that train nothing and have these losses, by steps and name.

    Those without one diverge, and that with this seed and name.

    Returns:
        Gets steps, seed and name of each run.
    """
    ran: list[tuple[int, int, str]] = []

    def run(study, name, seed):
        steps = study.choices["config"]["max_steps"]
        ran.append((steps, seed, name))
        if name not in losses[steps] or (seed, name) == diverges:
            raise DivergedError(1, {"loss": float("nan")})
        return {"history": [{"loss": losses[steps][name]}], "recipe": study.arms[name].recipe}

    monkeypatch.setattr(verdict_plan, "run_arm", run)
    monkeypatch.setattr(verdict_plan, "best_classes", lambda run: np.zeros(1))  # always the same
    return ran


def both_rates(low: float, high: float) -> dict[str, float]:
    """The same loss of every arm at the configuration's rate, and at three times that."""
    return {
        f"{arm}, {name}": loss
        for arm in (BASELINE, UNIFORM, DISTILLED, TRANSFER)
        for name, loss in (("1", low), ("3", high))
    }


def test_steps_are_doubled_until_nothing_falls(small, monkeypatch):
    losses = {2: both_rates(1.0, 1.1), 4: both_rates(0.8, 1.0), 6: both_rates(0.797, 1.0), 8: both_rates(0.1, 1.0)}
    ran = made_up_losses(monkeypatch, losses)
    runs = run_all(prepare(resolve(small)), Plan(lengths=(2, 4, 6, 8), seeds=(3, 3, 3, 3)))
    assert runs.steps == 6
    assert runs.unfinished == ()
    assert list(runs.losses) == [2, 4, 6]
    assert len(ran) == 3 * 2 * 4 + 2 * 4


def test_every_arm_gets_the_rate_that_suits_it(small, monkeypatch):
    """One arm learns faster at three times the rate, and is finished there alone."""
    short, long = both_rates(1.0, 2.0), both_rates(1.0, 2.0)
    short |= {f"{DISTILLED}, 1": 1.0, f"{DISTILLED}, 3": 0.5}
    long |= {f"{DISTILLED}, 1": 0.98, f"{DISTILLED}, 3": 0.49}
    del long[f"{UNIFORM}, 1"]  # diverges
    ran = made_up_losses(monkeypatch, {2: short, 4: long})
    runs = run_all(prepare(resolve(small)), Plan(lengths=(2, 4), seeds=(3, 3)))
    assert runs.unfinished == ()
    rate = small.learning_rate
    rates = {arm: one.recipe.learning_rate for arm, one in runs.arms.items()}
    assert rates == {BASELINE: rate, UNIFORM: 3 * rate, DISTILLED: 3 * rate, TRANSFER: rate}
    assert runs.losses[4][DISTILLED] == 0.49
    assert [(steps, seed) for steps, seed, name in ran if name == f"{DISTILLED}, 3"] == [(2, 0), (4, 0), (4, 1), (4, 2)]
    for arm, of_arm in runs.runs.items():
        assert len(of_arm) == 3
        assert {entry["recipe"].learning_rate for entry in of_arm} == {rates[arm]}


def test_an_arm_is_unfinished_while_the_rate_that_it_uses_still_gains(small, monkeypatch):
    """The best of both rates hardly changes, but the slower one, which is the better now, is on its way."""
    short, long = both_rates(1.0, 2.0), both_rates(1.0, 2.0)
    short |= {f"{DISTILLED}, 1": 0.7, f"{DISTILLED}, 3": 0.5}
    long |= {f"{DISTILLED}, 1": 0.49, f"{DISTILLED}, 3": 0.52}
    made_up_losses(monkeypatch, {2: short, 4: long})
    runs = run_all(prepare(resolve(small)), Plan(lengths=(2, 4), seeds=(3, 3)))
    assert runs.unfinished == (DISTILLED,)


def test_where_another_seed_diverges_all_seeds_use_the_other_rate(small, monkeypatch):
    losses = both_rates(1.0, 0.5)
    ran = made_up_losses(monkeypatch, {2: losses, 4: losses}, diverges=(2, f"{TRANSFER}, 3"))
    runs = run_all(prepare(resolve(small)), Plan(lengths=(2, 4), seeds=(3, 3)))
    rates = {arm: one.recipe.learning_rate / small.learning_rate for arm, one in runs.arms.items()}
    assert rates == {BASELINE: 3.0, UNIFORM: 3.0, DISTILLED: 3.0, TRANSFER: 1.0}
    assert ran[-2:] == [(4, 1, f"{TRANSFER}, 1"), (4, 2, f"{TRANSFER}, 1")]
    assert {entry["recipe"].learning_rate for entry in runs.runs[TRANSFER]} == {small.learning_rate}


def test_an_arm_that_diverges_at_every_rate_ends_the_verdict(small, monkeypatch):
    losses = both_rates(1.0, 1.0)
    del losses[f"{DISTILLED}, 1"], losses[f"{DISTILLED}, 3"]
    made_up_losses(monkeypatch, {2: losses, 4: losses})
    with pytest.raises(DivergedError):
        run_all(prepare(resolve(small)), Plan(lengths=(2, 4), seeds=(3, 3)))


# ---- The answers


def opened(right: dict[str, list[list[int]]]) -> Opened:
    """A test split of one class and one other, of which each candidate gets these texts right."""
    texts = len(next(iter(right.values()))[0])
    labels = np.arange(texts) % 2
    classes = {name: np.where(np.array(rows) == 1, labels, 1 - labels) for name, rows in right.items()}
    return Opened(labels, classes, {})


def answers(right: dict[str, list[list[int]]], unfinished=()) -> list[str]:
    return [entry["answer"] for entry in questions(opened(right), TRANSFER, unfinished, "accuracy", 0.01)]


def test_a_clear_gain_pays_and_a_student_like_its_teacher_is_close():
    good, poor = [1] * 2700 + [0] * 300, [1] * 2100 + [0] * 900
    right = {BASELINE: [poor] * 3, DISTILLED: [good] * 3, TRANSFER: [good] * 3, TFIDF: [poor], TEACHER: [good]}
    assert answers(right) == [PAYS, PAYS, PAYS, PAYS]


def test_few_texts_cannot_tell_and_say_how_many_would():
    good, poor = [1] * 27 + [0] * 3, [1] * 26 + [0] * 4
    right = {BASELINE: [poor] * 3, DISTILLED: [good] * 3, TRANSFER: [good] * 3, TFIDF: [poor], TEACHER: [good]}
    found = questions(opened(right), TRANSFER, (), "accuracy", 0.01)
    assert {entry["answer"] for entry in found} == {CANNOT_TELL}
    assert all(entry["needed"]["texts"] > 30 for entry in found if entry["question"] != "teacher")


def test_beside_a_rival_that_is_unfinished_a_student_can_fail_but_not_pay():
    good, poor = [1] * 2700 + [0] * 300, [1] * 2100 + [0] * 900
    right = {BASELINE: [poor] * 3, UNIFORM: [poor] * 3, MORE: [poor] * 3, DISTILLED: [good] * 3, TEACHER: [good]}
    assert [one["answer"] for one in questions(opened(right), DISTILLED, (), "accuracy", 0.01)] == [PAYS] * 3
    for unfinished, expected in (
        (MORE, [PAYS, PAYS, UNFINISHED]),
        (UNIFORM, [UNFINISHED, PAYS, UNFINISHED]),
        (BASELINE, [UNFINISHED, PAYS, UNFINISHED]),
    ):
        found = questions(opened(right), DISTILLED, (unfinished,), "accuracy", 0.01)
        assert [entry["answer"] for entry in found] == expected, unfinished
    right |= {UNIFORM: [good] * 3, DISTILLED: [poor] * 3, TEACHER: [poor]}
    found = questions(opened(right), DISTILLED, (MORE,), "accuracy", 0.01)
    assert [entry["answer"] for entry in found] == [DOES_NOT_PAY, PAYS, DOES_NOT_PAY]


def test_a_student_pays_only_if_it_pays_against_each():
    """Against TF-IDF, whose interval begins lower, the gain is large enough to matter; against the baseline not."""
    student = [1] * 2860 + [0] * 140
    baseline = [0] * 27 + [1] * 2833 + [0] * 140
    tfidf = [0] * 174 + [1] * 2812 + [0] * 14  # 1.6 points worse, right on other texts
    right = {BASELINE: [baseline] * 3, DISTILLED: [student] * 3, TFIDF: [tfidf], TEACHER: [student]}
    estimates = {name: difference(opened(right), DISTILLED, name, "accuracy", level=0.95) for name in (BASELINE, TFIDF)}
    assert 0 < estimates[TFIDF].low < estimates[BASELINE].low
    assert estimates[BASELINE].gain < 0.01 < estimates[TFIDF].gain
    found = questions(opened(right), DISTILLED, (), "accuracy", 0.01)[-1]
    assert (found["answer"], found["against"]) == (CANNOT_TELL, BASELINE)


def test_failures_against_several_must_hold_together():
    """The chance of a wrong failure does not grow with the number of rivals."""
    student, rival = [1] * 700 + [0] * 300, [1] * 719 + [0] * 281
    alone = {BASELINE: [rival] * 3, DISTILLED: [student] * 3, TEACHER: [student]}
    several = alone | {TFIDF: [student], MORE: [student] * 3, UNIFORM: [student] * 3, COMMONEST: [student]}
    found = [questions(opened(one), DISTILLED, (), "accuracy", 0.01)[-1] for one in (alone, several)]
    assert [one["estimate"]["level"] for one in found] == [0.95, 0.99]


def test_failing_against_one_decides_though_another_interval_begins_lower():
    """That of TF-IDF, which is right on other texts, is wider: it alone would leave the question open."""
    poor, good, other = [1] * 210 + [0] * 90, [1] * 220 + [0] * 80, [1] * 60 + [0] * 90 + [1] * 150
    right = {BASELINE: [good] * 3, DISTILLED: [poor] * 3, TFIDF: [other], TEACHER: [poor]}
    found = questions(opened(right), DISTILLED, (), "accuracy", 0.01)[-1]
    to_tfidf = difference(opened(right), DISTILLED, TFIDF, "accuracy", level=0.975)
    assert to_tfidf.low < found["estimate"]["low"] < found["estimate"]["high"] < 0 < to_tfidf.high
    assert (found["answer"], found["against"]) == (DOES_NOT_PAY, BASELINE)


def test_a_try_that_diverges_is_left_out(small, monkeypatch):
    ground = prepare(resolve(small))
    runs = run_all(ground, PLAN)
    real = verdicts.run_arm

    def run(study, arm, seed):
        if study.arms[arm].recipe.signal.temperature == 4.0:
            raise DivergedError(1, {})
        return real(study, arm, seed)

    monkeypatch.setattr(verdicts, "run_arm", run)
    tried = verdicts.try_settings(ground, runs, TRANSFER, 9)
    assert len(tried["curve"]) == 3
    assert len(tried["settings"]) == len(verdicts.other_settings(runs.arms[TRANSFER].recipe)) - 1
    few = verdicts.try_settings(ground, runs, TRANSFER, 1)
    assert (len(few["curve"]), few["settings"]) == (2, [])


@pytest.mark.parametrize(("measure", "best"), [("accuracy", 1), ("macro_recall", 2)])
def test_the_best_moment_is_chosen_by_the_measure(monkeypatch, measure, best):
    moments = {1: {"accuracy": 0.9, "macro_recall": 0.5}, 2: {"accuracy": 0.8, "macro_recall": 0.6}}
    steps: list[int] = []

    def predicted() -> Predictions:
        return Predictions(torch.tensor([0]), torch.full((1, 2), float(steps[-1])), torch.tensor([0]))

    monkeypatch.setattr(watch, "classification_metrics", lambda logits, labels: moments[steps[-1]] | {"nll": 1.0})
    watching = Watch(torch.nn.Linear(1, 1), predicted, lambda _: 0.0, [1, 2], measure)
    for step in moments:
        steps.append(step)
        watching.look(step)
    assert watching.logits["best"][0, 0] == best
    assert watching.logits["last"][0, 0] == 2


def test_what_is_unfinished_is_not_judged():
    good = [1] * 100
    right = {BASELINE: [good], DISTILLED: [good], TRANSFER: [good], TFIDF: [good], TEACHER: [good]}
    assert answers(right, unfinished=(DISTILLED,))[0] == UNFINISHED
    found = questions(opened(right), TRANSFER, (BASELINE,), "accuracy", 0.01)
    assert [entry["answer"] == UNFINISHED for entry in found] == [True, True, False, True]
    assert "estimate" not in found[0]
    nobody = questions(opened(right), None, (DISTILLED, TRANSFER), "accuracy", 0.01)
    assert {entry["answer"] for entry in nobody} == {UNFINISHED}


def test_a_student_must_beat_every_student_without_a_teacher():
    """It is better than the baseline, but no better than one whose teacher knows nothing."""
    good, poor = [1] * 2700 + [0] * 300, [1] * 2100 + [0] * 900
    right = {BASELINE: [poor] * 3, UNIFORM: [good] * 3, DISTILLED: [good] * 3, TEACHER: [good]}
    found = questions(opened(right), DISTILLED, (), "accuracy", 0.01)
    assert found[0]["against"] == UNIFORM
    assert [entry["answer"] for entry in found] == [DOES_NOT_PAY, PAYS, DOES_NOT_PAY]


def test_the_first_question_has_wider_intervals_where_it_has_two_parts():
    good, poor = [1] * 90 + [0] * 10, [1] * 80 + [0] * 20
    right = {BASELINE: [poor] * 3, DISTILLED: [good] * 3, TRANSFER: [good] * 3, TFIDF: [poor], TEACHER: [good]}
    levels = [entry["estimate"]["level"] for entry in questions(opened(right), TRANSFER, (), "accuracy", 0.01)]
    assert levels == [0.975, 0.975, 0.95, 0.95]


def test_a_class_that_suffers_is_named_even_where_the_whole_gains():
    """Of the second class the student gets fewer right, of the first more."""
    first, second = [1] * 300, [0] * 300
    student = [value for pair in zip(first, second, strict=True) for value in pair]
    reference = [1 - value if index % 2 == 0 else 1 for index, value in enumerate(student)]
    found = class_differences(
        opened({TRANSFER: [student] * 3, BASELINE: [reference] * 3}), TRANSFER, BASELINE, ["a", "b"]
    )
    assert [row["class"] for row in found] == ["a", "b"]
    assert found[0]["low"] > 0
    assert found[1]["high"] < 0
    assert found[1]["texts"] == 300


def test_macro_recall_weights_classes_alike():
    right = {DISTILLED: [[1, 1] * 50], BASELINE: [[1, 0] * 50]}
    by_hand = difference(opened(right), DISTILLED, BASELINE, "macro_recall", level=0.95)
    assert by_hand.gain == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"effect": 1.0}, "effect is 1.0; give a share between 0 and 1: 0.01 is one point."),
        ({"measure": "f1"}, "measure is 'f1'; choose one of accuracy, macro_recall."),
        ({"budget": 0.0}, "budget is 0.0; give seconds, more than 0."),
        ({"data": "without validation"}, "the split 'validation' has no texts; a verdict needs some"),
        ({"data": "of one class"}, "all 20 labelled texts of the student are of one class; give more of them"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(small, changes, sentence):
    if "data" in changes:
        data = load_splits(small)
        one_class = data.train.filter(lambda label: label == 0, input_columns="label").select(range(20))
        changes = {
            "without validation": {"data": dataclasses.replace(data, validation=data.validation.select([]))},
            "of one class": {"data": dataclasses.replace(data, train=one_class), "plan": PLAN},
        }[changes["data"]]
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        verdict(small, **changes, report=lambda plan: None)
    assert not (artifacts.artifacts_dir() / "studies").exists()
