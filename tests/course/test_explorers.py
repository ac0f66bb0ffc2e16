"""The explorers without a kernel, and in a notebook as papermill and nbval run it."""

from __future__ import annotations

import math
import subprocess
import sys

import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from support.explorer_notebook import explorer_notebook
from support.models import tiny_bert, tiny_distilbert
from support.processes import path_with_tests

from kd_helpers import losses
from kd_helpers.course import explorers, plots
from kd_helpers.course.notebooks import WIDGET, without_bars
from kd_helpers.experiments import sweep
from kd_helpers.methods.language_models import CausalShape, make_causal_model, write_texts
from kd_helpers.methods.stories import story_tokenizer, write_stories

NAMES = ("negative", "neutral", "positive")
TEACHER = torch.tensor([-1.5, 0.5, 2.0])
STUDENT = torch.tensor([0.3, -0.2, 0.1])
PNG = b"\x89PNG"


def names(classes: int) -> list[str]:
    return [f"class {index}" for index in range(classes)]


def logits(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def controls(explorer: widgets.VBox) -> list[widgets.Widget]:
    return list(explorer.children[:-2])


def shown(explorer: widgets.VBox) -> tuple[bytes, str]:
    """The picture and the words below it."""
    picture, said = explorer.children[-2:]
    assert isinstance(picture, widgets.Image)
    png = bytes(picture.value)
    assert png.startswith(PNG)
    assert 500 <= int(picture.width) <= 600, "as wide as seven inches: its text is readable on a phone, too"
    return png, said.value


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(sweep.stored_sweep()["runs"])


@pytest.fixture
def models():
    chosen = {"teacher": tiny_bert(dropout=0.5), "baseline": tiny_distilbert(), "tuned_teacher": tiny_bert(1, seed=1)}
    for model in chosen.values():
        model.classifier.weight.data *= 50  # fresh heads would say almost the same of every text
    return chosen


def writers():
    """Two small language models with random weights."""
    shape = CausalShape(512, width=32, depth=1, heads=2, positions=64)
    found = {"teacher": make_causal_model(shape, seed=0), "baseline": make_causal_model(shape, seed=1)}
    for model in found.values():
        model.lm_head.weight.data *= 20  # or every token would be as likely as any other
    return found


@pytest.fixture
def all_explorers(table, models, tokenizer) -> dict[str, widgets.VBox]:
    plt.close("all")  # what other tests have left
    return {
        "temperature": explorers.temperature_explorer(["good", "bad"], logits(2, 3), NAMES),
        "loss": explorers.loss_explorer(TEACHER, STUDENT, 1, NAMES),
        "predictions": explorers.predictions_explorer(models, tokenizer, NAMES, start="what a day"),
        "sweep": explorers.sweep_explorer(table),
        "stories": explorers.story_explorer(writers(), story_tokenizer(), start="Tim was", new_tokens=12),
    }


OTHER_VALUES = {
    "temperature": (1, 8.0),
    "loss": (0.9, 8.0),
    "predictions": ("what a terrible day",),
    "sweep": ("validation_nll", "gain"),
    "stories": ("Once there was a girl", 0.0, 3),
}


@pytest.mark.parametrize(
    ("name", "control"), [(name, control) for name, values in OTHER_VALUES.items() for control in range(len(values))]
)
def test_every_control_changes_picture_and_words(all_explorers, name, control):
    explorer = all_explorers[name]
    before = shown(explorer)
    moved = controls(explorer)[control]
    first, moved.value = moved.value, OTHER_VALUES[name][control]
    picture, said = shown(explorer)
    assert picture != before[0]
    assert said != before[1]
    moved.value = first
    assert shown(explorer) == before


def test_nothing_is_left_behind(all_explorers):
    """No pyplot figure, no Output widget, and whatever style the reader has set stays set."""
    assert plt.get_fignums() == []

    def below(widget):
        return [widget, *(child for own in getattr(widget, "children", ()) for child in below(own))]

    assert not [w for explorer in all_explorers.values() for w in below(explorer) if isinstance(w, widgets.Output)]


def test_the_look_does_not_depend_on_the_callers_style():
    usual = plots.png(explorers.temperature_figure(TEACHER, 2.0, NAMES)[0])
    own = {"font.size": 5, "figure.facecolor": "black", "text.color": "red", "axes.grid": False}
    with matplotlib.rc_context(own):
        before = dict(matplotlib.rcParams)
        figure, _ = explorers.temperature_figure(TEACHER, 2.0, NAMES)
        explorer = explorers.temperature_explorer(["good"], TEACHER.unsqueeze(0), NAMES)
        assert dict(matplotlib.rcParams) == before
    assert plots.png(figure) == usual
    assert shown(explorer)[0] == usual[0]
    assert figure.get_facecolor() == (1, 1, 1, 1)
    texts = [label for axis in figure.axes for label in (*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels())]
    assert min(text.get_fontsize() for text in texts) >= 12


def test_dollar_signs_and_markup_are_text():
    figure, _ = explorers.temperature_figure(TEACHER, 2.0, ["$x", "a$b$", "<b>"])
    assert plots.png(figure)[0].startswith(PNG)
    assert not any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())
    explorer = explorers.temperature_explorer(["good"], TEACHER.unsqueeze(0), ["a", "b", "<b>"])
    assert "&lt;b&gt;" in shown(explorer)[1]


# Temperature


@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_temperature_figure_shows_the_soft_targets(classes, temperature):
    figure, said = explorers.temperature_figure(logits(classes), temperature, names(classes))
    expected = losses.soft_targets(logits(classes), temperature)
    bars, below = figure.axes
    drawn = torch.tensor([bar.get_width() for bar in bars.patches], dtype=torch.float32)
    if classes > 10:
        expected = expected.sort(descending=True).values[:10]
        assert "Shown: 10 of 100 classes; the others have" in said
    torch.testing.assert_close(drawn, expected)
    (entropy,) = (bar.get_width() for bar in below.patches)
    whole = losses.soft_targets(logits(classes), temperature).double()
    assert entropy == pytest.approx(-(whole * whole.log()).sum().item(), abs=1e-5)
    assert f"its maximum is log {classes} = {math.log(classes):.3f}" in said


def test_entropy_of_extremes():
    assert explorers.entropy(torch.tensor([1.0, 0.0, 0.0])) == 0
    assert explorers.entropy(torch.full((4,), 0.25)) == pytest.approx(math.log(4))


def test_long_texts_are_shortened_and_told_apart():
    texts = ["many words " * 30, "many words " * 30]
    text, slider = controls(explorers.temperature_explorer(texts, logits(2, 3), NAMES))
    assert [len(label) < 80 for label, _ in text.options] == [True, True]
    assert len({label for label, _ in text.options}) == 2
    assert 2**slider.min == pytest.approx(0.5)
    assert 2**slider.max == pytest.approx(20)


# The loss


@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("label", [1, -100])
def test_loss_parts_are_those_of_the_losses(classes, alpha, label):
    teacher, student, temperature = *logits(2, classes), 2.0
    parts = explorers.loss_parts(teacher, student, label, temperature=temperature, alpha=alpha)
    z, labels = student.unsqueeze(0).requires_grad_(), torch.tensor([label])
    soft, hard = losses.soft_loss(z, teacher.unsqueeze(0), temperature), losses.hard_loss(z, labels)
    total = losses.distillation_loss(z, teacher.unsqueeze(0), labels, temperature=temperature, alpha=alpha).total
    assert parts[:3] == pytest.approx((soft.item(), hard.item(), total.item()))
    for gradient, loss in zip(parts[3:], (alpha * soft, (1 - alpha) * hard, total), strict=True):
        (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
        torch.testing.assert_close(gradient, expected[0])
    torch.testing.assert_close(parts.soft_gradient + parts.hard_gradient, parts.total_gradient)


def test_loss_figure_draws_these_numbers():
    figure, said = explorers.loss_figure(TEACHER, STUDENT, 1, NAMES, temperature=2.0, alpha=0.3)
    parts = explorers.loss_parts(TEACHER, STUDENT, 1, temperature=2.0, alpha=0.3)
    left, right = figure.axes
    widths = [bar.get_width() for bar in left.patches]
    weighted = [0.3 * parts.soft, 0.7 * parts.hard]
    assert widths == pytest.approx([parts.soft, weighted[0], parts.hard, weighted[1], *weighted])
    assert [bar.get_width() for bar in right.patches] == pytest.approx(torch.cat(parts[3:]).tolist())
    assert f"total {parts.total:.3f} nats" in said
    assert "label neutral" in said


def test_axes_of_the_loss_stay_while_the_controls_move():
    settings = [(0.5, 0.0), (2.0, 0.5), (20.0, 1.0)]
    figures = [explorers.loss_figure(TEACHER, STUDENT, 1, NAMES, temperature=T, alpha=a)[0] for T, a in settings]
    assert len({tuple(axis.get_xlim() for axis in figure.axes) for figure in figures}) == 1


def test_loss_of_a_hundred_classes_without_label():
    figure, said = explorers.loss_figure(logits(100), -logits(100), -100, names(100), temperature=2.0, alpha=0.5)
    assert len(figure.axes[1].patches) == 30
    assert "no label" in said
    assert said.endswith("Shown: 10 of 100 classes.")


# Predictions


def test_answers_are_the_models_own_and_modes_are_put_back(models, tokenizer):
    models["teacher"].train()
    models["baseline"].eval()
    first, again = (explorers.class_probabilities(models, tokenizer, "what a day", max_length=16) for _ in range(2))
    assert models["teacher"].training
    assert not models["baseline"].training
    for name, model in models.items():
        torch.testing.assert_close(first[name], again[name])  # so dropout was off
        inputs = tokenizer("what a day", return_tensors="pt")
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = model.eval()(**inputs).logits[0].softmax(dim=-1)
        torch.testing.assert_close(first[name], expected)


def test_a_mode_is_put_back_after_an_error_too(models, tokenizer):
    model = models["teacher"].train()
    with pytest.raises(RuntimeError):  # 512 positions, a text of more
        explorers.class_probabilities({"teacher": model}, tokenizer, "day " * 600, max_length=600)
    assert model.training


def test_long_texts_are_cut(models, tokenizer):
    long, cut = ("day " * times for times in (600, 6))
    first, second = (
        explorers.class_probabilities(models, tokenizer, text, max_length=8)["teacher"] for text in (long, cut)
    )
    torch.testing.assert_close(first, second)


def test_mentions_are_masked_as_in_the_data(models, tokenizer):
    first, second = (
        explorers.class_probabilities(models, tokenizer, text, max_length=32)["teacher"]
        for text in ("hi @Someone", "hi @user")
    )
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("empty", ["", "   ", "\n"])
def test_no_text_is_no_crash(models, tokenizer, empty):
    explorer = explorers.predictions_explorer(models, tokenizer, NAMES, start=empty)
    assert "There is no text yet" in shown(explorer)[1]
    controls(explorer)[0].value = "a sentence"
    assert "Student (baseline: labels only): " in shown(explorer)[1]
    controls(explorer)[0].value = empty
    assert "There is no text yet" in shown(explorer)[1]


@pytest.mark.parametrize("text", ["😀", "$5 & <b>", "\x00", "你好"])
def test_any_text_gets_an_answer(models, tokenizer, text):
    assert "Teacher: " in shown(explorers.predictions_explorer(models, tokenizer, NAMES, start=text))[1]


@pytest.mark.parametrize("classes", [2, 100])
def test_predictions_of_few_and_many_classes(classes, tokenizer):
    explorer = explorers.predictions_explorer(
        {"teacher": tiny_bert(classes=classes)}, tokenizer, names(classes), start="x"
    )
    assert ("Shown: 10 of 100 classes." in shown(explorer)[1]) == (classes == 100)


def test_predictions_figure_draws_every_model():
    found = {name: losses.soft_targets(logits(3), 1.0 + index) for index, name in enumerate(plots.COLOURS)}
    figure, _ = explorers.predictions_figure(found, NAMES)
    drawn = [axis for axis in figure.axes if axis.get_visible()]  # with an odd number of models one panel is empty
    for axis, (name, probabilities) in zip(drawn, found.items(), strict=True):
        assert [bar.get_width() for bar in axis.patches] == pytest.approx(probabilities.tolist())
        assert {matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axis.patches} == {plots.COLOURS[name]}


# Stories

WHOLE = next(write_stories(0))


def test_stories_begin_as_they_were_asked_to():
    models, tokenizer = writers(), story_tokenizer()
    chosen = {"temperature": 1.0, "seed": 0, "new_tokens": 9}
    told = explorers.stories_told(models, tokenizer, "Tim was a boy", **chosen)
    assert list(told) == ["teacher", "baseline"]
    assert all(text.startswith("Tim was a boy") and text != "Tim was a boy" for text in told.values())
    prompt = tokenizer("Tim was a boy")["input_ids"][:-1]
    (expected,) = write_texts(models["teacher"], [prompt], new_tokens=9, seed=0, end_id=tokenizer.eos_token_id)
    assert told["teacher"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert explorers.stories_told(models, tokenizer, "Tim was a boy", **chosen) == told
    assert explorers.stories_told(models, tokenizer, "Tim was a boy", **{**chosen, "seed": 1}) != told


@pytest.mark.parametrize("text", ["", "   ", "😀", "$5 & <b>", "\x00", "你好", "word " * 300])
def test_a_story_can_begin_with_anything(text):
    explorer = explorers.story_explorer(writers(), story_tokenizer(), start=text, new_tokens=8)
    assert "Teacher (wrong: " in shown(explorer)[1]


def test_story_verdicts():
    assert explorers.story_verdict(WHOLE) == "coherent"
    hero = WHOLE.split()[0]
    (other,) = [name for name in ("Zoe", "Leo", "Ruby") if name not in WHOLE][:1]
    last = WHOLE.rfind(hero)
    assert explorers.story_verdict(f"{WHOLE[:last]}{other}{WHOLE[last + len(hero) :]}") == "wrong: names"
    assert explorers.story_verdict("Tim is is.").startswith("wrong: grammar, ")


def test_stories_figure_shows_every_text_whole():
    told = {"teacher": WHOLE, "baseline": "Tim was sad."}
    figure, said = explorers.stories_figure(told, {"teacher": "coherent"})
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "Teacher (coherent)"
    assert " ".join(texts[1:-2]) == WHOLE
    assert texts[-2:] == ["Baseline", "Tim was sad."]
    assert said == f"Teacher (coherent): {WHOLE} Baseline: Tim was sad."
    places = [text.get_position()[1] for text in figure.texts]
    assert places == sorted(places, reverse=True)
    assert 0 < min(places) < max(places) < 1


# A sweep


@pytest.mark.parametrize("metric", ["validation_accuracy", "validation_nll"])
def test_sweep_cells(table, metric):
    mean, half = sweep.surface(table, metric)
    pd.testing.assert_frame_equal(explorers.sweep_cells(table, metric, "mean"), mean)
    pd.testing.assert_frame_equal(explorers.sweep_cells(table, metric, "half"), half)
    gain = explorers.sweep_cells(table, metric, "gain")
    expected = mean.drop(columns=0.0) - mean.loc[1.0, 0.0]  # every seed has every setting, so means may be subtracted
    pd.testing.assert_frame_equal(gain, expected)
    assert (explorers.sweep_cells(table, metric, "gain_half") > 0).all(axis=None)


def test_sweep_words_name_seeds_and_extremes(table):
    _, said = explorers.sweep_figure(table, "validation_nll", "mean")
    mean, _ = sweep.surface(table, "validation_nll")
    temperature, alpha = mean.stack().idxmin()
    assert "(3 seeds)" in said
    assert f"Smallest {mean.min(axis=None):.3f} at T = {temperature:g}, alpha = {alpha:g}" in said
    _, said = explorers.sweep_figure(table.drop(index=table.index[-1]), "validation_nll", "mean")
    assert "(2 to 3 seeds)" in said


def test_sweep_offers_what_the_table_can_show(table):
    metric, quantity = controls(explorers.sweep_explorer(table))
    assert all(value.startswith("validation_") for _, value in metric.options)
    assert len(quantity.options) == 4
    _, quantity = controls(explorers.sweep_explorer(table[table["alpha"] > 0]))
    assert [value for _, value in quantity.options] == ["mean", "half"]


def test_runs_without_a_result_are_left_out(table):
    unfinished = table.copy()
    unfinished.loc[(table["temperature"] == 8) & (table["seed"] > 0), "validation_accuracy"] = None
    cells = explorers.sweep_cells(unfinished, "validation_accuracy", "half")
    assert cells.loc[8.0].isna().all()
    assert cells.loc[1.0].notna().all()
    explorer = explorers.sweep_explorer(unfinished)
    controls(explorer)[1].value = "half"
    assert "(1 to 3 seeds)" in shown(explorer)[1]


def test_one_seed_has_no_interval(table):
    explorer = explorers.sweep_explorer(table[table["seed"] == 0])
    controls(explorer)[1].value = "half"
    assert "One seed has no interval" in shown(explorer)[1]


# What can't be shown


def temperature_of(texts, logits, names):
    return lambda: explorers.temperature_explorer(texts, logits, names)


def loss_of(teacher, student, label, names):
    return lambda: explorers.loss_explorer(teacher, student, label, names)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (temperature_of([], torch.zeros(0, 3), NAMES), "there are no texts to choose from"),
        (temperature_of(["a"], torch.zeros(2, 3), NAMES), r"logits have shape \(2, 3\) for 1 texts"),
        (temperature_of(["a"], torch.zeros(3), NAMES), r"logits have shape \(3,\) for 1 texts"),
        (temperature_of(["a"], torch.zeros(1, 2), NAMES), "3 label names for 2 classes"),
        (temperature_of(["a"], torch.zeros(1, 1), ["one"]), "there is 1 class"),
        (loss_of(torch.zeros(1, 3), STUDENT, 1, NAMES), r"the teacher's logits have shape \(1, 3\)"),
        (loss_of(TEACHER, torch.zeros(2), 1, NAMES), "3 label names for 2 classes"),
        (loss_of(TEACHER, STUDENT, 3, NAMES), "label 3 is out of range; labels run from 0 to 2"),
    ],
)
def test_logits_that_do_not_fit_are_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build()


@pytest.mark.parametrize(
    ("chosen", "label_names", "said"),
    [
        ({}, NAMES, "there are no models"),
        ({"bert": tiny_bert()}, NAMES, "'bert' has no colour in this course; name the model one of teacher, student"),
        ({"teacher": tiny_bert()}, NAMES[:2], "2 label names for 3 classes"),
    ],
)
def test_models_that_do_not_fit_are_refused(tokenizer, chosen, label_names, said):
    with pytest.raises(ValueError, match=said):
        explorers.predictions_explorer(chosen, tokenizer, label_names)


def test_writers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="there are no models"):
        explorers.story_explorer({}, story_tokenizer())
    small = make_causal_model(CausalShape(300, width=32, depth=1, heads=2), seed=0)
    with pytest.raises(ValueError, match="the tokenizer has 512 tokens, teacher knows 300"):
        explorers.story_explorer({"teacher": small}, story_tokenizer())


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    small = tiny_bert()
    small.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="the tokenizer has 30,522 tokens, teacher knows 100"):
        explorers.predictions_explorer({"teacher": small}, tokenizer, NAMES)


def test_tables_that_do_not_fit_are_refused(table):
    with pytest.raises(ValueError, match="the table has no column 'alpha'"):
        explorers.sweep_explorer(table.drop(columns="alpha"))
    with pytest.raises(ValueError, match="no run has a result"):
        explorers.sweep_explorer(table[["temperature", "alpha", "seed"]])
    with pytest.raises(ValueError, match="another parameter varies"):
        explorers.sweep_explorer(pd.concat([table, table]))


# In a notebook


def run(*arguments: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def in_kernels(monkeypatch):
    """Kernels find the tests' own models."""
    for name, value in path_with_tests().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("in_kernels")
def test_papermill_runs_explorers_to_the_end(tmp_path):
    nbformat.write(explorer_notebook(), tmp_path / "explorers.ipynb")
    done = run("papermill", "--no-progress-bar", "explorers.ipynb", "out.ipynb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [cell.outputs for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells]
    assert [sum(WIDGET in output.get("data", {}) for output in cell) for cell in outputs] == [0, 1, 1, 1, 1, 1]
    assert not [output for cell in outputs for output in cell if output.output_type in ("error", "stream")]


@pytest.mark.longer  # in `make test`, the chapters that have explorers show that the tag suffices
@pytest.mark.usefixtures("in_kernels")
@pytest.mark.parametrize("tagged", [True, False])
def test_nbval_compares_a_notebook_that_stores_no_widgets(tmp_path, tagged):
    """Without the tag nbval misses the widget's `text/plain`, so the tag is needed."""
    notebook = explorer_notebook()
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    without_bars(notebook)
    assert not any(cell.outputs for cell in notebook.cells)
    if not tagged:
        notebook.cells[1].metadata.tags = []
    nbformat.write(notebook, tmp_path / "explorers.ipynb")
    done = run("pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "explorers.ipynb", cwd=tmp_path)
    assert (done.returncode == 0) == tagged, done.stdout[-2000:]
    assert f"{6 if tagged else 5} passed" in done.stdout
