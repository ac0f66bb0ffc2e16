"""What holds for every input, tried on many: hypothesis draws the inputs and shrinks those that break a property."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.testing import assert_close

from kd_helpers import artifacts, data, teacher
from kd_helpers.checkpoints import build_parts
from kd_helpers.config import DEVICES, PRECISIONS, PRESETS, STUDENT_INITS, DistillConfig
from kd_helpers.data import BucketBatchSampler, DataSplits, LengthSortedBatchSampler
from kd_helpers.losses import IGNORE_INDEX, distillation_loss, hard_loss, soft_loss
from kd_helpers.metrics import classification_metrics
from kd_helpers.teacher import TeacherLogits

# Logits drawn from so few numbers can look like probabilities, and the losses say so.
pytestmark = pytest.mark.filterwarnings("ignore:.*look like probabilities")

FEW = settings(max_examples=25)  # where an example writes files or builds datasets

seeds = st.integers(0, 2**32 - 1)

# Losses

temperatures = st.floats(0.25, 20)
alphas = st.floats(0, 1)


@st.composite
def batches_of_logits(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits, teacher logits `[N, C]` and labels `[N]`, some of them −100; logits are multiples of 1/8."""
    n, classes = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    eighths = arrays(np.int64, (n, classes), elements=st.integers(-160, 160))
    student, teacher = (torch.from_numpy(draw(eighths)).float() / 8 for _ in range(2))
    labels = draw(st.lists(st.sampled_from([IGNORE_INDEX, *range(classes)]), min_size=n, max_size=n))
    return student, teacher, torch.tensor(labels)


def close(one: torch.Tensor, other: torch.Tensor, temperature: float = 1.0) -> None:
    """Equal but for the rounding of float32, which T² and the size of the logits make larger."""
    assert_close(one, other, rtol=1e-4, atol=1e-6 * (1 + temperature) ** 2, check_dtype=False)


@given(batches_of_logits(), temperatures)
def test_the_soft_loss_is_t_squared_times_kl_and_never_negative(batch, temperature):
    student, teacher, _ = batch
    loss = soft_loss(student, teacher, temperature)
    p, q = ((logits.double() / temperature).log_softmax(dim=-1) for logits in (teacher, student))
    close(loss, temperature**2 * (p.exp() * (p - q)).sum() / len(p), temperature)
    assert loss.item() >= -1e-6 * (1 + temperature) ** 2


@given(batches_of_logits(), temperatures, st.data())
def test_a_constant_added_to_a_row_changes_no_soft_loss(batch, temperature, draws):
    student, teacher, _ = batch
    # Whole numbers, so that the sums are exact.
    shifts = arrays(np.int64, (2, len(student), 1), elements=st.integers(-50, 50))
    for_student, for_teacher = torch.from_numpy(draws.draw(shifts)).float()
    before = soft_loss(student, teacher, temperature)
    close(soft_loss(student + for_student, teacher, temperature), before, temperature)
    close(soft_loss(student, teacher + for_teacher, temperature), before, temperature)


@given(batches_of_logits(), temperatures, alphas, st.data())
def test_neither_the_order_of_examples_nor_that_of_classes_matters(batch, temperature, alpha, draws):
    student, teacher, labels = batch
    n, classes = student.shape
    rows, columns = (torch.tensor(draws.draw(st.permutations(range(size)))) for size in (n, classes))
    before = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    shuffled = [values[rows] for values in batch]
    for one, other in zip(before, distillation_loss(*shuffled, temperature=temperature, alpha=alpha), strict=True):
        close(one, other, temperature)
    renamed = torch.where(labels == IGNORE_INDEX, labels, columns.argsort()[labels.clamp(min=0)])
    moved = (student[:, columns], teacher[:, columns], renamed)
    for one, other in zip(before, distillation_loss(*moved, temperature=temperature, alpha=alpha), strict=True):
        close(one, other, temperature)


@given(batches_of_logits(), temperatures, alphas)
def test_the_total_lies_between_its_parts_as_alpha_says(batch, temperature, alpha):
    loss = distillation_loss(*batch, temperature=temperature, alpha=alpha)
    close(loss.total, alpha * loss.soft.double() + (1 - alpha) * loss.hard.double(), temperature)
    slack = 1e-5 * (1 + loss.soft.abs() + loss.hard)
    assert min(loss.soft, loss.hard) - slack <= loss.total <= max(loss.soft, loss.hard) + slack


@given(batches_of_logits(), temperatures)
def test_the_soft_loss_moves_no_row_as_a_whole(batch, temperature):
    """Its gradient T (q − p) / N is a difference of two distributions, so it sums to 0 over the classes."""
    student, teacher, _ = batch
    student.requires_grad_()
    soft_loss(student, teacher, temperature).backward()
    close(student.grad.sum(dim=-1), torch.zeros(len(student)), temperature)


@given(batches_of_logits(), temperatures)
def test_alpha_0_is_cross_entropy_on_the_labelled_rows(batch, temperature):
    student, _, labels = batch
    labelled = labels != IGNORE_INDEX
    assume(labelled.any())
    loss = distillation_loss(*batch, temperature=temperature, alpha=0.0)
    close(loss.total, F.cross_entropy(student[labelled].double(), labels[labelled]))


@given(batches_of_logits(), st.floats(-100, 100))
def test_logits_of_texts_without_a_label_do_not_move_the_hard_loss(batch, value):
    student, _, labels = batch
    other = student.clone()
    other[labels == IGNORE_INDEX] = value
    assert torch.equal(hard_loss(student, labels), hard_loss(other, labels))


# Batches


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=40), st.integers(1, 9), seeds)
@FEW
def test_a_batch_is_padded_as_little_as_can_be_and_loses_nothing(tokenizer, texts, batch_size, seed):
    rows = {
        7 * index + 3: {
            "tokens": [1 + index, *range(200, 199 + length)],
            "label": label,
            "logits": [index, -index, 1.0],
        }
        for index, (length, label) in enumerate(texts)
    }
    tokens = [row["tokens"] for row in rows.values()]
    tokenized = datasets.Dataset.from_dict(
        {
            "id": list(rows),
            "label": [row["label"] for row in rows.values()],
            "length": [len(ids) for ids in tokens],
            "input_ids": tokens,
            "attention_mask": [[1] * len(ids) for ids in tokens],
        }
    )
    # In another order than the texts: logits are found by id.
    teacher_logits = TeacherLogits(
        torch.tensor(list(rows)).flip(0), torch.tensor([r["logits"] for r in rows.values()]).flip(0)
    )
    seen = []
    for batch in data.training_batches(teacher.attach(tokenized, teacher_logits), tokenizer, batch_size, seed=seed):
        wanted = [rows[text_id] for text_id in batch["id"].tolist()]
        longest = max(len(row["tokens"]) for row in wanted)
        width = batch["input_ids"].shape[1]
        assert width % 8 == 0
        assert longest <= width < longest + 8
        assert torch.equal(batch["attention_mask"] == 1, batch["input_ids"] != tokenizer.pad_token_id)
        unpadded = [
            ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert unpadded == [row["tokens"] for row in wanted]
        assert batch["labels"].tolist() == [row["label"] for row in wanted]
        assert batch["teacher_logits"].tolist() == [row["logits"] for row in wanted]
        seen += batch["id"].tolist()
    assert sorted(seen) == sorted(rows)


lengths = st.lists(st.integers(1, 128), min_size=1, max_size=200)


def batches_of(sampler: BucketBatchSampler, epoch: int, start: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch, start=start)
    return list(sampler)


@given(lengths, st.integers(1, 30), seeds, st.integers(0, 50), st.integers(1, 4), st.data())
def test_an_epoch_depends_on_seed_and_number_alone_and_can_be_begun_anywhere(
    lengths, batch_size, seed, epoch, pool_batches, draws
):
    one, other = (BucketBatchSampler(lengths, batch_size, seed=seed, pool_batches=pool_batches) for _ in range(2))
    batches_of(other, epoch + 1)  # what was drawn before must not matter
    whole = batches_of(one, epoch)
    assert sorted(itertools.chain(*whole)) == list(range(len(lengths)))
    assert sum(len(batch) < batch_size for batch in whole) <= 1, "only the last batch may be smaller"
    start = draws.draw(st.integers(0, len(whole)))
    assert batches_of(other, epoch, start) == whole[start:]
    assert batches_of(other, epoch) == whole


@given(lengths, st.integers(1, 30))
def test_batches_to_evaluate_on_are_all_texts_from_short_to_long(lengths, batch_size):
    batches = list(LengthSortedBatchSampler(lengths, batch_size))
    order = list(itertools.chain(*batches))
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


@given(st.integers(1, 400), st.integers(1, 3), seeds)
@FEW
def test_shards_cut_into_batches_are_the_batches_of_the_whole(texts, batches_in_a_shard, seed):
    """Else a pass that was cut off and went on would pad otherwise, and round otherwise, than one that was not."""
    # Not drawn one by one: hypothesis rarely draws lists as long as a few batches.
    lengths = np.random.default_rng(seed).integers(1, 60, texts)
    tokenized = datasets.Dataset.from_dict({"id": range(texts), "length": lengths})
    shards = []

    def keep(_number: int, rows: Sequence[int], _bar: Any, _target: Path) -> None:
        shards.append(tokenized.select(rows))

    with tempfile.TemporaryDirectory() as folder:
        order = LengthSortedBatchSampler(lengths, 64).order
        size = 64 * batches_in_a_shard
        build_parts(Path(folder), order, keep, size=size, description="Shards", unit="text")
    assert all(len(shard) == 64 * batches_in_a_shard for shard in shards[:-1])

    def ids(part: datasets.Dataset) -> list[list[int]]:
        return [part.select(batch)["id"][:] for batch in LengthSortedBatchSampler(part["length"][:], 64)]

    assert list(itertools.chain(*map(ids, shards))) == ids(tokenized)


# Splits

WORDS = (
    "good day",
    "Good  day",
    "GOOD DAY ",
    "so so",
    "So so",
    "http://t.co/x",
    "@ann hi",
    "@bob  Hi",
    "RT @a: hi",
    "",
)
tweets = st.lists(
    st.tuples(st.sampled_from(WORDS) | st.text("ab ", max_size=3), st.integers(0, 2)), min_size=1, max_size=30
)


@given(tweets, seeds)
def test_what_is_left_of_copies_is_one_row_that_all_of_them_agree_on(rows, seed):
    shuffled = random.Random(seed).sample(rows, len(rows))
    one, other = (
        data.deduplicate(data.clean(pd.DataFrame(order, columns=["text", "label"], dtype=object)))
        for order in (rows, shuffled)
    )
    labels: dict[str, set[int]] = {}
    for text, label in rows:
        labels.setdefault(data.duplicate_key(text), set()).add(label)
    agreed = {key: label for key, (label, *others) in labels.items() if key and not others}
    assert dict(zip(one["key"], one["label"], strict=True)) == agreed
    assert len(one) == len(agreed)
    assert one["id"].is_monotonic_increasing
    # Which of the copies stays follows the order of the rows; all that decides about splits does not.
    pd.testing.assert_frame_equal(one[["id", "key", "label"]], other[["id", "key", "label"]])


def key_of(text: str) -> str:
    """What makes two of a reader's own texts copies."""
    return " ".join(text.split()).casefold()


own_texts = st.sampled_from(
    ["Fair", "fair", " FAIR ", "so  so", "So so", "text 0", "Text  3", "TEXT 5", "held out 1", ""]
)
own_rows = st.lists(st.tuples(own_texts, st.sampled_from(["yes", "no", "perhaps", ""])), max_size=15)
CLASSES = ("no", "perhaps", "yes")
# Enough that every class has a text for each split, whatever the drawn rows dispute.
ENOUGH = [(f"text {index}", CLASSES[index % 3]) for index in range(24)]
HELD_OUT = [("held out 0", "no"), ("held out 1", "yes")]


def write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("properties")


def splits_of(splits: DataSplits) -> dict[str, dict[int, int]]:
    """The texts of each split, by id, with their labels."""
    return {
        name: dict(zip(part["id"][:], part["label"][:], strict=True))
        for name, part in vars(splits).items()
        if isinstance(part, datasets.Dataset)
    }


@given(own_rows, st.none() | st.lists(own_rows.map(tuple), max_size=1), seeds)
@FEW
def test_own_texts_are_split_without_copies_whatever_their_order(folder, extra, test, seed):
    train = [*ENOUGH, *extra]
    files = {"data": train}
    if test is not None:  # a test file of its own, of which every text has a label
        files["test_data"] = [*HELD_OUT, *((text, label or "no") for rows in test for text, label in rows)]
    order = random.Random(seed)
    one, other = (
        data.load_splits(
            DistillConfig(**{name: write_csv(folder / f"{name}.csv", change(rows)) for name, rows in files.items()})
        )
        for change in (list, lambda rows: order.sample(rows, len(rows)))
    )
    assert splits_of(one) == splits_of(other)
    data.require_disjoint(one)
    keys = [{key_of(text) for text in part["text"]} for part in (one.student_train, one.validation, one.test)]
    assert sum(map(len, keys)) == len(set.union(*keys)) == len(one.student_train) + len(one.validation) + len(one.test)
    assert "" not in set.union(*keys)
    assert set(one.train["label"]) == {0, 1, 2}
    assert one.label_names == CLASSES
    said: dict[str, set[str]] = {}
    for text, label in itertools.chain(*files.values()):
        said.setdefault(key_of(text), set()).add(label)
    for part in (one.train, one.validation, one.test):
        assert all(CLASSES[row["label"]] in said[key_of(row["text"])] for row in part)
    assert all("" in said[key_of(text)] for text in one.transfer["text"])


ids = st.lists(st.integers(0, 40), max_size=5)


@given(ids, ids, ids, ids, ids)
def test_splits_are_refused_if_and_only_if_a_held_out_text_stands_elsewhere(train, transfer, teacher, validation, test):
    def part(ids: list[int]) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"id": ids})

    splits = DataSplits(*map(part, (train, transfer, teacher, validation, test)), label_names=("a", "b"))
    trained_on = {*train, *transfer, *teacher}  # of these two may well hold the same text
    if {*test} & {*validation} or {*test, *validation} & trained_on:
        with pytest.raises(ValueError, match=r"^\d+ texts stand both in (test|validation) and in "):
            data.require_disjoint(splits)
    else:
        data.require_disjoint(splits)


# Configuration


def above_0(most: float) -> st.SearchStrategy[float]:
    return st.floats(0, most, exclude_min=True)


# A "~" at the beginning is another name for the home folder: tests/test_odd_files.py has those.
paths = st.text(max_size=5).filter(lambda path: not path.startswith("~"))

VALID: dict[str, st.SearchStrategy[Any]] = {
    "preset": st.sampled_from(sorted(PRESETS)),
    "teacher_checkpoint": paths,
    "student_checkpoint": paths,
    "data": paths.filter(bool),
    "validation_data": paths,
    "test_data": paths,
    "text_column": st.sampled_from(["text", "review"]),
    "label_column": st.sampled_from(["label", "stars"]),
    "temperature": above_0(1e6) | st.integers(1, 100),
    "alpha": st.floats(0, 1) | st.integers(0, 1),
    "epochs": st.integers(1, 10**9),
    "max_steps": st.integers(0, 10**9),
    "batch_size": st.integers(1, 10**9),
    "learning_rate": above_0(10) | st.integers(1, 10),
    "warmup_ratio": st.floats(0, 1, exclude_max=True) | st.just(0),
    "weight_decay": st.floats(0, 10) | st.integers(0, 10),
    "max_grad_norm": above_0(1e6) | st.integers(1, 10),
    "max_length": st.integers(3, 512),
    "train_size": st.integers(1, 10**9),
    "transfer_size": st.integers(0, 10**9),
    "student_init": st.sampled_from(STUDENT_INITS),
    "teacher_epochs": st.integers(0, 10**9),
    "teacher_train_size": st.integers(1, 10**9),
    "teacher_learning_rate": st.none() | above_0(10) | st.integers(1, 10),
    "precision": st.sampled_from(PRECISIONS),
    "device": st.sampled_from(DEVICES),
    "lean": st.booleans(),
    "seed": seeds,
}
DATA_ALONE = {"data": VALID["data"]}  # without it there may be no other files
choices = st.fixed_dictionaries(DATA_ALONE, optional={name: VALID[name] for name in VALID if name not in DATA_ALONE})


def test_valid_values_are_drawn_for_every_field():
    assert VALID.keys() == DistillConfig.__dataclass_fields__.keys()


@given(choices)
def test_a_configuration_comes_back_from_its_values(chosen):
    config = DistillConfig(**chosen)
    values = config.to_dict()
    assert values | {name: value for name, value in chosen.items() if value is not None} == values
    assert DistillConfig(**json.loads(json.dumps(values))) == config
    assert config.replace() == config
    assert config.replace(**values) == config
    assert DistillConfig().replace(**values) == config


@given(choices, st.sampled_from(sorted(VALID.keys() - {"preset", "teacher_learning_rate"})), st.data())
def test_replacing_changes_one_value_and_can_be_undone(chosen, name, draws):
    config = DistillConfig(**chosen)
    changed = config.replace(**{name: draws.draw(VALID[name])})
    assert {field for field in VALID if getattr(changed, field) != getattr(config, field)} <= {name}
    assert changed.replace(**{name: getattr(config, name)}) == config


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.integers(1, 100),
            "alpha": st.integers(0, 1),
            "learning_rate": st.integers(1, 10),
            "teacher_learning_rate": st.integers(1, 10),
            "warmup_ratio": st.just(0),
            "weight_decay": st.integers(0, 10),
            "max_grad_norm": st.integers(1, 10),
        },
    )
)
def test_whole_numbers_and_floats_share_a_fingerprint(chosen):
    prints = {
        artifacts.fingerprint(DistillConfig(**{name: kind(value) for name, value in chosen.items()}).to_dict())
        for kind in (int, float)
    }
    assert len(prints) == 1


NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


def above(most: int) -> st.SearchStrategy[int]:
    return st.just(most + 1) | st.integers(most + 1, 10**12)


def below(least: int) -> st.SearchStrategy[int]:
    return st.just(least - 1) | st.integers(-(10**12), least - 1)


def numbers_up_to_0() -> st.SearchStrategy[float]:
    return NOT_FINITE | st.just(0.0) | st.floats(-1e300, 0) | below(1)


def numbers_below_0() -> st.SearchStrategy[float]:
    return NOT_FINITE | st.floats(-1e300, 0, exclude_max=True) | below(0)


OUT_OF_RANGE: dict[str, st.SearchStrategy[Any]] = {
    "temperature": numbers_up_to_0(),
    "alpha": numbers_below_0() | st.floats(1, 1e300, exclude_min=True) | st.integers(2, 10**12),
    "learning_rate": numbers_up_to_0(),
    "teacher_learning_rate": numbers_up_to_0(),
    "max_grad_norm": numbers_up_to_0(),
    "weight_decay": numbers_below_0(),
    "warmup_ratio": numbers_below_0() | st.just(1.0) | st.floats(1, 1e300) | st.integers(1, 10**12),
    **dict.fromkeys(("epochs", "batch_size", "train_size", "teacher_train_size"), below(1)),
    **dict.fromkeys(("max_steps", "transfer_size", "teacher_epochs"), below(0)),
    "max_length": below(3) | above(512),
    "seed": below(0) | above(2**32 - 1),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
@given(draws=st.data())
@settings(max_examples=50)
def test_a_number_out_of_range_is_refused_by_name(name, draws):
    value = draws.draw(OUT_OF_RANGE[name])
    for refused in (lambda: DistillConfig(**{name: value}), lambda: DistillConfig().replace(**{name: value})):
        with pytest.raises(ValueError, match=r"give a (finite|whole) number") as caught:
            refused()
        sentence = str(caught.value)
        assert sentence.startswith(f"{name} is {value}; ")
        assert sentence.endswith(".")
        assert "\n" not in sentence


# Measures


@given(batches_of_logits(), st.data())
def test_measures_stay_within_their_bounds_and_ask_for_no_order(batch, draws):
    logits, _, labels = batch
    labels = labels.clamp(min=0)
    before = classification_metrics(logits, labels)
    assert all(0 <= before[name] <= 1 for name in ("accuracy", "macro_recall", "macro_f1"))
    assert 0 <= before["ece"] <= 1 + 1e-6
    assert before["nll"] >= 0
    rows = torch.tensor(draws.draw(st.permutations(range(len(labels)))))
    twice = torch.cat([rows, rows])  # each text as often as any other: no mean moves
    for order in (rows, twice):
        assert classification_metrics(logits[order], labels[order]) == pytest.approx(before, rel=1e-5, abs=1e-5)


@given(batches_of_logits())
def test_a_model_that_is_sure_and_right_has_no_error(batch):
    logits, _, labels = batch
    labels = labels.clamp(min=0)
    logits = 200.0 * F.one_hot(labels, logits.shape[1])
    perfect = {"accuracy": 1, "macro_recall": 1, "macro_f1": 1, "nll": 0, "ece": 0}
    assert classification_metrics(logits, labels) == pytest.approx(perfect, abs=1e-6)


# Artifacts

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
contents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=15
)


def reordered(value: Any, order: random.Random) -> Any:
    """The same content, the keys of every dictionary in another order."""
    if isinstance(value, list):
        return [reordered(item, order) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: reordered(value[key], order) for key in order.sample(sorted(value), len(value))}


@given(st.dictionaries(st.text(), contents, min_size=1, max_size=5), st.randoms(use_true_random=False), scalars)
def test_a_fingerprint_follows_every_value_but_no_order(provenance, order, other):
    assert artifacts.fingerprint(reordered(provenance, order)) == artifacts.fingerprint(provenance)
    key = order.choice(sorted(provenance))
    same = json.dumps(provenance[key]) == json.dumps(other)
    assert (artifacts.fingerprint(provenance | {key: other}) == artifacts.fingerprint(provenance)) == same


@given(contents, st.binary(max_size=200), st.binary(max_size=200))
@settings(max_examples=40)
def test_what_was_written_is_read(folder, content, old, new):
    place = folder / "written"
    artifacts.save_json(place / "a.json", content)
    assert artifacts.load_json(place / "a.json") == content
    for written in (old, new):
        artifacts.write_bytes(place / "a.bin", written)
        assert (place / "a.bin").read_bytes() == written
    assert {path.name for path in place.iterdir()} == {"a.json", "a.bin"}, "no temporary file stays"


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def truncate(content: bytes, place: int) -> bytes:
    return content[:place]


def random_bytes(size: int) -> st.SearchStrategy[bytes]:
    """So many: left to itself hypothesis draws few."""
    return st.binary(min_size=size, max_size=size)


files = st.dictionaries(
    st.sampled_from(["a.bin", "b.json", "student/c.bin"]), st.integers(1, 99).flatmap(random_bytes), min_size=1
)


@given(files, st.sampled_from([flip, truncate]), st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_no_damage_to_a_sealed_folder_stays_unseen(folder, files, damage: Callable[[bytes, int], bytes], draws):
    sealed = folder / "sealed"
    shutil.rmtree(sealed, ignore_errors=True)

    def build(target: Path) -> None:
        (target / "student").mkdir()
        for name, content in files.items():
            (target / name).write_bytes(content)

    artifacts.write_folder(sealed, build)
    assert artifacts.damaged(sealed) == []
    assert artifacts.is_intact(sealed)
    name = draws.draw(st.sampled_from([*files, artifacts.MANIFEST]))
    before = (sealed / name).read_bytes()
    after = damage(before, draws.draw(st.integers(0, len(before) - 1)))
    (sealed / name).write_bytes(after)
    if name != artifacts.MANIFEST:
        assert artifacts.damaged(sealed) == [name]
    else:  # white space between the seals means nothing
        assume(_parsed(after) != json.loads(before))
    assert not artifacts.is_intact(sealed)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
