"""Explorers: figures that answer to a slider, a menu or a typed sentence.

Each is a function that returns a widget, over a pure function that draws: values of the controls in, a figure and its
description in words out. A control that moves sets the picture of a `widgets.Image`. There is no `widgets.Output` and
no `interact`: papermill waits for ever on those, and neither works without a kernel.

A notebook stores no widget, so an explorer always stands beside a figure that shows the same.
"""

from __future__ import annotations

import functools
import html
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ipywidgets as widgets
import matplotlib.style
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers.course import plots
from kd_helpers.data import mask
from kd_helpers.experiments.comparison import ARMS
from kd_helpers.losses import IGNORE_INDEX, distillation_loss, soft_targets
from kd_helpers.methods.language_models import write_texts
from kd_helpers.methods.stories import score_story
from kd_helpers.models import model_inputs
from kd_helpers.runtime import evaluating

MOST_CLASSES = 10  # as many have room in a figure
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.5, 20.0

_LOOK = {
    **plots.STYLE,
    "figure.constrained_layout.w_pad": 0.1,  # inches: a white rim, which a dark page needs
    "figure.constrained_layout.h_pad": 0.1,
    "text.parse_math": False,  # a label's name may hold a dollar sign, which is no formula
}
_course_look = functools.partial(matplotlib.style.context, ["default", _LOOK])


# Temperature


def entropy(probabilities: torch.Tensor) -> float:
    """Entropy of one distribution `[C]` in nats: 0 when it is certain, log C when it is uniform."""
    return torch.special.entr(probabilities).sum().item()


@_course_look()
def temperature_figure(logits: torch.Tensor, temperature: float, label_names: Sequence[str]) -> tuple[Figure, str]:
    """The soft targets of one text as bars, with their entropy below.

    Args:
        logits: the teacher's, `[C]`. With more than ten classes the likeliest ten are drawn.
        temperature: T > 0.
        label_names: of the C classes.

    Returns:
        The figure, and its description in words.
    """
    probabilities, plain = soft_targets(logits, temperature), soft_targets(logits, 1.0)
    uncertainty, highest = entropy(probabilities), math.log(len(logits))
    rows = largest(probabilities)
    figure = Figure(figsize=(7, 1.9 + 0.34 * len(rows)))
    bars, below = figure.subplots(2, 1, height_ratios=[len(rows) + 0.6, 1.2])
    colour = plots.COLOURS["teacher"]
    bars.barh(range(len(rows)), probabilities[rows].tolist(), color=colour, height=0.65)
    for row, index in enumerate(rows):
        bars.plot([plain[index].item()] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2)
        bars.text(1.02, row, f"{probabilities[index]:.3f}", va="center")
    _name_rows(bars, [label_names[index] for index in rows])
    bars.set(xlim=(0, 1.14), xticks=[0, 0.25, 0.5, 0.75, 1])
    bars.set_title(f"Soft targets at T = {temperature:.3g} (black mark: at T = 1)")
    below.barh(0, uncertainty, color=plots.COLOURS["baseline"], height=0.65)
    below.axvline(highest, color="black", linestyle=":")
    below.text(uncertainty, 0, f"  {uncertainty:.3f}", va="center", bbox={"facecolor": "white", "edgecolor": "none"})
    _name_rows(below, ["entropy"])
    below.set(
        xlim=(0, 1.14 * highest), xticks=[0, highest], xticklabels=["0", f"log {len(logits)} = {highest:.3f} nats"]
    )
    described = ", ".join(f"{label_names[index]} {probabilities[index]:.1%}" for index in rows)
    most = _left_out(len(rows), len(logits), f"{1 - probabilities[rows].sum():.1%} of the probability")
    return figure, (
        f"At T = {temperature:.3g}: {described}.{most} Entropy {uncertainty:.3f} nats; "
        f"its maximum is log {len(logits)} = {highest:.3f}."
    )


def temperature_explorer(texts: Sequence[str], logits: torch.Tensor, label_names: Sequence[str]) -> widgets.VBox:
    """Choose a text, move the temperature, see the teacher's soft targets.

    Args:
        texts: N of them.
        logits: the teacher's for these texts, `[N, C]`.
        label_names: of the C classes.

    Raises:
        ValueError: there is no text, or texts, logits and names don't fit each other.
    """
    if len(texts) == 0:
        raise ValueError("there are no texts to choose from; give at least one, with its logits.")
    if logits.ndim != 2 or len(logits) != len(texts):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} for {len(texts)} texts; give one row of logits for each text."
        )
    _require_names(label_names, logits.shape[1])
    options = [(f"{number} · {_short(text, 70)}", number - 1) for number, text in enumerate(texts, start=1)]
    text = widgets.Dropdown(options=options, value=0, description="Text", layout={"width": "95%"})
    return _explorer(
        [text, _temperature_slider()],
        lambda row, temperature: temperature_figure(logits[row].detach().cpu(), temperature, label_names),
    )


# The loss


class LossParts(NamedTuple):
    """The loss of one example, and what each part of it does to the student's logits.

    Attributes:
        soft, hard, total: the losses; only `total` is weighted by alpha.
        soft_gradient, hard_gradient, total_gradient: `[C]`, of alpha · soft, (1 − alpha) · hard and their sum.
    """

    soft: float
    hard: float
    total: float
    soft_gradient: torch.Tensor
    hard_gradient: torch.Tensor
    total_gradient: torch.Tensor


def loss_parts(
    teacher_logits: torch.Tensor, student_logits: torch.Tensor, label: int, *, temperature: float, alpha: float
) -> LossParts:
    """Take `distillation_loss` apart, gradients by autograd.

    Args:
        teacher_logits: `[C]`.
        student_logits: `[C]`.
        label: 0 … C − 1, or −100 for none.
        temperature: T > 0.
        alpha: weight of the soft loss in [0, 1].

    Raises:
        ValueError: a value or shape does not fit; one sentence says which.
    """
    z, teacher = student_logits.detach().float().unsqueeze(0).requires_grad_(), teacher_logits.unsqueeze(0)
    values, gradients = [], []
    for weight in (1.0, 0.0, alpha):  # the soft loss alone, the hard loss alone, both
        total = distillation_loss(z, teacher, torch.tensor([label]), temperature=temperature, alpha=weight).total
        (gradient,) = torch.autograd.grad(total, z)
        values.append(total.item())
        gradients.append(gradient[0])
    return LossParts(*values, alpha * gradients[0], (1 - alpha) * gradients[1], gradients[2])


@_course_look()
def loss_figure(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    label: int,
    label_names: Sequence[str],
    *,
    temperature: float,
    alpha: float,
) -> tuple[Figure, str]:
    """Soft, hard and total loss of one example as bars; beside them the gradient of each on the student's logits.

    Args:
        teacher_logits, student_logits, label, temperature, alpha: as for `loss_parts`. With more than ten classes
            the logits with the ten longest gradients are drawn.
        label_names: of the C classes.

    Returns:
        The figure, and its description in words.
    """
    parts = loss_parts(teacher_logits, student_logits, label, temperature=temperature, alpha=alpha)
    soft, hard, total = (plots.COLOURS[name] for name in ("teacher", "baseline", "student"))
    longest, steepest = _reach(teacher_logits, student_logits, label, temperature)
    rows = largest(parts.total_gradient.abs())
    figure = Figure(figsize=(7, 3.8 + 0.5 * len(rows)))
    upper, lower = figure.subplots(2, 1, height_ratios=[1, 0.35 + 0.3 * len(rows)])

    weighted = (alpha * parts.soft, (1 - alpha) * parts.hard)
    names = [f"{alpha:.2f} · soft", f"{1 - alpha:.2f} · hard", "total"]
    for row, (full, weight, colour) in enumerate(zip(parts[:2], weighted, (soft, hard), strict=True)):
        upper.barh(row, full, height=0.6, facecolor="none", edgecolor=colour, linestyle="--")
        upper.barh(row, weight, height=0.6, color=colour)
        upper.text(max(full, weight), row, f"  {weight:.3f} of {full:.3f}", va="center")
    upper.barh(2, weighted[0], height=0.6, color=soft)
    upper.barh(2, weighted[1], left=weighted[0], height=0.6, color=hard)
    upper.text(parts.total, 2, f"  {parts.total:.3f}", va="center", weight="bold")
    _name_rows(upper, names)
    upper.set(xlim=(0, 1.75 * longest), xlabel="nats", title="Loss (dashed: before its weight)")

    gradients = {"soft part": (parts.soft_gradient, soft), "hard part": (parts.hard_gradient, hard)}
    gradients["total"] = (parts.total_gradient, total)
    for place, (name, (gradient, colour)) in enumerate(gradients.items()):
        heights = [row + 0.25 * (place - 1) for row in range(len(rows))]
        lower.barh(heights, gradient[rows].tolist(), height=0.22, color=colour, label=name)
    lower.axvline(0, color="black", linewidth=1)
    _name_rows(lower, [label_names[index] for index in rows])
    lower.set(xlim=(-1.1 * steepest, 1.1 * steepest), xlabel="gradient (− pushes a logit up, + down)")
    lower.set_title("What each part does to the student")
    figure.legend(*lower.get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)

    pushed = ", ".join(f"{label_names[index]} {parts.total_gradient[index]:+.3f}" for index in rows)
    named = "no label" if label == IGNORE_INDEX else f"label {label_names[label]}"
    return figure, (
        f"T = {temperature:.3g}, alpha = {alpha:.2f}, {named}: soft loss {parts.soft:.3f}, hard loss {parts.hard:.3f}, "
        f"total {parts.total:.3f} nats. Gradient of the total: {pushed}.{_left_out(len(rows), len(label_names))}"
    )


def _reach(
    teacher_logits: torch.Tensor, student_logits: torch.Tensor, label: int, temperature: float
) -> tuple[float, float]:
    """The largest loss and the largest gradient that the controls lead to: axes that stay show what moves."""
    tried = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, temperature]
    alone = [loss_parts(teacher_logits, student_logits, label, temperature=T, alpha=1.0) for T in tried]
    hard = loss_parts(teacher_logits, student_logits, label, temperature=temperature, alpha=0.0).hard_gradient
    gradients = torch.stack([hard, *(parts.soft_gradient for parts in alone)])
    return max(1e-3, *(max(parts.soft, parts.hard) for parts in alone)), max(1e-3, gradients.abs().max().item())


def loss_explorer(
    teacher_logits: torch.Tensor, student_logits: torch.Tensor, label: int, label_names: Sequence[str]
) -> widgets.VBox:
    """Move alpha and the temperature, see the parts of the loss and where each pushes the student's logits.

    Args:
        teacher_logits: of one example, `[C]`.
        student_logits: of the same example, `[C]`.
        label: 0 … C − 1, or −100 for none.
        label_names: of the C classes.

    Raises:
        ValueError: a shape, the label or the names don't fit; one sentence says which.
    """
    for whose, logits in (("teacher", teacher_logits), ("student", student_logits)):
        if logits.ndim != 1:
            raise ValueError(
                f"the {whose}'s logits have shape {tuple(logits.shape)}; give those of one example, one number a class."
            )
        _require_names(label_names, len(logits))
    alpha = widgets.FloatSlider(value=0.5, min=0, max=1, step=0.05, description="alpha")
    teacher, student = teacher_logits.detach().cpu(), student_logits.detach().cpu()
    return _explorer(
        [alpha, _temperature_slider()],
        lambda weight, temperature: loss_figure(
            teacher, student, label, label_names, temperature=temperature, alpha=weight
        ),
    )


# Predictions


def class_probabilities(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int
) -> dict[str, torch.Tensor]:
    """Each model's probabilities `[C]` for one text, dropout off; the models' modes are put back after."""
    batch = tokenizer(mask(text), truncation=True, max_length=max_length, return_tensors="pt")
    found = {}
    for name, model in models.items():
        with evaluating(model), torch.inference_mode():
            logits = model(**model_inputs(model, batch)).logits[0]
        found[name] = soft_targets(logits, 1.0).cpu()
    return found


@_course_look()
def predictions_figure(found: Mapping[str, torch.Tensor], label_names: Sequence[str]) -> tuple[Figure, str]:
    """The models' probabilities for one text, side by side.

    Args:
        found: probabilities `[C]` by the models' names; empty when there is no text. With more than ten classes those
            that the models together find likeliest are drawn.
        label_names: of the C classes.

    Returns:
        The figure, and its description in words.
    """
    if not found:
        figure, said = Figure(figsize=(7, 2.4)), "There is no text yet: type a sentence and press Enter."
        figure.text(0.5, 0.5, said, ha="center", va="center", fontsize=14)
        return figure, said
    rows = largest(torch.stack(list(found.values())).mean(dim=0))
    across = min(2, len(found))
    down = math.ceil(len(found) / across)
    figure = Figure(figsize=(7, down * (1.2 + 0.36 * len(rows))))
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for panel, (name, probabilities) in zip(panels, found.items(), strict=False):
        drawn = probabilities[rows].tolist()
        panel.barh(range(len(rows)), drawn, color=plots.COLOURS[name], height=0.65)
        for row, probability in enumerate(drawn):
            panel.text(probability, row, f" {probability:.2f}", va="center")
        panel.set(xlim=(0, 1.3), xticks=[0, 0.5, 1])
        panel.set_title("\n".join(textwrap.wrap(_title(name), 60 // across)))
        panel.grid(axis="y", visible=False)
    for unused in panels[len(found) :]:
        unused.set_visible(False)
    _name_rows(panels[0], [label_names[index] for index in rows])
    said = "; ".join(
        f"{_title(name)}: {label_names[int(probabilities.argmax())]} {probabilities.max():.1%}"
        for name, probabilities in found.items()
    )
    return figure, f"{said}.{_left_out(len(rows), len(label_names))}"


def predictions_explorer(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int = 128,
    start: str = "a sentence",
) -> widgets.VBox:
    """Type a sentence, see what each model makes of it.

    Args:
        models: by name; the names are keys of `plots.COLOURS`, such as "teacher" and "baseline".
        tokenizer: the one that belongs to all of them.
        label_names: of the C classes.
        max_length: tokens after which a text is cut.
        start: the sentence to begin with.

    Raises:
        ValueError: there is no model, one has a name without a colour, other classes than `label_names`, or fewer
            tokens than the tokenizer.
    """
    _require_models(models, tokenizer)
    for model in models.values():
        _require_names(label_names, model.config.num_labels)
    sentence = widgets.Text(
        value=start, placeholder="Type a sentence", description="Text", continuous_update=False, layout={"width": "95%"}
    )
    return _explorer(
        [sentence],
        lambda text: predictions_figure(
            class_probabilities(models, tokenizer, text, max_length=max_length) if text.strip() else {}, label_names
        ),
    )


# Stories


def stories_told(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    beginning: str,
    *,
    temperature: float,
    seed: int,
    new_tokens: int,
) -> dict[str, str]:
    """The same beginning, continued by each causal model with the same random numbers: whole texts by name."""
    prompt = tokenizer(beginning)["input_ids"][:-1]  # without the token that ends a text
    found = {}
    for name, model in models.items():
        (written,) = write_texts(
            model, [prompt], new_tokens=new_tokens, temperature=temperature, seed=seed, end_id=tokenizer.eos_token_id
        )
        found[name] = tokenizer.decode(written, skip_special_tokens=True)
    return found


@_course_look()
def stories_figure(told: Mapping[str, str], verdicts: Mapping[str, str]) -> tuple[Figure, str]:
    """The models' texts, one below the other.

    Args:
        told: texts by the models' names.
        verdicts: what is said of each text behind its model's name; may lack any.

    Returns:
        The figure, and its description in words: the texts.
    """
    lines = {name: textwrap.wrap(text, 62) or ["(nothing)"] for name, text in told.items()}
    rows = sum(len(wrapped) + 2 for wrapped in lines.values())
    figure = Figure(figsize=(7, 0.22 * rows + 0.1))
    top = 0.5
    for name, wrapped in lines.items():
        title = _heading(name, verdicts)
        figure.text(0.02, 1 - top / rows, title, va="center", fontsize=13, color=plots.COLOURS[name], weight="bold")
        for row, line in enumerate(wrapped, start=1):
            figure.text(0.02, 1 - (top + row) / rows, line, va="center", fontsize=12)
        top += len(wrapped) + 2
    return figure, " ".join(f"{_heading(name, verdicts)}: {text}" for name, text in told.items())


def _heading(name: str, verdicts: Mapping[str, str]) -> str:
    """A model's name and what is said of its text."""
    title = name.replace("_", " ").capitalize()
    return f"{title} ({verdicts[name]})" if verdicts.get(name) else title


def story_verdict(text: str) -> str:
    """What the parser of chapter 13 says of a text, in a few words."""
    score = score_story(text)
    if score.coherent:
        return "coherent"
    wrong = [name for name, right in score._asdict().items() if name not in ("grammar", "coherent") and not right]
    wrong = ["grammar"] * (score.grammar < 1) + wrong
    return f"wrong: {', '.join(wrong)}"


def story_explorer(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: str = "",
    new_tokens: int = 160,
    judge: Callable[[str], str] = story_verdict,
) -> widgets.VBox:
    """Type how a story begins, choose the temperature of the sampling, and see how each model goes on.

    Args:
        models: causal language models by name; the names are keys of `plots.COLOURS`.
        tokenizer: the one that belongs to all of them (see `methods.stories.story_tokenizer`).
        start: the beginning at first; empty lets the models begin.
        new_tokens: that each model writes, at most.
        judge: what to say of a text.

    Raises:
        ValueError: there is no model, one has a name without a colour or fewer tokens than the tokenizer.
    """
    _require_models(models, tokenizer)
    beginning = widgets.Text(
        value=start,
        placeholder="Type how the story begins",
        description="Beginning",
        continuous_update=False,
        layout={"width": "95%"},
    )
    heat = widgets.FloatSlider(value=1.0, min=0.0, max=2.0, step=0.1, description="T", continuous_update=False)
    number = widgets.IntSlider(value=0, min=0, max=19, description="Story", continuous_update=False)

    def draw(text: str, temperature: float, seed: int) -> tuple[Figure, str]:
        room = min(model.config.max_position_embeddings for model in models.values()) - new_tokens
        cut = tokenizer.decode(tokenizer(text.strip())["input_ids"][:room], skip_special_tokens=True)
        told = stories_told(models, tokenizer, cut, temperature=temperature, seed=seed, new_tokens=new_tokens)
        return stories_figure(told, {name: judge(text) for name, text in told.items()})

    return _explorer([beginning, heat, number], draw)


# A sweep


class Measure(NamedTuple):
    """How a metric is shown: its name, the number it is multiplied by, its format, and whether more is better."""

    title: str
    scale: float
    form: str
    higher_is_better: bool


MEASURES = {
    "accuracy": Measure("accuracy, %", 100, ".1f", True),
    "macro_recall": Measure("macro recall, %", 100, ".1f", True),
    "macro_f1": Measure("macro F1, %", 100, ".1f", True),
    "nll": Measure("NLL", 1, ".3f", False),
    "ece": Measure("ECE", 1, ".3f", False),
}
QUANTITIES = {
    "mean": "mean over the seeds",
    "half": "half width of its 95% interval",
    "gain": "mean gain over alpha 0, same seed",
    "gain_half": "half width, gain over alpha 0",
}
CHOOSE_ON = "validation_"  # settings are chosen on validation, so test is not offered


def sweep_cells(table: pd.DataFrame, metric: str, quantity: str) -> pd.DataFrame:
    """One number for each temperature (down) and alpha (across), in the metric's own unit.

    Args:
        table: of a sweep; runs without a result are left out.
        metric: one of its columns.
        quantity: a key of `QUANTITIES`.
    """
    from kd_helpers.experiments.sweep import surface  # it takes a second to import, and most chapters have no sweep

    finished = table.dropna(subset=[metric])
    if quantity in ("mean", "half"):
        return surface(finished, metric)[quantity == "half"]
    baseline = finished[finished["alpha"] == 0].drop_duplicates("seed").set_index("seed")[metric]
    gain = finished.assign(gain=finished[metric] - finished["seed"].map(baseline)).dropna(subset=["gain"])
    return surface(gain[gain["alpha"] > 0], "gain")[quantity == "gain_half"]


@_course_look()
def sweep_figure(table: pd.DataFrame, metric: str, quantity: str) -> tuple[Figure, str]:
    """A metric's map over temperature and alpha.

    Args:
        table, metric, quantity: as for `sweep_cells`; the metric is one of `MEASURES` on validation.

    Returns:
        The figure, and its description in words.
    """
    measure = MEASURES[metric.removeprefix(CHOOSE_ON)]
    cells = measure.scale * sweep_cells(table, metric, quantity)
    counts = table.dropna(subset=[metric]).groupby(["temperature", "alpha"])["seed"].nunique()
    fewest, most = counts.min(), counts.max()
    seeds = f"{most} seed{'s' if most > 1 else ''}" if fewest == most else f"{fewest} to {most} seeds"
    figure = Figure(figsize=(7, 1.9 + 0.55 * len(cells)))
    axis = figure.subplots()
    form = "+" + measure.form if quantity == "gain" else measure.form
    colours = "Greys" if "half" in quantity else "Blues" if measure.higher_is_better else "Blues_r"
    title = f"Validation {measure.title}: {QUANTITIES[quantity]} ({seeds})"
    if cells.isna().all(axis=None):
        axis.set_axis_off()
        said = "One seed has no interval: sweep at least two."
        axis.text(0.5, 0.5, said, ha="center", va="center", fontsize=14, transform=axis.transAxes)
        axis.set_title(title)
        return figure, f"{title}. {said}"
    plots.heat_map(axis, cells, title, colours=colours, form=form)
    axis.set(xlabel="alpha", ylabel="temperature")
    return figure, f"{title}. Smallest {_where(cells, cells.stack().idxmin(), form)}, largest " + _where(
        cells, cells.stack().idxmax(), form
    ) + ("; darker is less sure." if "half" in quantity else "; darker is better.")


def sweep_explorer(table: pd.DataFrame) -> widgets.VBox:
    """Choose a metric and what to see of it: its mean, how sure that is, or the gain over the baseline.

    Args:
        table: what `kd_helpers.experiments.sweep.collect` returns, or the stored sweep's runs.

    Raises:
        ValueError: columns are missing, or no run has a result. `surface` says what else can be wrong.
    """
    table = pd.DataFrame(table)
    if missing := [name for name in ("temperature", "alpha", "seed") if name not in table]:
        raise ValueError(
            f"the table has no column {missing[0]!r}; give the table of a sweep over temperature and alpha."
        )
    metrics = [CHOOSE_ON + name for name in MEASURES if table.get(CHOOSE_ON + name, pd.Series()).notna().any()]
    if not metrics:
        raise ValueError(
            f"no run has a result; give a table with a column such as {CHOOSE_ON}accuracy, of runs that have finished."
        )
    offered = QUANTITIES if _has_gain(table, metrics[0]) else dict(list(QUANTITIES.items())[:2])
    metric = widgets.Dropdown(
        options=[(MEASURES[name.removeprefix(CHOOSE_ON)].title, name) for name in metrics], description="Metric"
    )
    quantity = widgets.Dropdown(options=[(title, name) for name, title in offered.items()], description="Show")
    return _explorer([metric, quantity], functools.partial(sweep_figure, table))


def _has_gain(table: pd.DataFrame, metric: str) -> bool:
    """Whether some run can be held against one of alpha 0 with its seed."""
    finished = table.dropna(subset=[metric])
    return bool(finished[finished["alpha"] > 0]["seed"].isin(finished[finished["alpha"] == 0]["seed"]).any())


def _where(cells: pd.DataFrame, at: tuple[float, float], form: str) -> str:
    return f"{format(cells.loc[at], form)} at T = {at[0]:g}, alpha = {at[1]:g}"


# What they share


def largest(values: torch.Tensor, most: int = MOST_CLASSES) -> list[int]:
    """The classes to draw: all in their own order if there are few, else the `most` largest, largest first."""
    if len(values) <= most:
        return list(range(len(values)))
    return values.topk(most).indices.tolist()


def _explorer(controls: Sequence[widgets.Widget], draw: Callable[..., tuple[Figure, str]]) -> widgets.VBox:
    """Controls above a picture above its description; `draw` gets the controls' values."""
    picture, said = widgets.Image(format="png"), widgets.HTML()
    picture.layout.max_width = "100%"

    def redraw(_change: Any = None) -> None:
        figure, description = draw(*(control.value for control in controls))
        with _course_look():
            picture.value, picture.width = plots.png(figure)
        said.value = f'<div style="line-height: 1.4">{html.escape(description)}</div>'

    for control in controls:
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([*controls, picture, said])


def _temperature_slider() -> widgets.FloatLogSlider:
    """From 0.5 to 20 in even ratios, eight steps for each doubling, so that 1, 2, 4, 8 and 16 are among them."""
    return widgets.FloatLogSlider(
        value=2.0,
        base=2,
        min=math.log2(LOWEST_TEMPERATURE),
        max=math.log2(HIGHEST_TEMPERATURE),
        step=1 / 8,
        description="T",
        readout_format=".2f",
    )


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write the names of horizontal bars, the first on top."""
    axes.set_yticks(range(len(names)), [_short(name, 24) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _short(text: str, width: int) -> str:
    """A text on one line, cut at `width` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _title(name: str) -> str:
    """What a model is called in figures; an arm's title alone could be taken for its teacher."""
    if name in ARMS:
        return f"Student ({ARMS[name].title[0].lower()}{ARMS[name].title[1:]})"
    return name.capitalize()


def _left_out(shown: int, classes: int, rest: str = "") -> str:
    """A sentence that says that not every class is shown; empty if all are."""
    if shown == classes:
        return ""
    return f" Shown: {shown} of {classes} classes{f'; the others have {rest}' if rest else ''}."


def _require_models(models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    if not models:
        raise ValueError("there are no models to run; give at least one, by name.")
    for name, model in models.items():
        if name not in plots.COLOURS:
            raise ValueError(
                f"{name!r} has no colour in this course; name the model one of {', '.join(plots.COLOURS)}."
            )
        if len(tokenizer) > (known := model.get_input_embeddings().num_embeddings):
            raise ValueError(
                f"the tokenizer has {len(tokenizer):,} tokens, {name} knows {known:,}; give the models' own tokenizer."
            )


def _require_names(label_names: Sequence[str], classes: int) -> None:
    if classes < 2:
        raise ValueError(f"there is {classes} class; a classifier needs at least two.")
    if len(label_names) != classes:
        raise ValueError(f"{len(label_names)} label names for {classes} classes; give each class one name.")
