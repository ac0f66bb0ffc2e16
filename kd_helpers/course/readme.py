"""Tables and figures of the README and of docs/, from what is stored: the chapters, the comparison, the benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from kd_helpers.course import notebooks, plots
from kd_helpers.course.blocks import write_block
from kd_helpers.course.costs import stored_costs
from kd_helpers.course.notebooks import notebook_paths, question, title
from kd_helpers.course.numbers import number
from kd_helpers.course.verdict_page import points
from kd_helpers.experiments import benchmark, comparison, conformance, settings, token_speed, verdict_study
from kd_helpers.experiments.origin import origin
from kd_helpers.experiments.signals import BASELINE
from kd_helpers.experiments.study import titles
from kd_helpers.experiments.text_sets import SETS, TWEETS
from kd_helpers.experiments.verdict_runs import DISTILLED, TRANSFER

RESULTS_FIGURE = "kd_helpers/experiments/results/comparison.png"
BENCHMARK_FIGURE = "kd_helpers/experiments/results/benchmark.png"
BINDER_MEGABYTES = 2 * 2**30 / 1e6

# Arms of the comparison, and what each is compared with.
PAIRS: tuple[tuple[str, str], ...] = (
    *((arm, comparison.BASELINE) for arm in comparison.ARMS if arm != comparison.BASELINE and "redrawn" not in arm),
    *((f"redrawn_{arm}", "redrawn_baseline") for arm in ("tuned_teacher", "transfer_set")),
    *(("tuned_teacher", over) for over in ("best_epoch", "own_labels", "hard_labels", "more_labels")),
    *(("transfer_set", over) for over in ("transfer_own_labels", "transfer_hard_labels", "more_labels")),
    ("transfer_set", "tuned_teacher"),
    ("transfer_own_labels", "own_labels"),
)

# The modules that each chapter explains, by the chapter's number.
MODULES: dict[str, tuple[str, ...]] = {
    "00": ("config",),
    "01": ("data", "own_data", "hub"),
    "02": ("models", "teacher"),
    "03": ("losses",),
    "04": ("optim",),
    "05": ("loop", "lean", "checkpoints", "metrics", "runs"),
    "06": ("experiments.comparison", "experiments.verdict"),
    "07": ("experiments.sweep", "experiments.patience"),
    "08": ("export", "cascade", "experiments.serving", "methods.quantisation_aware"),
    "10": ("methods.digits", "experiments.study"),
    "11": ("methods.hidden_losses", "methods.distilbert"),
    "12": ("methods.tinybert", "methods.augmentation"),
    "13": ("methods.language_models", "methods.stories"),
    "14": ("methods.rationales", "methods.reasoning_tasks"),
    "15": ("methods.relations", "methods.responses", "methods.peers", "methods.quantised", "methods.data_free"),
    "16": ("trainer", "train", "shards"),
}


def readme_notebooks() -> str:
    """The README's table of chapters and their questions."""
    rows = [f"| [{title(path)}](notebooks/{path.name}) | {question(path)} |" for path in notebook_paths()]
    return "\n".join(["| chapter | question |", "|---|---|", *rows])


def chapters_table() -> str:
    """The table of chapters for contributors: modules, and what each chapter cost when it was stored."""
    costs, rows = stored_costs(), []
    for path in notebook_paths():
        cost = costs.get(path.stem)
        spent = f"{_duration(cost['seconds'])} | {cost['peak_megabytes']:,.0f}" if cost else " | "
        modules = ", ".join(f"`{name}`" for name in MODULES[path.name[:2]])
        rows.append(f"| [{title(path)}](../notebooks/{path.name}) | {modules} | {spent} |")
    header = ["| chapter | modules | time | MB |", "|---|---|---|---|"]
    return "\n".join([*header, *rows, *_about_costs(costs)])


def _about_costs(costs: dict[str, Any]) -> list[str]:
    """What a reader must know about the costs in the table: what was measured, and on what machine."""
    if not costs:
        return []
    made = [cost["made_with"] for cost in costs.values()]
    dates = sorted({one["date"] for one in made})
    machines = sorted({f"torch {one['torch']}, threads: {one['threads']}" for one in made})
    lines = [
        "Time is that of one execution, MB the most memory that its processes held at once "
        f"({'; '.join([*machines, ' to '.join(dict.fromkeys((dates[0], dates[-1])))])}). "
        f"Binder gives {BINDER_MEGABYTES:,.0f} MB, of which JupyterLab itself takes some.",
    ]
    if makers := [name[:2] for name, cost in costs.items() if cost["teachers_made"]]:
        lines.append(
            f"The time of {' and '.join(makers)} includes the fine-tuning of a teacher; the others found theirs. "
            "(Chapter 02 always trains a small one of its own. The first chapter that you run fine-tunes the course's "
            "teacher, which takes two to eight minutes more.)"
        )
    return ["", *lines]


def _duration(seconds: float) -> str:
    """Seconds in words that stay on one line; in minutes from a hundred on."""
    return f"{seconds:.0f}&nbsp;s" if seconds < 100 else f"{seconds / 60:.1f}&nbsp;min"


def readme_results() -> str:
    """What the README says about the results."""
    stored = comparison.stored_comparison()
    config = stored["choices"]["config"]
    all_labels = config["teacher_train_size"]
    hidden = all_labels - config["train_size"]

    smaller, faster = (number(f"costs: student / teacher, {of}") for of in ("parameters", "texts_per_second"))
    return f"""\
Every row of the figure is a student, named after what it is trained with. It has half of its teacher's layers and \
{smaller} times the parameters, and on our processor it reads {faster} times as many texts per second. Every student \
has {config["train_size"]:,} labelled tweets (*{titles(stored)["more_labels"]}*: {all_labels:,}), the tuned teacher \
{all_labels:,}, which include those. After \
{config["max_steps"]:,} optimiser steps, the student of a fine-tuned teacher is **{_gain("tuned_teacher")}** more \
accurate than the same student trained on the labels alone (95% interval over {len(stored["seeds"])} seeds: \
{_interval("tuned_teacher")}), and **{_gain("transfer_set")}** more accurate when it also learns the teacher's \
outputs for {config["transfer_size"]:,} other tweets without their labels, the *transfer set* (the teacher was \
trained on {hidden:,} of them, with labels).

Four checks test this gain. Unless we say otherwise, each number is the gain over the student of the labels alone. The \
same cause can count in several of them, so do not add them up. (Differences are computed before rounding.)

- *Labels.* A teacher that was trained on the student's labels alone gives {_with_interval("own_labels")}. With it, \
the transfer set is not shown to add accuracy: {_with_interval("transfer_own_labels", "own_labels")}. Four times the \
labels, without a teacher, give {_with_interval("more_labels")}.
- *Soft targets.* Softening the labels without a teacher (label smoothing) gives \
{_with_interval("label_smoothing")}, a teacher that was not fine-tuned {_with_interval("untuned_teacher")}. The \
tuned teacher's probabilities give {_with_interval("tuned_teacher", "hard_labels")} more than its most probable \
classes alone. With the transfer set, this difference is {_with_interval("transfer_set", "transfer_hard_labels")}.
- *Stopping earlier.* Without a teacher, the student is {_with_interval("best_epoch")} better after its best epoch \
(chosen on validation) than after its last step.
- *Other labels.* If each repetition draws other labelled tweets from the teacher's {all_labels:,}, the gain is \
{_with_interval("redrawn_tuned_teacher", "redrawn_baseline")}, with the transfer set \
{_with_interval("redrawn_transfer_set", "redrawn_baseline")}.

In each of the {len(stored["seeds"])} repetitions, all students have the same first weights and are trained for the \
same number of steps. [All results](docs/results.md)."""


def results_tables() -> str:
    """The full tables of results: every arm, and the differences between arms, from the stored comparison."""
    stored = comparison.stored_comparison()
    config, teacher = stored["choices"]["config"], stored["teachers"]["tuned"]
    table = [
        "| student trained with | accuracy | NLL | ECE | fidelity |",
        "|---|---|---|---|---|",
        *(
            f"| {arm} | {row['accuracy']:.1%} ± {row['accuracy ±']:.1%} | {row['nll']:.2f} | {row['ece']:.3f} "
            f"| {row['fidelity']:.1%} |"
            for arm, row in comparison.summary(stored).iterrows()
        ),
        f"| *the tuned teacher itself* | {teacher['accuracy']:.1%} | {teacher['nll']:.2f} | {teacher['ece']:.3f} | |",
    ]
    hidden = config["teacher_train_size"] - config["train_size"]
    learned, recipe = f"{config['train_size']:,}", comparison.ARMS["tuned_teacher"].recipe
    terms = {
        "Best epoch": "the baseline, measured after the epoch with the best accuracy on validation.",
        "Label smoothing": "every label mixed with equal probabilities, without a teacher.",
        "Untuned teacher": "its classification head is random.",
        "Teacher of the same labels": f"fine-tuned on the student's {learned} labels alone.",
        "Tuned teacher": f"fine-tuned on {config['teacher_train_size']:,} labelled tweets, the student's {learned} "
        f"and {hidden:,} others. These others are in the transfer set, too, but there without their labels.",
        "Hard labels": "the teacher's most probable class gets probability 1. Learned at this T, such targets make the "
        "student's logits too large, so NLL and ECE of these students say little.",
        "Transfer set": f"{config['transfer_size']:,} tweets without labels.",
        "Labels redrawn": "each seed has other labelled tweets, so the intervals cover this choice, too.",
    }
    notes = [
        f"Test split, mean of {len(stored['seeds'])} seeds ± half a 95% interval. Every student is trained for "
        f"{config['max_steps']:,} steps and has {learned} labelled tweets, or "
        f"{comparison.ARMS['more_labels'].recipe.labels} times as many where the table says so. All teachers are used "
        f"with T = {recipe.temperature:g} and alpha = {recipe.alpha:g}.",
        "",
        *(f"- *{term}*: {meaning}" for term, meaning in terms.items()),
        "",
        origin(stored),
    ]
    return "\n".join([*table, "", *notes, "", *_differences()])


def _differences() -> list[str]:
    """The table of differences between two arms of the comparison."""
    arms = titles(comparison.stored_comparison())
    return [
        "## Differences",
        "",
        "The accuracy of one student minus that of another. Differences are computed seed by seed and before rounding, "
        "and the 95% interval covers the seeds. If an interval contains 0, no difference is shown.",
        "",
        "| student trained with | minus student trained with | difference | 95% interval |",
        "|---|---|--:|---|",
        *(f"| {arms[arm]} | {arms[over]} | {_gain(arm, over)} | {_interval(arm, over)} |" for arm, over in PAIRS),
    ]


def _gain(arm: str, over: str = comparison.BASELINE) -> str:
    return number(f"comparison: {arm} - {over}, accuracy")


def _interval(arm: str, over: str = comparison.BASELINE) -> str:
    return number(f"comparison: {arm} - {over}, accuracy, interval")


def _with_interval(arm: str, over: str = comparison.BASELINE) -> str:
    return f"{_gain(arm, over)} ({_interval(arm, over)})"


def benchmark_tables() -> str:
    """The tables of speed, from the stored benchmark."""
    stored = benchmark.stored_benchmark()
    made, config, seconds = stored["made_with"], stored["config"], stored["compile"]
    table, rounds = benchmark.ways_table(stored), len({row["round"] for row in stored["ways"]})
    difference, low, high = benchmark.accuracy_gap(stored, "distillation", "usual loop")
    ways = [
        f"| {way} | {row['seconds']:.1f} | {row['times']:.2f} | {row['tokens_per_second']:,.0f} | "
        f"{row['peak_megabytes']:,.0f} | {row['accuracy']:.1%} | {row['nll']:.3f} |"
        for way, row in table.iterrows()
    ]
    goals = [
        f"| {name} | {row['measured']:.2f} | {row['target']} | {'yes' if row['met'] else 'no'} |"
        for name, row in benchmark.targets(stored).iterrows()
    ]
    profile = ", ".join(f"{kind} {share:.0%}" for kind, share in stored["profile"].items())
    step = stored["step"][made["precision"]]
    return "\n".join(
        [
            "| way | seconds | times as long | tokens/s | MB | accuracy | NLL |",
            "|---|---|---|---|---|---|---|",
            *ways,
            "",
            *(f"- *{way}*: {says}." for way, says in benchmark.DESCRIPTIONS.items()),
            "",
            f"{config['train_size']:,} tweets, {config['epochs']} epochs, batches of {config['batch_size']}. Seconds, "
            f"tokens a second (without padding) and MB are medians of {rounds} rounds, each with a seed of its own. MB "
            "is the most memory that was held above what was held before a way began, so the two models are not in it.",
            "*Times as long*: in each round, the time of a way is divided by that of *distillation*. The table has the "
            "median of these ratios, so it can differ from the ratio of the seconds shown. Accuracy and NLL are means "
            f"on validation. Accuracy of *distillation* minus *usual loop*: {100 * difference:+.1f} points (95% "
            f"interval {100 * low:+.1f} to {100 * high:+.1f}, {rounds} seeds). The two differ in several things at "
            "once, also in the settings of the optimiser, so the number does not say which of them matters.",
            "",
            "In the next table, the 12 settings are pairs of temperature and alpha: the teacher runs once for all of "
            "them. A row with ÷ is a ratio of two times. The peak is the speed of the fastest large matrix product on "
            "this machine. The last two rows are the time that one run needs for loading, tokenizing and saving, and "
            "the time from the first import to the first training step.",
            "",
            "| aim | measured | target | met |",
            "|---|---|---|---|",
            *goals,
            "",
            f"- A step of {step['batch_size']} tweets takes {step['milliseconds']:.0f} ms and reaches "
            f"{step['gigaflops']:,.0f} GFLOP/s; the fastest large matrix product {step['peak_gigaflops']:,.0f}.",
            f"- Where the time of a step goes: {profile}.",
            *_about_runs(stored),
            f"- One training with `torch.compile` takes {seconds['compiled_first']:.0f} s the first time, which "
            f"includes the compilation, and {seconds['compiled_again']:.1f} s the second time. Without "
            f"`torch.compile` it takes {seconds['uncompiled']:.1f} s. So the course does not use it. (One run each, "
            "apart from the rounds.)",
            "",
            f"{origin(stored)} Machine: {made['processor']}, {made['threads']} threads, {made['precision']}.",
        ]
    )


def _about_runs(stored: dict[str, Any]) -> list[str]:
    """What evaluations and runs take beside training steps."""
    evaluation, run, start = stored["evaluation"], stored["run"], stored["start"]
    return [
        f"- Evaluating {evaluation['texts']:,} tweets takes {evaluation['seconds']:.1f} s; forward passes alone, in "
        f"the fastest batches (of {evaluation['batch_size']}), take {evaluation['forward_seconds']:.1f} s.",
        f"- One complete call of `distill`, with the teacher's logits already stored, took {run['seconds']:.1f} s: "
        f"{run['steps']:.1f} s for training steps, {run['evaluations']:.1f} s for evaluations on validation and test, "
        f"and {run['outside']:.1f} s for everything else. This is one run; the first table has the median of several, "
        "and counts the training alone.",
        f"- A fresh process makes its first step after {start['first_step']:.1f} s, most of which is loading PyTorch, "
        "transformers and datasets.",
    ]


def token_losses() -> str:
    """The table of token losses against those of other toolkits, from the stored comparison."""
    stored = conformance.stored_conformance()
    sizes = " and ".join(
        f"{texts * tokens:,} (vocabulary {vocabulary:,})" for texts, tokens, vocabulary in token_speed.SHAPES
    )
    return "\n".join(
        [
            conformance.as_markdown(conformance.speed_table(stored)),
            "",
            f"Time for the loss and its gradient on {sizes} tokens. A quarter of the tokens is left out of the loss, "
            f"as padding would be. Times are medians of {token_speed.ROUNDS} rounds, in which the toolkit's loss and "
            "ours ran one after the other; *toolkit ÷ ours* is the median of their ratios, which need not be the ratio "
            "of the two medians. MB is the most memory that is needed besides the logits. Our loss was measured again "
            f"for each row, so compare numbers within one row only. {origin(stored)}",
        ]
    )


def verdicts() -> str:
    """How often verdicts were right, from the stored study."""
    stored = verdict_study.stored_verdicts()
    table = verdict_study.shares(stored)
    ignorant, finished, tuned = (table.loc[name] for name in ("ignorant", "ignorant, finished", "tuned"))
    case = verdict_study.ARMS["tuned"].recipe
    return "\n".join(
        [
            f"**How often is the verdict right in clear cases?** We ran {len(stored['runs'])} short verdicts, with "
            f"students of one layer and at most {case.lengths[-1]} steps: {len(stored['seeds'])} draws of texts for "
            "each of three teachers, two that know nothing and one that is known to help. Small gains were not tried.",
            "",
            "- *Teachers that know nothing*: a classification layer with random weights, or training on labels in "
            f"random order. {ignorant['pays']:.0f} of {ignorant['verdicts']:.0f} verdicts said *pays*, with a 95% "
            f"interval from {ignorant['low']:.0%} to {ignorant['high']:.0%}. Of the {finished['verdicts']:.0f} in "
            "which every student was finished, "
            f"{finished['pays']:.0f} did ({finished['low']:.0%} to {finished['high']:.0%}).",
            f"- *The course's teacher*, which learned {verdict_study.TEACHER_LABELS:,} labels of its tweets, the "
            f"student's {case.labels:,} among them. {tuned['pays']:.0f} of {tuned['verdicts']:.0f} verdicts said "
            f"*pays*: {tuned['share']:.0%}, with a 95% interval from {tuned['low']:.0%} to {tuned['high']:.0%}.",
            "",
            origin(stored),
        ]
    )


# What each kind of student learns from, in words, above its table.
SETTING_KINDS = {
    BASELINE: "Labels only",
    DISTILLED: "Distilled, with the same labels",
    TRANSFER: "Distilled, with texts without labels as well",
}


def _over_labels(stored: Mapping[str, Any]) -> pd.DataFrame:
    """The accuracy of distilled students minus that of students with labels only, in the same number of steps."""
    rows = []
    for kind in (DISTILLED, TRANSFER):
        for change, steps in ((settings.CENTRE, "500 steps"), ("1,000 steps", "1,000 steps")):
            row = {"": f"{SETTING_KINDS[kind]}, {steps}"}
            for texts in settings.TEXTS:
                found = settings.gain(stored, texts, kind, change, (BASELINE, change))
                row[texts] = f"{points(found.gain)} ({points(found.low)} to {points(found.high)})"
            rows.append(row)
    return pd.DataFrame(rows)


def settings_tables() -> str:
    """What each setting brings on each set of texts, from the stored study."""
    stored = settings.stored_settings()
    titles = {TWEETS: "the course's tweets, 3 classes"} | {name: found.title for name, found in SETS.items()}
    parts = [
        "The four sets of texts:",
        "\n".join(
            f"- *{name}*: {titles[name]}; {labelled:,} labelled texts for teacher and student, {others:,} without "
            f"labels, {held_out:,} for validation."
            for name, (_, labelled, others, held_out) in stored["choices"]["sizes"].items()
        ),
    ]
    parts += ["**Gain over students with labels only**", conformance.as_markdown(_over_labels(stored))]
    for kind, said in SETTING_KINDS.items():
        table = settings.changes_table(stored, kind)
        rows = []
        for change, row in table.iterrows():
            mean, low, high = (points(row["mean", name]) for name in ("gain", "low", "high"))
            of_sets = {name: points(row[name, "gain"]) for name in settings.TEXTS}
            rows.append({"": change} | of_sets | {"mean": f"**{mean}** ({low} to {high})"})
        parts += [f"**{said}: changed settings**", conformance.as_markdown(pd.DataFrame(rows))]
    return "\n\n".join([*parts, origin(stored)])


def write_readme() -> None:
    """Put the chapters and the stored results into the README and docs/."""
    plots.use_course_style()
    figure, alt = plots.arms_figure(comparison.stored_comparison())
    figure.savefig(notebooks.ROOT / RESULTS_FIGURE, dpi=110)
    speed, speed_alt = plots.benchmark_figure(benchmark.ways_table(benchmark.stored_benchmark()))
    speed.savefig(notebooks.ROOT / BENCHMARK_FIGURE, dpi=110)
    write_block("notebooks", readme_notebooks(), by="notebooks")
    write_block("chapters", chapters_table(), by="notebooks", page="docs/contributing.md")
    write_block("results", f"![{alt}]({RESULTS_FIGURE})\n\n{readme_results()}", by="results")
    write_block("table", results_tables(), by="results", page="docs/results.md")
    speed_block = f"![{speed_alt}](../{BENCHMARK_FIGURE})\n\n{benchmark_tables()}"
    write_block("verdicts", verdicts(), by="study", page="docs/verdict.md")
    write_block("settings", settings_tables(), by="study", page="docs/verdict.md")
    write_block("tokens", token_losses(), by="conformance", page="docs/speed.md")
    write_block("benchmark", speed_block, by="benchmark", page="docs/speed.md")
