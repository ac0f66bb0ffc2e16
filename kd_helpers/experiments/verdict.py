"""Does distillation pay on these texts? An answer to three questions, with a plan, runs, and intervals.

Is the student better than the same student without a teacher? Is it close enough to its teacher? Is it worth the effort
against cheap rivals? Every choice (how many steps, which of several arms stands for its kind) is made on the validation
split; only then is the test split opened, once, in `open_test`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig, require_choice
from kd_helpers.data import DataSplits, describe_splits, evaluation_batches, tokenize
from kd_helpers.experiments.comparison import BASELINE, model_cost
from kd_helpers.experiments.judgement import (
    CANNOT_TELL,
    MEASURES,
    UNFINISHED,
    Estimate,
    answer,
    crossed,
    needed,
    text_weights,
)
from kd_helpers.experiments.study import Arm, made_with, run_arm
from kd_helpers.experiments.verdict_runs import (
    DISTILLED,
    MORE,
    ROUGH,
    TRANSFER,
    UNIFORM,
    VALIDATION_TEXTS,
    Ground,
    Plan,
    Runs,
    arms_of,
    make_plan,
    prepare,
    run_all,
    stored_speed,
    teacher_seconds,
    verdict_study,
    within_budget,
)
from kd_helpers.metrics import classification_metrics, evaluate, fidelity
from kd_helpers.models import load_saved
from kd_helpers.resolve import Setup, resolve
from kd_helpers.teacher import cached_logits

TEACHER = "teacher"
STOPPED = "early_stopped"  # the baseline at its best moment on validation
COMMONEST, TFIDF = "commonest_class", "tfidf"
WITHOUT_TEACHER = (BASELINE, STOPPED, UNIFORM)  # the same student, as good as it gets without a teacher's knowledge
CHEAP = (*WITHOUT_TEACHER, COMMONEST, TFIDF, MORE)  # as cheap to serve as the student, and to make
BUDGET = 1800.0  # seconds
EFFECT = 0.01  # the difference that matters, unless somebody says otherwise: one point


# ---- Rivals that need no neural network


@dataclasses.dataclass(frozen=True)
class Rival:
    """A model that is cheap to make: its title, and a function from texts to numbers of classes `[N]`."""

    title: str
    classes: Callable[[Sequence[str]], np.ndarray]


def make_rivals(ground: Ground, measure: str) -> dict[str, Rival]:
    """What needs no neural network: the commonest class, and logistic regression on words and pairs of words.

    Both learn from the student's labelled texts; the regression's strength of regularisation is chosen on validation.
    """
    data = ground.setup.data
    labels, texts = np.array(data.train["label"][:]), data.train["text"][:]
    held_out, truth = _texts(data.validation), _labels(data.validation)
    commonest = int(np.bincount(labels).argmax())
    rivals = {COMMONEST: Rival("Commonest class", lambda texts: np.full(len(texts), commonest))}
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, token_pattern=r"\S+")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a rival need not be fitted to the last digit
        fitted = [make_pipeline(words, LogisticRegression(C=C, max_iter=200)).fit(texts, labels) for C in (1.0, 10.0)]
    weights = text_weights(truth, measure)
    best = max(fitted, key=lambda model: float(((model.predict(held_out) == truth) * weights).mean()))
    return rivals | {TFIDF: Rival("TF-IDF and logistic regression", best.predict)}


# ---- Choices, on validation alone


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model, or one way of using the runs of an arm, that can be asked for classes.

    Attributes:
        title: for people.
        arm: of the runs; empty for a model that is no run.
        moment: "last", or "best" for the moment that was best on validation.
        score: on validation, a mean over seeds.
    """

    title: str
    arm: str
    moment: str
    score: float


def choose(ground: Ground, runs: Runs, rivals: Mapping[str, Rival], measure: str) -> dict[str, Any]:
    """Decide on validation which candidates stand for their kind.

    Returns:
        `candidates` by name, and of them by name `student`, the distilled one of which the second and third question
        are asked, and `reference`, the one without a teacher with which classes are compared. An arm that is unfinished
        is not chosen; where none is left, the name is None.
    """
    labels = _labels(ground.setup.data.validation)
    weights = text_weights(labels, measure)

    def score(classes: np.ndarray) -> float:
        return float(((classes == labels) * weights).mean())

    candidates = {
        arm: Candidate(title.title, arm, "last", score(_classes(runs, arm, "last", "validation")))
        for arm, title in runs.arms.items()
    }
    stopped = score(_classes(runs, BASELINE, "best", "validation"))
    candidates[STOPPED] = Candidate("Labels only, stopped at its best", BASELINE, "best", stopped)
    texts = _texts(ground.setup.data.validation)
    for name, rival in rivals.items():
        candidates[name] = Candidate(rival.title, "", "last", score(rival.classes(texts)))

    def best(names: Sequence[str]) -> str | None:
        finished = [name for name in names if name in candidates and candidates[name].arm not in runs.unfinished]
        return max(finished, key=lambda name: candidates[name].score, default=None)

    return {
        "candidates": {name: dataclasses.asdict(candidate) for name, candidate in candidates.items()},
        "reference": best(WITHOUT_TEACHER),
        "student": best((DISTILLED, TRANSFER)),
    }


def _in_order(split: datasets.Dataset, column: str) -> list[Any]:
    """A column in order of the ids, as predictions are."""
    values = split[column][:]
    return [values[index] for index in np.argsort(split["id"][:])]


def _texts(split: datasets.Dataset) -> list[str]:
    return _in_order(split, "text")


def _labels(split: datasets.Dataset) -> np.ndarray:
    return np.array(_in_order(split, "label"))


def _run_logits(run: Mapping[str, Any], moment: str, split: str) -> np.ndarray:
    """What the student of a run predicts for a split: logits `[N, C]`."""
    file = artifacts.artifacts_dir() / run["folder"] / f"{split}.safetensors"
    return safetensors.torch.load(file.read_bytes())[moment].numpy()


def _logits(runs: Runs, arm: str, moment: str, split: str) -> np.ndarray:
    """The same of all students of an arm: `[S, N, C]`."""
    return np.stack([_run_logits(run, moment, split) for run in runs.runs[arm]])


def _classes(runs: Runs, arm: str, moment: str, split: str) -> np.ndarray:
    """The same as numbers of classes `[S, N]`."""
    return _logits(runs, arm, moment, split).argmax(axis=-1)


# ---- The test split


@dataclasses.dataclass(frozen=True)
class Opened:
    """What is known of the test split once it is open; N texts in order of their ids, S seeds, C classes.

    Attributes:
        labels: `[N]`.
        classes: of each candidate and of the "teacher", the numbers of the predicted classes `[S, N]`; S is 1 for what
            was made once.
        logits: `[S, N, C]`, of those that have any.
    """

    labels: np.ndarray
    classes: Mapping[str, np.ndarray]
    logits: Mapping[str, np.ndarray]


def open_test(ground: Ground, runs: Runs, rivals: Mapping[str, Rival]) -> Opened:
    """Read what all candidates predict for the test split. No choice is made after this."""
    setup, test = ground.setup, ground.setup.data.test
    tokenizer = setup.tokenizers.teacher
    tokens = tokenize(test, tokenizer, setup.config.max_length)
    of_teacher = cached_logits(ground.model, tokens, tokenizer, precision=setup.precision)
    logits = {arm: _logits(runs, arm, "last", "test") for arm in runs.arms}
    logits[STOPPED] = _logits(runs, BASELINE, "best", "test")
    logits[TEACHER] = of_teacher.lookup(torch.tensor(sorted(test["id"][:]))).numpy()[None]
    classes = {name: values.argmax(axis=-1) for name, values in logits.items()}
    classes |= {name: rival.classes(_texts(test))[None] for name, rival in rivals.items()}
    return Opened(_labels(test), classes, logits)


def difference(opened: Opened, first: str, second: str, measure: str, *, level: float) -> Estimate:
    """The first candidate's measure minus the second's, paired over seeds and texts."""
    right = [(opened.classes[name] == opened.labels).astype(float) for name in (first, second)]
    return crossed(right[0] - right[1], text_weights(opened.labels, measure), level=level)


def questions(
    opened: Opened, student: str | None, unfinished: Sequence[str], measure: str, effect: float
) -> list[dict[str, Any]]:
    """The three questions and their answers.

    A student must be better than *every* one of those that it is compared with, so the answer is that of the strongest:
    the one against which the interval begins lowest. The first question has two parts where there are texts without
    labels; its intervals are widened so that both hold together (Bonferroni).

    Args:
        opened: the test split.
        student: of whom the second and the third question are asked; None if no distilled student is finished.
        unfinished: arms that are not judged.
        measure, effect: see `verdict`.

    Returns:
        For each comparison `question` ("baseline", "teacher" or "rivals"), `student` and `against` (names of
        candidates), and `answer` (of `judgement`); unless it is unfinished `estimate`, and if it cannot tell `needed`.
    """
    distilled = [name for name in (DISTILLED, TRANSFER) if name in opened.classes]
    asked = [("baseline", name, WITHOUT_TEACHER, 1 - 0.05 / len(distilled), 0.0, effect) for name in distilled]
    asked.append(("teacher", student, (TEACHER,), 0.95, -effect, -effect))
    asked.append(("rivals", student, CHEAP, 0.95, 0.0, effect))
    answers = []
    for question, asked_of, others, level, above, least in asked:
        entry = {"question": question, "student": asked_of, "against": None}
        if asked_of is None or asked_of in unfinished or (BASELINE in unfinished and BASELINE in others):
            answers.append(entry | {"answer": UNFINISHED})
            continue
        estimates = {
            name: difference(opened, asked_of, name, measure, level=level) for name in others if name in opened.classes
        }
        strongest, estimate = min(estimates.items(), key=lambda item: item[1].low)
        found = answer(estimate, above=above, least=least)
        entry |= {"against": strongest, "answer": found, "estimate": estimate.to_dict()}
        if found == CANNOT_TELL:
            entry["needed"] = needed(estimate, above=above, least=least)
        answers.append(entry)
    return answers


def class_differences(opened: Opened, student: str, reference: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """How the share of right answers changes within each class, with intervals that hold for all classes together."""
    present = [index for index in range(len(names)) if (opened.labels == index).any()]
    rows = []
    for index in present:
        chosen = opened.labels == index
        right = [(opened.classes[name][:, chosen] == index).astype(float) for name in (student, reference)]
        found = crossed(right[0] - right[1], level=1 - 0.05 / len(present))
        recalls = {"student": float(right[0].mean()), "reference": float(right[1].mean())}
        rows.append({"class": names[index], "texts": int(chosen.sum()), **recalls, **_interval(found)})
    return rows


def _interval(estimate: Estimate) -> dict[str, float]:
    return {"gain": estimate.gain, "low": estimate.low, "high": estimate.high}


def measures_table(opened: Opened, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every candidate's measures on test: means over its seeds, and how much the accuracy varies between them."""
    rows = []
    labels = torch.tensor(opened.labels)
    for name, title in titles.items():
        predicted = opened.classes[name]
        logits = opened.logits.get(name)
        found = []
        for seed in range(len(predicted)):
            if logits is None:
                one_hot = F.one_hot(torch.tensor(predicted[seed]), int(max(predicted.max(), opened.labels.max())) + 1)
                all_measures = classification_metrics(one_hot.float(), labels)
                found.append({key: all_measures[key] for key in ("accuracy", "macro_recall", "macro_f1")})
                continue
            of_seed = torch.tensor(logits[seed])
            agreement = fidelity(of_seed, torch.tensor(opened.logits[TEACHER][0]))["fidelity"]
            found.append(classification_metrics(of_seed, labels) | {"fidelity": agreement})
        row = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        spread = float(np.std([one["accuracy"] for one in found], ddof=1)) if len(found) > 1 else None
        rows.append({"name": name, "title": title, "seeds": len(found), "between_seeds": spread, **row})
    return rows


# ---- What to try next, on validation, with the first seed


def try_settings(ground: Ground, runs: Runs, student: str, measure: str) -> dict[str, list[dict[str, Any]]]:
    """Other temperatures and alphas, and smaller transfer sets, each against the chosen student of the first seed.

    Returns:
        `settings`: temperature, alpha, and the paired difference on validation with its interval over texts. `curve`:
        the number of texts without labels and the measure on validation.
    """
    chosen = runs.arms[student].recipe
    signal, data = chosen.signal, ground.setup.data
    others = [dataclasses.replace(signal, temperature=value) for value in (1.0, 4.0) if value != signal.temperature]
    others += [dataclasses.replace(signal, alpha=value) for value in (0.5, 1.0) if value != signal.alpha]
    arms = {
        f"T {other.temperature:g}, alpha {other.alpha:g}": Arm(
            "Another setting", dataclasses.replace(chosen, signal=other)
        )
        for other in others
    }
    shares = (0.25, 0.5) if signal.transfer else ()
    arms |= {f"share {share:g}": Arm("Fewer texts", dataclasses.replace(chosen, share=share)) for share in shares}
    study = verdict_study(ground, arms, runs.steps)
    labels = _labels(data.validation)
    weights = text_weights(labels, measure)

    def right(run: Mapping[str, Any]) -> np.ndarray:
        return (_run_logits(run, "last", "validation").argmax(axis=-1) == labels).astype(float)

    usual = right(runs.runs[student][0])
    found = {arm: right(run_arm(study, arm, 0)) for arm in tqdm(arms, desc="What to try next", unit="run", leave=False)}
    level = 1 - 0.05 / max(1, len(others))
    settings = [
        {"temperature": other.temperature, "alpha": other.alpha}
        | _interval(crossed(found[arm] - usual, weights, level=level))
        for arm, other in zip(arms, others, strict=False)
    ]
    points = [(share, found[f"share {share:g}"]) for share in shares]
    points += [(1.0, usual)] if shares else []
    curve = [
        {"texts": max(1, round(share * len(data.transfer))), "score": float((one * weights).mean())}
        for share, one in points
    ]
    return {"settings": settings, "curve": curve}


# ---- Costs


def costs(ground: Ground, runs: Runs, student: str, *, eight_bits: bool) -> list[dict[str, Any]]:
    """What teacher and student cost to keep and to run, in torch and, if asked for, as graphs of eight bits.

    Returns:
        A row a model, see `comparison.model_cost`. In eight bits it has `way` "int8" and the `accuracy` on test.
    """
    setup, tokenizers = ground.setup, ground.setup.tokenizers
    folder = artifacts.artifacts_dir() / runs.runs[student][0]["folder"] / "student"
    models = {
        TEACHER: (ground.model, tokenizers.teacher),
        "student": (load_saved(folder).to(setup.device), tokenizers.student),
    }
    rows = [{"way": "torch"} | model_cost(model, name, setup, tokenizer) for name, (model, tokenizer) in models.items()]
    if eight_bits and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        from kd_helpers.experiments.serving import Served, answer_times
        from kd_helpers.export import OnnxClassifier, cached_export

        length, test = setup.config.max_length, setup.data.test
        for name, (model, tokenizer) in models.items():
            try:
                graphs = cached_export(model, tokenizer, max_length=length)
            except ValueError as error:  # some kinds of models can't be exported, which the page then says
                rows.append({"way": "int8", "model": name, "refused": str(error)})
                continue
            graph = OnnxClassifier(graphs, int8=True, threads=torch.get_num_threads())
            served = Served(graph, tokenizer, length, torch.float32, graph.megabytes)
            batches = evaluation_batches(tokenize(test, tokenizer, length), tokenizer)
            accuracy = evaluate(graph, batches)["accuracy"]
            timed = answer_times(served, test["text"][:2000])
            rows.append(
                {"way": "int8", "model": name, "megabytes": graph.megabytes, "accuracy": accuracy}
                | {f"latency_{key}": timed[key] for key in ("p50_ms", "p95_ms")}
                | {"texts_per_second": timed["texts_per_second"]}
            )
    return rows


# ---- The verdict


def verdict(
    config: DistillConfig,
    *,
    data: DataSplits | None = None,
    budget: float = BUDGET,
    plan: Plan | None = None,
    effect: float = EFFECT,
    measure: str = "accuracy",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Does distillation pay on these texts?

    Finished runs are found again, so the same call after an interruption goes on where it stopped.

    Args:
        config: data, models, and the temperature, alpha, batch size and rates of the students. How many steps they make
            is the plan's choice.
        data: the splits, if they are loaded already.
        budget: seconds that it may take, about.
        plan: what to run, in place of a plan for the budget.
        effect: the difference that matters, as a share: 0.01 is one point of the measure.
        measure: "accuracy", or "macro_recall", in which rare classes count as much as common ones.
        report: is given the plan in words before anything is trained.

    Returns:
        Ready for JSON: `made_with`, `config`, `plan`, `steps`, `seeds`, `unfinished`, `losses` (validation loss of the
        first seed by length and arm), `sizes` of the splits, `labelled` (texts before the budget cut them), `notes`,
        `choices` (made on validation), `questions` (see there), `table` (see `measures_table`), `by_class`, `tries`
        (see `try_settings`), `costs`, and `seconds` of a student and, if there was a budget, of the teacher.

    Raises:
        ValueError: a value lies outside its range, or see `resolve`.
    """
    require_choice("measure", measure, MEASURES)
    if not 0 < effect < 1:
        raise ValueError(f"effect is {effect}; give a share between 0 and 1: 0.01 is one point.")
    if not budget > 0:
        raise ValueError(f"budget is {budget}; give seconds, more than 0.")
    setup = _with_fewer_validation_texts(resolve(config, data))
    labelled, seconds = len(setup.data.teacher_train), {}
    if plan is None:
        speed = stored_speed(setup)
        config, splits = within_budget(budget, speed, setup.config, setup.data)
        setup = dataclasses.replace(setup, config=config, data=splits)
        plan = make_plan(budget, speed, config, splits)
        seconds["teacher"] = teacher_seconds(config, speed, splits)
    report(describe_plan(plan, setup, labelled))
    ground = prepare(setup)
    result, runs = ask(ground, plan, effect=effect, measure=measure)
    student = result["choices"]["student"] or DISTILLED
    seconds["student"] = float(np.mean([run["seconds"] for run in runs.runs[student]]))
    cost = costs(ground, runs, student, eight_bits=plan.tries)
    return result | {
        "labelled": labelled,
        "notes": list(setup.data.notes),
        "costs": cost,
        "seconds": seconds,
    }


def _with_fewer_validation_texts(setup: Setup) -> Setup:
    """At most `VALIDATION_TEXTS` of them; their order is as good as random."""
    validation = setup.data.validation
    validation = validation.select(range(min(VALIDATION_TEXTS, len(validation))))
    return dataclasses.replace(setup, data=dataclasses.replace(setup.data, validation=validation))


def ask(ground: Ground, plan: Plan, *, effect: float, measure: str) -> tuple[dict[str, Any], Runs]:
    """Run a plan, choose on validation, open the test split, and answer the three questions.

    Args, returns: see `verdict`; the result lacks what depends on the time that things take. The runs come beside it.
    """
    config, data = ground.setup.config, ground.setup.data
    runs, rivals = run_all(ground, plan), make_rivals(ground, measure)
    choices = choose(ground, runs, rivals, measure)
    student, reference = choices["student"], choices["reference"]
    tries = try_settings(ground, runs, student, measure) if plan.tries and student else {"settings": [], "curve": []}
    opened = open_test(ground, runs, rivals)
    titles = {name: candidate["title"] for name, candidate in choices["candidates"].items()} | {TEACHER: "The teacher"}
    judged = student is not None and reference is not None
    result = {
        "made_with": made_with("kd_helpers.experiments.verdict"),
        "config": config.to_dict(),
        "plan": dataclasses.asdict(plan),
        "effect": effect,
        "measure": measure,
        "sizes": describe_splits(data).to_dict("index"),
        "steps": runs.steps,
        "seeds": len(runs.runs[BASELINE]),
        "unfinished": list(runs.unfinished),
        "losses": {str(length): dict(losses) for length, losses in runs.losses.items()},
        "choices": choices,
        "questions": questions(opened, student, runs.unfinished, measure, effect),
        "table": measures_table(opened, titles),
        "by_class": class_differences(opened, student, reference, data.label_names) if judged else [],
        "tries": tries,
    }
    return result, runs


def describe_plan(plan: Plan, setup: Setup, labelled: int) -> str:
    """What is about to run, in words."""
    config, data = setup.config, setup.data
    arms = ", ".join(arm.title for arm in arms_of(config, data).values())
    learns = len(data.teacher_train)
    epochs = f"{config.teacher_epochs} epochs" if config.teacher_epochs else "not fine-tuned"
    fewer = f" of {labelled:,}, as many as the budget allows" if learns < labelled else ""
    lines = [
        f"teacher: {learns:,} labelled texts{fewer}; {epochs}",
        f"students: {len(data.train):,} labelled texts, {len(data.transfer):,} without labels",
        f"arms: {arms}",
        f"steps: {' or '.join(f'{length:,}' for length in plan.lengths)}, until more steps no longer help",
        f"seeds: {' or '.join(map(str, dict.fromkeys(plan.seeds)))} of each arm",
    ]
    if plan.seconds:
        lines.append(f"time: about {math.ceil(plan.seconds / 60)} minutes at most")
    if plan.rough:
        lines.append(f"this is a rough answer: {ROUGH / 60:.0f} minutes or more would allow a better one")
    return "\n".join(lines)
