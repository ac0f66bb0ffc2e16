"""Runs that are killed go on where they were, and end in the same weights, bit by bit."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import hub_cache, kills
from support.models import tiny_bert
from support.runs import same_run, tiny_config

from kd_helpers import artifacts, checkpoints, loop, runs, teacher
from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, evaluation_batches, tokenize, training_batches
from kd_helpers.models import freeze, teacher_forward
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.resolve import resolve
from kd_helpers.runs import DistillResult, distill

pytestmark = pytest.mark.filterwarnings("ignore:the teacher is not shown")  # these are too small to learn

KILLS = 40
STEPS = 16


@pytest.fixture(scope="module")
def data(small_data) -> DataSplits:
    return dataclasses.replace(small_data, teacher_train=small_data.train)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer) -> DistillConfig:
    """Four epochs of four steps, with models so small that a run takes a second or two."""
    folder = tmp_path_factory.mktemp("models")
    return tiny_config(folder, tokenizer, epochs=4, teacher_epochs=4, alpha=0.5, learning_rate=1e-3)


@pytest.fixture(scope="module")
def alone(config) -> DistillConfig:
    """The same without a teacher."""
    return config.replace(teacher_epochs=0, alpha=0.0)


def distil_in(config: DistillConfig, data: DataSplits) -> None:
    """What a process does that is going to be killed."""
    distill(config, data=data, checkpoint_steps=1)


@pytest.mark.longer
def test_killed_at_random_moments_a_run_ends_in_the_same_weights(tmp_path, monkeypatch, one_thread, config, data):
    """SIGKILL strikes the tuning of the teacher, its logits, the student's training and the saving, where it may."""
    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "whole"))
    start = time.monotonic()
    whole = distill(config, data=data)
    seconds = time.monotonic() - start

    chance, patience = random.Random(0), seconds / 2
    fork = multiprocessing.get_context("fork")
    folder, kills, stages = tmp_path / "killed", 0, set()
    monkeypatch.setenv("KD_ARTIFACTS", str(folder))
    while kills < KILLS:
        process = fork.Process(target=distil_in, args=(config, data))
        process.start()
        process.join(chance.uniform(0, patience))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            stage = tuple(sorted(path.name for path in folder.glob("checkpoints/*/[!.]*")))
            patience *= 1.2 if stage in stages else 1  # a busy machine comes less far in the same time
            stages.add(stage)
        else:  # it was done before it could be killed; the next begins with nothing
            assert process.exitcode == 0
            assert same_run(whole, distill(config, data=data))
            shutil.rmtree(folder)
            patience = seconds / 2
    assert same_run(whole, distill(config, data=data))
    assert len(stages) > 5, "the kills must not all have struck at one place"
    assert not list(folder.glob("checkpoints/[!.]*"))


# Killed right before any of its writes, and in the middle of each


@pytest.fixture(scope="module")
def unfilled(tmp_path_factory, data) -> DistillConfig:
    """Sixty steps, of which an epoch has thirteen, so that the last epoch is not filled."""
    words = hub_cache.word_tokenizer([word for text in data.train["text"] for word in text.split()])
    config = tiny_config(tmp_path_factory.mktemp("small"), words, batch_size=5, max_steps=60)
    assert len(training_batches(tokenize(data.student_train, words, 24), words, 5, seed=0)) == 13
    return config


@pytest.mark.filterwarnings("error:.*damaged", "error:.*made again")  # a kill leaves nothing that has to be reported
@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.longer)])
def test_killed_between_any_two_writes_a_run_ends_in_the_same_weights(
    tmp_path, monkeypatch, one_thread, unfilled, data, every
):
    """The same weights, predictions, history and measures, and nothing is left but what an undisturbed run leaves."""
    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "whole"))
    whole = distill(unfilled, data=data)
    assert [entry["step"] for entry in whole.history] == [13, 26, 39, 52, 60]

    def attempt() -> None:
        distill(unfilled, data=data)

    def killed(how: Callable[..., None], number: int) -> DistillResult:
        """What a run ends in that was killed, and started once more."""
        folder = tmp_path / f"{how.__name__}-{number}"
        monkeypatch.setenv("KD_ARTIFACTS", str(folder))
        how(attempt, folder, number)
        result = distill(unfilled, data=data)
        assert sealed(folder) == sealed(tmp_path / "whole")
        assert not list(folder.glob("checkpoints/[!.]*"))
        shutil.rmtree(folder)
        return result

    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "counted"))
    events = kills.events_of(attempt, tmp_path / "counted")
    points = [(kills.killed_before, number) for number in range(len(events))]
    points += [(kills.killed_within, number) for number, event in enumerate(events) if event.writes]
    assert len(points) > 150, "the events must be seen"
    places = {event.path.split(os.sep)[-2] for event in events}
    assert {"teachers", "teacher_logits", "checkpoints", "runs"} <= places
    wrong = [
        (how.__name__, number, events[number])
        for how, number in points[::every]
        if not same_run(whole, killed(how, number))
    ]
    assert wrong == []


def sealed(folder: Path) -> list[str]:
    """The folders below that are sealed, all of them intact."""
    places = [path.parent for path in folder.rglob(artifacts.MANIFEST) if ".building" not in str(path)]
    assert all(artifacts.damaged(place) == [] for place in places)
    return sorted(str(place.relative_to(folder)) for place in places)


# Interrupted by an error


class InterruptionError(Exception):
    pass


def interrupted(function, *, after: int):
    """The function, which fails when it is called for the time after `after`."""
    calls = 0

    def call(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > after:
            raise InterruptionError
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("checkpoint_steps", [0, 1, 3])
@pytest.mark.parametrize("after", [2, 5, 6, 11])
def test_a_run_goes_on_in_the_middle_of_an_epoch(own_artifacts, monkeypatch, alone, data, after, checkpoint_steps):
    whole = distill(alone, data=data)
    options = {"output_dir": own_artifacts / "again", "checkpoint_steps": checkpoint_steps}
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted(torch.optim.AdamW.step, after=after))
        with pytest.raises(InterruptionError):
            distill(alone, data=data, **options)
    made = count_steps(monkeypatch)
    assert same_run(whole, distill(alone, data=data, **options))
    kept = max(after // 4 * 4, after // checkpoint_steps * checkpoint_steps if checkpoint_steps else 0)
    assert made == list(range(kept + 1, STEPS + 1))


def count_steps(monkeypatch) -> list[int]:
    """The numbers of the optimiser steps that are made from now on."""
    made, training_step = [], loop.training_step

    def call(*arguments, **options):
        values = training_step(*arguments, **options)
        made.append(options["number"])
        return values

    monkeypatch.setattr(loop, "training_step", call)
    return made


def test_a_finished_run_is_found_again(own_artifacts, monkeypatch, alone, data):
    config = alone.replace(max_steps=3)
    first = distill(config, data=data)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train_classifier", interrupted(runs.train_classifier, after=0))
        assert same_run(first, distill(config, data=data))
        with pytest.raises(InterruptionError):
            distill(config, data=data, resume=False)
    assert same_run(first, distill(config, data=data, resume=False))


def test_beginning_anew_forgets_the_checkpoints(own_artifacts, monkeypatch, alone, data):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted(loop.evaluate, after=2))
        with pytest.raises(InterruptionError):
            distill(alone, data=data)
    made = count_steps(monkeypatch)
    distill(alone, data=data, resume=False)
    assert made == list(range(1, STEPS + 1))


def test_the_teacher_goes_on_as_well(own_artifacts, monkeypatch, config, data):
    setup = resolve(config, data)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted(loop.evaluate, after=1))
        with pytest.raises(InterruptionError):
            teacher.fine_tuned_teacher(setup)
    made = count_steps(monkeypatch)
    resumed = teacher.fine_tuned_teacher(setup)
    assert made == [3, 4, 5, 6, 7, 8]  # two in each of four epochs, of which the first was finished
    monkeypatch.setenv("KD_ARTIFACTS", str(own_artifacts / "other"))
    expected = teacher.fine_tuned_teacher(setup).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_running_the_teacher_goes_on_as_well(own_artifacts, monkeypatch, tokenized, tokenizer):
    monkeypatch.setattr(teacher, "SHARD", 64)
    model = freeze(tiny_bert(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "teacher_forward", interrupted(teacher.teacher_forward, after=1))
        with pytest.raises(InterruptionError):
            teacher.cached_logits(model, tokenized, tokenizer, precision=torch.float32)
    rest = []
    monkeypatch.setattr(
        teacher, "teacher_forward", lambda *given: rest.append(len(given[1]["id"])) or teacher_forward(*given)
    )
    resumed = teacher.cached_logits(model, tokenized, tokenizer, precision=torch.float32)
    assert rest == [64]
    monkeypatch.setenv("KD_ARTIFACTS", str(own_artifacts / "other"))
    expected = teacher.cached_logits(model, tokenized, tokenizer, precision=torch.float32)
    assert torch.equal(resumed.logits, expected.logits)
    assert torch.equal(resumed.ids, expected.ids)


def a_checkpoint(folder: Path, steps: int = 1):
    """A model, its optimiser and its scheduler after some steps, with a checkpoint of each."""
    model = tiny_bert(dropout=0.0)
    optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=0.01)
    scheduler = make_scheduler(optimizer, steps=10, warmup_ratio=0.3)
    for step in range(steps):
        model(torch.tensor([[101, 2054 + step, 102]])).logits.square().sum().backward()
        optimizer.step()
        scheduler.step()
        progress = checkpoints.Progress(step=step + 1)
        checkpoints.save_checkpoint(folder, model, optimizer, scheduler, progress)
    return model, optimizer, scheduler


def test_a_checkpoint_holds_all_that_the_next_step_needs(tmp_path):
    torch.manual_seed(5)
    model, optimizer, scheduler = a_checkpoint(tmp_path, steps=2)
    drawn = torch.rand(3)
    fresh = tiny_bert(seed=9)
    other = make_optimizer(fresh, learning_rate=1e-3, weight_decay=0.01)
    plan = make_scheduler(other, steps=10, warmup_ratio=0.3)
    assert checkpoints.load_checkpoint(tmp_path, fresh, other, plan).step == 2
    assert torch.equal(torch.rand(3), drawn)
    assert plan.get_last_lr() == scheduler.get_last_lr()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    states = [kept.state_dict()["state"] for kept in (optimizer, other)]
    for index, one in states[0].items():
        assert one.keys() == states[1][index].keys()
        assert all(torch.equal(value, states[1][index][name]) for name, value in one.items())
    for one, same in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, same)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    a_checkpoint(tmp_path, steps=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", artifacts.MANIFEST])
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(tmp_path, file):
    model, optimizer, scheduler = a_checkpoint(tmp_path, steps=3)
    content = bytearray((tmp_path / "step-00000003" / file).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "step-00000003" / file).write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000003 is damaged; an earlier one is taken"):
        assert checkpoints.load_checkpoint(tmp_path, model, optimizer, scheduler).step == 2


def test_where_there_is_none_nothing_changes(tmp_path):
    model, optimizer, scheduler = a_checkpoint(tmp_path)
    before = model.classifier.weight.clone()
    assert checkpoints.load_checkpoint(tmp_path / "empty", model, optimizer, scheduler) == checkpoints.Progress()
    assert torch.equal(model.classifier.weight, before)


def test_seconds_add_up_over_the_processes(own_artifacts, tokenized, tokenizer, monkeypatch):
    config = DistillConfig(epochs=2, alpha=0.0, batch_size=32)
    held_out = evaluation_batches(tokenized.select(range(96)), tokenizer)
    folder = own_artifacts / "checkpoints" / "one"

    def go():
        batches = training_batches(tokenized, tokenizer, 32, seed=0)
        options = {"config": config, "validation": held_out, "description": None, "checkpoints": folder}
        return loop.train_classifier(tiny_bert(), batches, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted(loop.evaluate, after=1))
        with pytest.raises(InterruptionError):
            go()
    earlier = artifacts.load_json(folder / "step-00000004" / "state.json")["progress"]["seconds"]
    assert go().seconds > earlier > 0


def test_parts_that_are_finished_are_found_again(tmp_path):
    begun = []

    def build(number, part, bar, target):
        begun.append(number)
        if stop_at == number:
            raise KeyboardInterrupt
        bar.update(1)  # the rest of the part is counted when it is done
        artifacts.save_json(target / "part.json", part)

    options = {"size": 2, "description": "Letters", "unit": "letter"}
    stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        checkpoints.build_parts(tmp_path, "abcde", build, **options)
    stop_at = None
    folders = checkpoints.build_parts(tmp_path, "abcde", build, **options)
    assert [artifacts.load_json(folder / "part.json") for folder in folders] == ["ab", "cd", "e"]
    assert begun == [0, 1, 1, 2]
