"""Does distillation pay on my texts? The command `verdict`, and the page that it writes: Markdown, HTML and figures."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kd_helpers import __version__, artifacts
from kd_helpers.config import PRESETS, DistillConfig, expanded, settings_help
from kd_helpers.course import plots
from kd_helpers.course.pages import TEMPLATES, Content, PageRenderer
from kd_helpers.data import OWN_SHARES, TEST_SIZE
from kd_helpers.experiments.judgement import CANNOT_TELL, DOES_NOT_PAY, MEASURES, PAYS, UNFINISHED
from kd_helpers.experiments.signals import BASELINE
from kd_helpers.experiments.verdict import TEACHER, verdict
from kd_helpers.experiments.verdict_plan import FALLS
from kd_helpers.experiments.verdict_runs import DISTILLED, EFFECT, UNIFORM
from kd_helpers.loop import DivergedError

ALL_LABELS = 10_000  # labelled texts that teacher and student take from a file, unless somebody says otherwise
FEW_VALIDATION = 200  # texts, with fewer of which choices are hardly worth the name
SPLITS_CUT = {"labelled": "teacher_train", "unlabelled": "transfer"}  # which a small budget may cut
UNITS = {"h": 3600, "m": 60, "s": 1}
WORDS = {"accuracy": "accuracy", "macro_recall": "macro recall"}
# What each answer says of each question, to be put together to a sentence.
SAID = {
    "baseline": {
        PAYS: "distillation **pays** against the same student without a teacher",
        DOES_NOT_PAY: "distillation **does not pay** against the same student without a teacher",
        CANNOT_TELL: "these texts **cannot tell** whether distillation pays against the same student without a teacher",
        UNFINISHED: "whether distillation pays against the same student without a teacher is **not judged**",
    },
    "teacher": {
        PAYS: "the student **is close enough** to its teacher",
        DOES_NOT_PAY: "the student **is not close enough** to its teacher",
        CANNOT_TELL: "these texts **cannot tell** whether the student is close enough to its teacher",
        UNFINISHED: "its distance to the teacher is **not judged**",
    },
    "rivals": {
        PAYS: "it **pays** against the cheap rivals",
        DOES_NOT_PAY: "it **does not pay** against the cheap rivals",
        CANNOT_TELL: "these texts **cannot tell** whether it pays against the cheap rivals",
        UNFINISHED: "its gain over the cheap rivals is **not judged**",
    },
}
ASKED = {
    "baseline": "Better than the same student without a teacher?",
    "teacher": "Close enough to the teacher?",
    "rivals": "Worth it against the cheap rivals?",
}
SETTINGS = ("temperature", "alpha")
COLOURS = {PAYS: "#007A59", DOES_NOT_PAY: "#B3261E", CANNOT_TELL: "#6B6B6B"}


# ---- Sentences


def points(share: float, *, signed: bool = True) -> str:
    """A difference in points of a measure, with a true minus sign; zero has no sign."""
    text = f"{100 * share:+.1f}" if signed else f"{100 * share:.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def interval(estimate: Mapping[str, Any]) -> str:
    """An estimate in points with its interval."""
    return f"{points(estimate['gain'])} points, {points(estimate['low'])} to {points(estimate['high'])}"


def answer_word(entry: Mapping[str, Any]) -> str:
    """The answer as it stands in tables and figures."""
    if entry["question"] == "teacher":
        return {PAYS: "close enough", DOES_NOT_PAY: "not close enough"}.get(entry["answer"], entry["answer"])
    return entry["answer"]


def of_question(result: Mapping[str, Any], question: str) -> dict[str, Any]:
    """The answer to one of the three questions; of the two parts of the first, the one that speaks most for it."""
    order = (PAYS, CANNOT_TELL, UNFINISHED, DOES_NOT_PAY)
    return min(
        (entry for entry in result["questions"] if entry["question"] == question),
        key=lambda entry: (order.index(entry["answer"]), -entry.get("estimate", {"gain": 0})["gain"]),
    )


def headline(result: Mapping[str, Any]) -> str:
    """The verdict in one sentence; in two where nothing is judged."""
    if all(entry["answer"] == UNFINISHED for entry in result["questions"]):
        return (
            "**Nothing is judged yet**: students were still improving when their training ended. The page says which, "
            "and what to do next."
        )
    said = []
    for question, words in SAID.items():
        entry = of_question(result, question)
        number = f" ({interval(entry['estimate'])})" if entry["answer"] in (PAYS, DOES_NOT_PAY) else ""
        said.append(words[entry["answer"]] + number)
    sentence = "; ".join(said)
    return sentence[0].upper() + sentence[1:] + "."


def row_of(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A candidate's title and its measures on test."""
    return next(row for row in result["table"] if row["name"] == name)


def title_of(result: Mapping[str, Any], name: str) -> str:
    """A candidate's title. The arm whose teacher knows nothing is named after its student, as the others are."""
    return "Student of a teacher that knows nothing" if name == UNIFORM else row_of(result, name)["title"]


def marked_title(result: Mapping[str, Any], name: str) -> str:
    """A candidate's title, marked where it is not finished."""
    return title_of(result, name) + (" (still improving)" if name in result["unfinished"] else "")


def budget_of(result: Mapping[str, Any]) -> str:
    """Twice the time that the plan took, as one gives it to `--budget`."""
    return f"{max(2, math.ceil(2 * result['plan']['seconds'] / 60))}m"


def answers_table(result: Mapping[str, Any]) -> str:
    """Question, answer and difference of each comparison, as Markdown."""
    rows = ["| question | compared | difference | answer |", "|:--|:--|--:|:--|"]
    for entry in result["questions"]:
        student, against = entry["student"], entry["against"]
        compared = "no distilled student was finished" if student is None else title_of(result, student)
        number = ""
        if "estimate" in entry:
            compared += f" − {marked_title(result, against)}"
            number = interval(entry["estimate"])
        elif student in result["unfinished"]:
            number = f"still improving; so far {row_of(result, student)[result['measure']]:.1%}"
        elif student is not None:
            number = "a rival was still improving"
        rows.append(f"| {ASKED[entry['question']]} | {compared} | {number} | **{answer_word(entry)}** |")
    return "\n".join(rows)


def split_size(result: Mapping[str, Any], split: str) -> int:
    """How many texts a split has."""
    return result["sizes"][split]["all"]


def next_steps(result: Mapping[str, Any]) -> list[str]:
    """What to do next, one sentence or two each; the most important first."""
    return [
        *_about_unfinished(result),
        *_about_few_texts(result),
        *_about_teacher(result),
        *_about_eight_bits(result),
        *_about_needed(result),
        *_about_settings(result),
        *_about_texts(result),
        *_about_classes(result),
    ]


def _about_unfinished(result: Mapping[str, Any]) -> list[str]:
    lengths = list(result["losses"])
    if not result["unfinished"]:
        return [
            f"**Steps.** {int(lengths[-1]):,} steps are enough: no kind of student was clearly better with them than "
            "with half as many."
        ]
    names = ", ".join(f"“{title_of(result, name)}”" for name in result["unfinished"])
    return [
        f"**More steps.** At {int(lengths[-1]):,} steps these were still improving over {int(lengths[-2]):,}: {names}. "
        f"Run the command again with a larger budget, for example {_larger_budget(result)}"
    ]


def _about_few_texts(result: Mapping[str, Any]) -> list[str]:
    said, kept, given = [], split_size(result, "teacher_train"), result["before"]["labelled"]
    if kept < given:
        said.append(
            f"**All labels.** The budget allowed only {kept:,} of {given:,} labelled texts, so the answers hold for so "
            "many. A larger budget uses more."
        )
    validation = split_size(result, "validation")
    if validation < FEW_VALIDATION:
        said.append(
            f"**More validation texts.** There are only {validation:,}, by which learning rates, moments and students "
            "were chosen, so these choices are little better than chance."
        )
    return said


def _larger_budget(result: Mapping[str, Any]) -> str:
    """How to go on with more time. Where texts were cut, a larger budget alone would buy whole texts, not steps."""
    config, before = result["config"], result["before"]
    options = f"`--budget {budget_of(result)}`"
    if config["max_length"] < before["max_length"]:
        return f"{options} with `--max-length {config['max_length']}`, so that the time is spent on steps."
    texts_cut = any(split_size(result, split) < before[name] for name, split in SPLITS_CUT.items())
    if texts_cut or config["teacher_epochs"] < before["teacher_epochs"]:
        return f"{options}."
    return f"{options}; what is trained already is used again."


def _about_teacher(result: Mapping[str, Any]) -> list[str]:
    reference = result["choices"]["reference"] or BASELINE
    teacher, student = (row_of(result, name)[result["measure"]] for name in (TEACHER, reference))
    if teacher > student:
        return []
    return [
        f"**A better teacher first.** The teacher has {teacher:.1%} on test, and the student without a teacher "
        f"{student:.1%}: such a teacher has little to give. Try a larger one (`--teacher-checkpoint`), or more labels."
    ]


def _about_eight_bits(result: Mapping[str, Any]) -> list[str]:
    small = {row["model"]: row for row in result["costs"] if row["way"] == "int8" and "accuracy" in row}
    if small.keys() != {"teacher", "student"}:
        return []
    described = {
        name: f"{row['accuracy']:.1%}, {row['megabytes']:.1f} MB, {row['latency_p50_ms']:.1f} ms for one text"
        for name, row in small.items()
    }
    return [
        "**Compare with the teacher in eight bits**, which takes no student at all. The teacher with weights of eight "
        f"bits: {described['teacher']}. The distilled student in the same form: {described['student']}."
    ]


def _about_needed(result: Mapping[str, Any]) -> list[str]:
    said = []
    for entry in result["questions"]:
        if entry["answer"] != CANNOT_TELL:
            continue
        seeds, texts = entry["needed"]["seeds"], entry["needed"]["texts"]
        ways = []
        if seeds:
            ways.append(f"about {seeds} seeds (a larger budget)")
        if texts and (texts > TEST_SIZE or result["config"]["test_data"]):
            ways.append(f"about {_rounded(texts):,} test texts in a file of their own (`--test-data`)")
        elif texts:
            share = OWN_SHARES["test"][0]
            ways.append(f"about {_rounded(texts):,} test texts ({_rounded(texts / share):,} labelled texts in all)")
        compared = f"{title_of(result, entry['student'])} against {title_of(result, entry['against'])}"
        remedy = " or ".join(ways) if ways else "neither more seeds nor a million test texts"
        said.append(f"**To be able to tell** ({compared}): {remedy} would do, if the difference stays what it is.")
    return said


def _rounded(number: float) -> int:
    """Two digits of a whole number, since no more of them mean anything."""
    return int(float(f"{number:.1e}"))


def _about_settings(result: Mapping[str, Any]) -> list[str]:
    tried, config = result["tries"]["settings"], result["config"]
    if not tried:
        return []
    best = max(tried, key=lambda one: one["gain"])
    changed = [name for name in SETTINGS if best[name] != config[name]]
    setting = " and ".join(f"{name} {best[name]:g}" for name in changed)
    options = " ".join(f"`--{name} {best[name]:g}`" for name in changed)
    names = " and ".join(name for name in SETTINGS if any(one[name] != config[name] for one in tried))
    usual = ", ".join(f"{name} {config[name]:g}" for name in SETTINGS)
    one_seed = f"with one seed on {split_size(result, 'validation'):,} validation texts"
    said = f"**Settings.** We tried other values of {names}, one at a time, {one_seed}. "
    if best["low"] > 0:
        better = f"{setting[0].upper() + setting[1:]} was better than the usual ({usual}): {interval(best)}."
        return [f"{said}{better} Try it with {options}."]
    return [
        said + f"None was shown to be better than the usual ({usual}). The best was {setting} ({interval(best)}); to "
        f"look closer, give {options}."
    ]


def rates_used(result: Mapping[str, Any]) -> str:
    """Which learning rates were tried, and which kind of student got which."""
    tried = [f"{factor * result['config']['learning_rate']:g}" for factor in result["plan"]["rates"]]
    if len(tried) == 1:
        return f"Learning rate {tried[0]}."
    used = "; ".join(f"{title_of(result, arm)}: {rate:g}" for arm, rate in result["rates"].items())
    return f"Learning rates {' and '.join(tried)} were tried; by the loss on validation, these were used. {used}."


def _about_texts(result: Mapping[str, Any]) -> list[str]:
    curve = result["tries"]["curve"]
    if split_size(result, "transfer") == 0:
        return [
            "**Texts without labels.** You gave none. They are often what helps most: add them as rows with an empty "
            "label, and ask again."
        ]
    if len(curve) < 2:
        return []
    before, last = curve[-2], curve[-1]
    return [
        f"**More texts without labels.** From {before['texts']:,} to {last['texts']:,} of them, the measure on "
        f"validation went from {before['score']:.1%} to {last['score']:.1%} (one seed). "
        + ("More may help further." if last["score"] > before["score"] else "More of them did not help here.")
    ]


def _about_classes(result: Mapping[str, Any]) -> list[str]:
    worse = [row for row in result["by_class"] if row["high"] < 0]
    return [
        f"**Look at the class {_cell(row['class'])}.** On its {row['texts']:,} test texts the student is worse than "
        f"the student without a teacher: {interval(row)}."
        for row in worse
    ]


# ---- Tables


def models_table(result: Mapping[str, Any]) -> str:
    """Every model's measures on test, as Markdown."""
    forms = dict.fromkeys(("accuracy", "macro_recall", "macro_f1"), ".1%") | {
        "nll": ".3f",
        "ece": ".1%",
        "fidelity": ".1%",
    }
    heads = ("", "seeds", "accuracy", "macro recall", "macro F1", "NLL", "ECE", "agrees with the teacher")
    rows = [f"| {' | '.join(heads)} |", "|:--" + "|--:" * (len(heads) - 1) + "|"]
    for row in sorted(result["table"], key=lambda row: -row[result["measure"]]):
        cells = [format(row[name], form) if name in row else "" for name, form in forms.items()]
        rows.append(f"| {marked_title(result, row['name'])} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def classes_table(result: Mapping[str, Any]) -> str:
    """Right answers within each class, as Markdown."""
    rows = ["| class | test texts | without a teacher | distilled | difference |", "|:--|--:|--:|--:|--:|"]
    for row in result["by_class"]:
        shares = f"{row['reference']:.1%} | {row['student']:.1%}"
        rows.append(f"| {_cell(row['class'])} | {row['texts']:,} | {shares} | {interval(row)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """A text in a cell of a table."""
    return re.sub(r"([|*_`<>\[\]\\])", r"\\\1", " ".join(text.split()))


def costs_table(result: Mapping[str, Any]) -> str:
    """Size, latency and throughput, as Markdown."""
    rows = ["| model | computed by | MB | one text, median | texts a second | accuracy |", "|:--|:--|--:|--:|--:|--:|"]
    measured = {"teacher": TEACHER, "student": of_question(result, "teacher")["student"] or DISTILLED}
    for row in result["costs"]:
        if "refused" in row:
            rows.append(f"| {row['model']} | eight bits | | | | {_cell(row['refused'])} |")
            continue
        way = "eight bits" if row["way"] == "int8" else "torch"
        accuracy = row.get("accuracy", row_of(result, measured[row["model"]])["accuracy"])
        rows.append(
            f"| {row['model']} | {way} | {row['megabytes']:.1f} | {row['latency_p50_ms']:.1f} ms | "
            f"{row['texts_per_second']:,.0f} | {accuracy:.1%} |"
        )
    return "\n".join(rows)


def break_even(result: Mapping[str, Any]) -> str:
    """After how many texts the training is paid back by the time that the student saves."""
    by_model = {row["model"]: row for row in result["costs"] if row["way"] == "torch"}
    saved = 1 / by_model["teacher"]["texts_per_second"] - 1 / by_model["student"]["texts_per_second"]
    seconds = result["seconds"]
    training = sum(seconds.values())
    taken = f"Training a student took about {_minutes(seconds['student'])}."
    if "teacher" in seconds:
        taken += f" By the plan, the teacher and its logits take {_minutes(seconds['teacher'])}."
    if saved <= 0:
        return f"{taken} The student is not faster than its teacher here, so this time is never paid back."
    return (
        f"{taken} In batches, the student's speed makes up for that after about {_rounded(training / saved):,} texts."
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


# ---- Figures


def differences_figure(result: Mapping[str, Any]) -> tuple[Figure, str]:
    """Every comparison's difference and interval, with the band in which a difference does not matter.

    Returns:
        The figure, and its description for those who can't see it.
    """
    entries = [entry for entry in result["questions"] if "estimate" in entry]
    figure, axis = plt.subplots(figsize=(9, 0.75 * len(entries) + 1.3))
    effect = 100 * result["effect"]
    axis.axvspan(-effect, effect, color="#EFEFEF")
    axis.axvline(0, color="#999999", linewidth=1)
    described = []
    for row, entry in enumerate(entries):
        gain, low, high = (100 * entry["estimate"][name] for name in ("gain", "low", "high"))
        colour = COLOURS[entry["answer"]]
        axis.plot([low, high], [row, row], color=colour, linewidth=4, alpha=0.4)
        axis.plot(gain, row, "o", color=colour, markersize=8)
        axis.text(1.02, row, answer_word(entry), color=colour, va="center", transform=axis.get_yaxis_transform())
        described.append(f"{ASKED[entry['question']]} {interval(entry['estimate'])}: {answer_word(entry)}")
    names = [f"{title_of(result, e['student'])}\nminus {title_of(result, e['against']).lower()}" for e in entries]
    axis.set_yticks(range(len(entries)), names)
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.set_xlabel(f"points of {WORDS[result['measure']]}; grey: too small to matter")
    return figure, "; ".join(described) + "."


def losses_figure(result: Mapping[str, Any]) -> tuple[Figure, str]:
    """Each arm's validation loss against the number of steps, as a share of that at the fewest.

    Returns:
        The figure, and its description for those who can't see it.
    """
    lengths = [int(length) for length in result["losses"]]
    table = {arm: [losses[arm] for losses in result["losses"].values()] for arm in result["losses"][str(lengths[0])]}
    shares = {arm: [100 * value / values[0] for value in values] for arm, values in table.items()}
    figure, axis = plt.subplots(figsize=(9, 3.8))
    for arm, offset in label_offsets({arm: values[-1] for arm, values in shares.items()}, height=200).items():
        look = "label_smoothing" if arm == UNIFORM else arm
        colour = plots.COLOURS[look]
        axis.plot(lengths, shares[arm], marker="o", color=colour, linestyle=plots.LINESTYLES[look])
        plots.label_line_end(axis, title_of(result, arm), colour=colour, dy=offset)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set(xlabel="steps", ylabel="validation loss, % of its first value")
    described = "; ".join(
        f"{title_of(result, arm)} from {values[0]:.3f} to {values[-1]:.3f}" for arm, values in table.items()
    )
    return figure, f"Validation loss from {lengths[0]:,} to {lengths[-1]:,} steps: {described}."


def label_offsets(ends: Mapping[str, float], *, height: float, gap: float = 15) -> dict[str, float]:
    """How far to move the labels of lines up, in points, so that none covers another; the lowest stays.

    Args:
        ends: where each line ends.
        height: points between the lowest and the highest of them, about.
        gap: points between two labels, at least.
    """
    lowest, span = min(ends.values()), max(np.ptp(list(ends.values())), 1e-9)
    offsets, place = {}, -math.inf
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        wanted = (end - lowest) / span * height
        place = max(wanted, place + gap)
        offsets[name] = place - wanted
    return offsets


# ---- The page


def markdown(result: Mapping[str, Any], source: str, figures: Mapping[str, str]) -> str:
    """The page as Markdown.

    Args:
        result: what `verdict` returns.
        source: of the texts, for people.
        figures: file name and description of "differences" (missing where nothing was judged) and "losses".
    """
    config = result["config"]
    reference = result["choices"]["reference"]
    text = TEMPLATES.get_template("verdict.md.j2").render(
        result=result,
        source=source,
        headline=headline(result).replace("**", ""),
        measure=WORDS[result["measure"]],
        effect=points(result["effect"], signed=False),
        answers=answers_table(result),
        pictures={name: f"![{alt}]({name}.png)" for name, alt in figures.items()},
        sizes=result["sizes"],
        steps=next_steps(result),
        models=models_table(result),
        falls=f"{FALLS:.0%}",
        rates=rates_used(result),
        reference=reference and title_of(result, reference),
        classes=classes_table(result),
        costs=costs_table(result),
        break_even=break_even(result),
        teacher=_cell(Path(config["teacher_checkpoint"]).name or PRESETS[config["preset"]].teacher),
        notes=[_cell(note) for note in result["notes"]],
    )
    return re.sub(r"\n{3,}", "\n\n", text).lstrip()


def write_page(result: Mapping[str, Any], source: str, out: Path) -> None:
    """Write `verdict.json`, `verdict.md`, `verdict.html` and the figures into a folder."""
    draw = {"losses": losses_figure}
    if any("estimate" in entry for entry in result["questions"]):
        draw["differences"] = differences_figure
    figures = {}
    with plt.rc_context(plots.STYLE):
        for name, figure_of in draw.items():
            figure, figures[name] = figure_of(result)
            artifacts.write_bytes(out / f"{name}.png", plots.png(figure)[0])
            plt.close(figure)
    text = markdown(result, source, figures)
    renderer = PageRenderer(str(out.resolve()))
    body = renderer.render(text)
    page = TEMPLATES.get_template("verdict.html.j2").render(
        content=Content(renderer.sections, body), title=f"Does distillation pay on {source}?", version=__version__
    )
    artifacts.save_json(out / "verdict.json", result)
    artifacts.write_text(out / "verdict.md", text)
    artifacts.write_text(out / "verdict.html", page)


# ---- The command


def seconds_of(text: str) -> float:
    """A time such as "30m", "1h30m" or "90s", in seconds.

    Raises:
        ValueError: it is no such time, or no time at all.
    """
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    seconds = 0
    if parts and any(parts.groups()):
        seconds = sum(int(number or 0) * unit for number, unit in zip(parts.groups(), UNITS.values(), strict=True))
    if seconds == 0:
        raise ValueError(f"the budget is {text!r}; give a time such as 30m, 1h30m or 90s.")
    return float(seconds)


OPTIONS = (
    *("text_column", "label_column", "validation_data", "test_data", "transfer_size"),
    *("preset", "teacher_checkpoint", "teacher_epochs", "student_checkpoint"),
    *("temperature", "alpha", "learning_rate", "batch_size", "max_length"),
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [data] [options]",
        description="Ask whether distillation pays on your texts: a plan within a time budget, students with and "
        "without a teacher over several seeds, cheap rivals beside them, and one page with the answer. The same "
        "command continues an interrupted verdict.",
        epilog=f"Example: {prog} reviews.csv --text-column review --label-column stars --budget 30m. Rows with an "
        "empty label are texts without labels. Without a file, it takes the preset's tweets.",
    )
    parser.add_argument("data", nargs="?", default="", help=settings_help()["data"])
    parser.add_argument("--budget", default="30m", help="the time that it may take, about: 30m (the default), 1h, 5m")
    parser.add_argument("--out", type=Path, help="folder of the page; artifacts/verdicts/NAME if left out")
    parser.add_argument(
        "--labels", type=int, help="labelled texts of teacher and student; the others of the file are left out"
    )
    parser.add_argument("--effect", type=float, default=100 * EFFECT, help="the difference that matters, in points (1)")
    parser.add_argument("--measure", choices=MEASURES, default=MEASURES[0], help="what is compared")
    explanations = settings_help()
    for name in OPTIONS:
        default = DistillConfig.__dataclass_fields__[name].default
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=explanations[name].replace("%", "%%"))
    return parser


def ask_for_page(
    config: DistillConfig, budget: str, out: Path, *, effect: float = EFFECT, measure: str = MEASURES[0]
) -> str:
    """Ask for a verdict, say its plan, and write its page into a folder.

    Args:
        config: see `verdict`.
        budget: the time that it may take, such as "30m".
        out: the folder.
        effect, measure: see `verdict`.

    Returns:
        The verdict in one sentence and the table of its answers, as Markdown.

    Raises:
        ValueError: the budget is no time, the folder is a file or has the page of another question, or see `verdict`.
    """
    seconds = seconds_of(budget)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder for the page.")
    source = Path(config.data).name if config.data else PRESETS[config.preset].data
    _require_same_question(out, config, measure)

    def report(plan: str) -> None:
        print(f"The plan for {source}\n{plan}\n", flush=True)

    result = verdict(config, budget=seconds, effect=effect, measure=measure, report=report)
    write_page(result, source, out)
    return f"{headline(result)}\n\n{answers_table(result)}"


# What a question is about, beside its measure; a budget may cut the rest.
_QUESTION = (
    *("preset", "data", "validation_data", "test_data", "text_column", "label_column"),
    *("teacher_checkpoint", "student_checkpoint"),
)


def _require_same_question(out: Path, config: DistillConfig, measure: str) -> None:
    """Refuse to write over the page of another question, such as that of another file with the same name."""
    if not (out / "verdict.json").exists():
        return
    stored = artifacts.load_json(out / "verdict.json")
    asked = {name: getattr(config, name) for name in _QUESTION} | {"measure": measure}
    if differ := artifacts.differences(stored["config"] | {"measure": stored["measure"]}, asked):
        raise ValueError(f"{out} holds the page of another verdict, with {', '.join(differ)}; choose another --out.")


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers verdict") -> int:
    """Ask for a verdict and write its page.

    Returns:
        Exit status: 0. A request that can't be met exits with 2.
    """
    parser, started = _parser(prog), time.monotonic()
    chosen = parser.parse_args(arguments)
    try:
        sizes = {}
        if chosen.labels is not None or chosen.data:
            labels = ALL_LABELS if chosen.labels is None else chosen.labels
            sizes = dict.fromkeys(("train_size", "teacher_train_size"), labels)
        config = DistillConfig(data=chosen.data, **sizes, **{name: getattr(chosen, name) for name in OPTIONS})
        name = Path(config.data or config.preset).stem
        out = Path(expanded(chosen.out or artifacts.artifacts_dir() / "verdicts" / name, "--out"))
        answers = ask_for_page(config, chosen.budget, out, effect=chosen.effect / 100, measure=chosen.measure)
    except (OSError, TypeError, ValueError, DivergedError, MemoryError) as error:
        parser.error(str(error))
    print(f"\n{answers.partition('|')[0].replace('**', '').strip()}\n\nThe page: {out / 'verdict.html'}")
    print(f"This call took {_minutes(time.monotonic() - started)}.")
    return 0
