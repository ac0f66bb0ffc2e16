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

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig, require_choice
from kd_helpers.data import DataSplits, describe_splits, evaluation_batches, tokenize
from kd_helpers.experiments.comparison import model_cost
from kd_helpers.experiments.judgement import (
    CANNOT_TELL,
    DOES_NOT_PAY,
    MEASURES,
    PAYS,
    UNFINISHED,
    Estimate,
    answer,
    crossed,
    needed,
    text_weights,
)
from kd_helpers.experiments.signals import BASELINE
from kd_helpers.experiments.study import Arm, made_with, run_arm
from kd_helpers.experiments.verdict_plan import (
    ROUGH,
    Plan,
    Runs,
    first_texts,
    plan_within,
    run_all,
)
from kd_helpers.experiments.verdict_runs import (
    DISTILLED,
    EFFECT,
    MORE,
    MOST_SEEDS,
    TRANSFER,
    UNIFORM,
    Ground,
    Training,
    arms_of,
    in_order,
    labels_of,
    prepare,
    run_logits,
    runs_study,
    try_arm,
    with_enough_epochs,
)
from kd_helpers.loop import DivergedError
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
VALIDATION_TEXTS = 1000  # at most: every run reads them


# ---- Rivals that need no neural network


@dataclasses.dataclass(frozen=True)
class Rival:
    """A model that is cheap to make: its title, and a function from texts to numbers of classes `[N]`."""

    title: str
    classes: Callable[[Sequence[str]], np.ndarray]


def make_rivals(ground: Ground) -> dict[str, Rival]:
    """What needs no neural network: the commonest class, and logistic regression on words and pairs of words.

    Both learn from the student's labelled texts; the regression's strength of regularisation is chosen on validation.
    """
    data = ground.setup.data
    labels, texts = np.array(data.train["label"][:]), data.train["text"][:]
    held_out, truth = in_order(data.validation, "text"), labels_of(data.validation)
    commonest = int(np.bincount(labels).argmax())
    rivals = {COMMONEST: Rival("Commonest class", lambda texts: np.full(len(texts), commonest))}
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, token_pattern=r"\S+")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a rival need not be fitted to the last digit
        fitted = [make_pipeline(words, LogisticRegression(C=C, max_iter=200)).fit(texts, labels) for C in (1.0, 10.0)]
    weights = text_weights(truth, ground.measure)
    best = max(fitted, key=lambda model: float(((model.predict(held_out) == truth) * weights).mean()))
    return rivals | {TFIDF: Rival("TF-IDF and logistic regression", best.predict)}


# ---- Choices, on validation alone


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model, or one way of using the runs of an arm, that can be asked for classes.

    Attributes:
        title: for people.
        arm: of the runs; empty for a model that is no run.
        score: on validation, a mean over seeds.
    """

    title: str
    arm: str
    score: float


def choose(ground: Ground, runs: Runs, rivals: Mapping[str, Rival]) -> dict[str, Any]:
    """Decide on validation which candidates stand for their kind.

    Returns:
        `candidates` by name, and of them by name `student`, the distilled one of which the second and third question
        are asked, and `reference`, the one without a teacher with which classes are compared. An arm that is unfinished
        is not chosen; where none is left, the name is None.
    """
    labels = labels_of(ground.setup.data.validation)
    weights = text_weights(labels, ground.measure)

    def score(classes: np.ndarray) -> float:
        return float(((classes == labels) * weights).mean())

    candidates = {
        name: Candidate(title, arm, score(_logits(runs, name, "validation").argmax(axis=-1)))
        for name, (title, arm, _) in ways_of(runs).items()
    }
    texts = in_order(ground.setup.data.validation, "text")
    for name, rival in rivals.items():
        candidates[name] = Candidate(rival.title, "", score(rival.classes(texts)))

    def best(names: Sequence[str]) -> str | None:
        finished = [name for name in names if name in candidates and candidates[name].arm not in runs.unfinished]
        return max(finished, key=lambda name: candidates[name].score, default=None)

    return {
        "candidates": {name: dataclasses.asdict(candidate) for name, candidate in candidates.items()},
        "reference": best(WITHOUT_TEACHER),
        "student": best((DISTILLED, TRANSFER)),
    }


def ways_of(runs: Runs) -> dict[str, tuple[str, str, str]]:
    """How the runs are used: title, arm and moment of each candidate that is an arm's student, by name.

    The baseline counts as it is after its last step, and at its best moment; the one with more labels at its best.
    """
    ways = {name: (arm.title, name, "best" if name == MORE else "last") for name, arm in runs.arms.items()}
    return ways | {STOPPED: ("Labels only, stopped at its best", BASELINE, "best")}


def _logits(runs: Runs, candidate: str, split: str) -> np.ndarray:
    """What the students of a candidate predict for a split: `[S, N, C]`."""
    _, arm, moment = ways_of(runs)[candidate]
    return np.stack([run_logits(run, moment, split) for run in runs.runs[arm]])


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
    logits = {name: _logits(runs, name, "test") for name in ways_of(runs)}
    logits[TEACHER] = of_teacher.lookup(torch.tensor(sorted(test["id"][:]))).numpy()[None]
    classes = {name: values.argmax(axis=-1) for name, values in logits.items()}
    classes |= {name: rival.classes(in_order(test, "text"))[None] for name, rival in rivals.items()}
    return Opened(labels_of(test), classes, logits)


def difference(opened: Opened, first: str, second: str, measure: str, *, level: float) -> Estimate:
    """The first candidate's measure minus the second's, paired over seeds and texts."""
    right = [(opened.classes[name] == opened.labels).astype(float) for name in (first, second)]
    return crossed(right[0] - right[1], text_weights(opened.labels, measure), level=level)


def questions(
    opened: Opened, student: str | None, unfinished: Sequence[str], measure: str, effect: float
) -> list[dict[str, Any]]:
    """The three questions and their answers.

    A student must be better than *every* one of those that it is compared with. So it pays if it pays against each, and
    where it fails against one it fails. The answer that is shown is that against the strongest of those that decide,
    the one against which the interval begins lowest. One that is unfinished would be stronger with more training:
    beside it a student can fail, but not pay. Intervals are widened (Bonferroni) where answers must be right together:
    the two parts of the first question, if there are texts without labels, and the failures against several rivals.

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
    unfinished = {*unfinished, *([STOPPED] if BASELINE in unfinished else [])}
    answers = []
    for question, asked_of, others, level, above, least in asked:
        entry = {"question": question, "student": asked_of, "against": None, "answer": UNFINISHED}
        answers.append(entry)
        present = [name for name in others if name in opened.classes]
        finished = [name for name in present if name not in unfinished]
        if asked_of is None or asked_of in unfinished or not finished:
            continue
        estimates = {name: difference(opened, asked_of, name, measure, level=level) for name in finished}
        paid = [name for name, found in estimates.items() if answer(found, above=above, least=least) == PAYS]
        for_failure = 1 - (1 - level) / len(finished)
        wider = {name: difference(opened, asked_of, name, measure, level=for_failure) for name in finished}
        lost = [name for name, found in wider.items() if answer(found, above=above, least=least) == DOES_NOT_PAY]
        if len(finished) < len(present) and not lost:
            continue
        deciding = lost or [name for name in finished if name not in paid] or finished
        strongest = min(deciding, key=lambda name: estimates[name].low)
        found = DOES_NOT_PAY if lost else PAYS if strongest in paid else CANNOT_TELL
        estimate = estimates[strongest] if found == PAYS else wider[strongest]
        entry |= {"against": strongest, "answer": found, "estimate": estimate.to_dict()}
        if found == CANNOT_TELL:
            entry["needed"] = needed(estimate, above=above, least=least, most_seeds=MOST_SEEDS)
    return answers


def class_differences(opened: Opened, student: str, reference: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """How the share of right answers changes within each class, with intervals that hold for all classes together."""
    present = [index for index in range(len(names)) if (opened.labels == index).any()]
    rows = []
    for index in present:
        chosen = opened.labels == index
        pair = {name: opened.classes[name][:, chosen] for name in (student, reference)}
        within = Opened(opened.labels[chosen], pair, {})
        found = difference(within, student, reference, "accuracy", level=1 - 0.05 / len(present))
        right = {"student": float((pair[student] == index).mean())}
        right["reference"] = float((pair[reference] == index).mean())
        rows.append({"class": names[index], "texts": int(chosen.sum()), **right, **_interval(found)})
    return rows


def _interval(estimate: Estimate) -> dict[str, float]:
    return {"gain": estimate.gain, "low": estimate.low, "high": estimate.high}


def measures_table(opened: Opened, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every candidate's measures on test, means over its seeds."""
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
        rows.append({"name": name, "title": title, "seeds": len(found), **row})
    return rows


# ---- What to try next, on validation, with the first seed

ALPHAS, TEMPERATURES = (0.5, 1.0), (1.0, 4.0)
SHARES = (0.5, 0.25)  # of the texts without labels


def other_settings(usual: Training) -> list[Training]:
    """What is tried beside the usual: one setting changed at a time."""
    signal = usual.signal
    others = [dataclasses.replace(signal, alpha=value) for value in ALPHAS if value != signal.alpha]
    others += [dataclasses.replace(signal, temperature=value) for value in TEMPERATURES if value != signal.temperature]
    return [dataclasses.replace(usual, signal=other) for other in others]


def try_settings(ground: Ground, runs: Runs, student: str, most: int) -> dict[str, list[dict[str, Any]]]:
    """Other alphas and temperatures, and fewer texts without labels, each against the chosen student.

    Args:
        ground, runs: of the verdict.
        student: the chosen one's arm.
        most: how many are tried at most.

    Returns:
        `settings`: `alpha`, `temperature`, and the paired difference on validation with its interval
        over texts (for all of them together). `curve`: the number of texts without labels and the measure on
        validation.
    """
    usual, data = runs.arms[student].recipe, ground.setup.data
    shares = SHARES if usual.signal.transfer else ()
    tried = [*(dataclasses.replace(usual, share=share) for share in shares), *other_settings(usual)][:most]
    arms = {f"try {number}": Arm("Another setting", training) for number, training in enumerate(tried)}
    study = runs_study(ground, arms, runs.steps, try_arm)
    labels = labels_of(data.validation)
    weights = text_weights(labels, ground.measure)

    def right(run: Mapping[str, Any]) -> np.ndarray:
        return (run_logits(run, "last", "validation").argmax(axis=-1) == labels).astype(float)

    of_usual = right(runs.runs[student][0])
    settings, curve = [], [(1.0, of_usual)] if shares else []
    level = 1 - 0.05 / max(1, len(tried) - len(shares))
    for name in tqdm(arms, desc="What to try next", unit="run", leave=False):
        try:
            training, found = arms[name].recipe, right(run_arm(study, name, 0))
        except DivergedError:  # it is no setting to advise
            continue
        if training.share != usual.share:
            curve.append((training.share, found))
            continue
        gain = _interval(crossed(found - of_usual, weights, level=level))
        settings.append({name: getattr(training.signal, name) for name in ("temperature", "alpha")} | gain)
    points = [
        {"texts": max(1, round(share * len(data.transfer))), "score": float((found * weights).mean())}
        for share, found in sorted(curve, key=lambda point: point[0])
    ]
    return {"settings": settings, "curve": points}


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
        rows += [
            {"way": "int8", "model": name} | _eight_bits_cost(model, tokenizer, setup)
            for name, (model, tokenizer) in models.items()
        ]
    return rows


def _eight_bits_cost(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setup: Setup) -> dict[str, Any]:
    """The same with weights of eight bits; only `refused`, a sentence, of a kind of models that can't be exported."""
    from kd_helpers.experiments.serving import answer_times, serving_ways
    from kd_helpers.export import cached_export

    length, test = setup.config.max_length, setup.data.test
    try:
        graphs = cached_export(model, tokenizer, max_length=length)
    except ValueError as error:
        return {"refused": str(error)}
    served = serving_ways(model, tokenizer, graphs, max_length=length, threads=torch.get_num_threads())["int8"]
    timed = answer_times(served, test["text"][:2000])
    batches = evaluation_batches(tokenize(test, tokenizer, length), tokenizer)
    return {
        "megabytes": served.megabytes,
        "accuracy": evaluate(served.model, batches)["accuracy"],
        "latency_p50_ms": timed["p50_ms"],
        "latency_p95_ms": timed["p95_ms"],
        "texts_per_second": timed["texts_per_second"],
    }


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
        config: data, models, and the temperature, alpha and batch size of the students. How many steps they make is
            the plan's choice; their learning rate is `learning_rate` or a multiple of it (see `verdict_plan.run_all`).
        data: the splits, if they are loaded already, each in random order: what is too much for the budget is left out
            at the end.
        budget: seconds that it may take, about.
        plan: what to run, in place of a plan for the budget.
        effect: the difference that matters, as a share: 0.01 is one point of the measure.
        measure: "accuracy", or "macro_recall", in which rare classes count as much as common ones.
        report: is given the plan in words before anything is trained.

    Returns:
        Ready for JSON: `made_with`, `config`, `plan`, `steps`, `seeds`, `unfinished`, `losses` (validation loss of the
        first seed by length and arm), `rates` (the learning rate of each arm), `sizes` of the splits, `notes`, `before`
        (`max_length`, `teacher_epochs` and the numbers of `labelled` and `unlabelled` texts before the budget cut
        anything), `choices` (made on validation), `questions` (see there), `table` (see `measures_table`), `by_class`,
        `tries` (see `try_settings`), `costs`, and `seconds` of a student and, if there was a budget, of the teacher.

    Raises:
        ValueError: a value lies outside its range, or see `resolve`.
    """
    require_choice("measure", measure, MEASURES)
    if not 0 < effect < 1:
        raise ValueError(f"effect is {effect}; give a share between 0 and 1: 0.01 is one point.")
    if not budget > 0:
        raise ValueError(f"budget is {budget}; give seconds, more than 0.")
    setup = _with_fewer_validation_texts(resolve(config, data))
    for split in ("train", "validation", "test"):
        if not len(getattr(setup.data, split)):
            raise ValueError(f"the split {split!r} has no texts; a verdict needs some in train, validation and test.")
    whole, seconds = setup, {}
    if plan is None:
        whole = dataclasses.replace(whole, config=with_enough_epochs(whole.config, whole.data))
        setup, plan = plan_within(budget, setup)
        seconds["teacher"] = plan.teacher_seconds
    report(describe_plan(plan, setup, whole))
    present = set(setup.data.train["label"][:])
    if len(present) < 2:
        raise ValueError(
            f"all {len(setup.data.train):,} labelled texts of the student are of one class; give more of them "
            "(--labels), or a larger budget."
        )
    ground = dataclasses.replace(prepare(setup), measure=measure, effect=effect)
    result, runs = ask(ground, plan)
    student = result["choices"]["student"] or DISTILLED
    seconds["student"] = float(np.mean([run["seconds"] for run in runs.runs[student]]))
    cost = costs(ground, runs, student, eight_bits=not plan.rough)
    return result | {
        "notes": [*setup.data.notes, *_cuts(setup, whole)],
        "before": {
            "max_length": whole.config.max_length,
            "labelled": len(whole.data.teacher_train),
            "unlabelled": len(whole.data.transfer),
            "teacher_epochs": whole.config.teacher_epochs,
        },
        "costs": cost,
        "seconds": seconds,
    }


def _with_fewer_validation_texts(setup: Setup) -> Setup:
    """The first `VALIDATION_TEXTS` of them."""
    validation = first_texts(setup.data.validation, VALIDATION_TEXTS)
    return dataclasses.replace(setup, data=dataclasses.replace(setup.data, validation=validation))


def ask(ground: Ground, plan: Plan) -> tuple[dict[str, Any], Runs]:
    """Run a plan, choose on validation, open the test split, and answer the three questions.

    Args, returns: see `verdict`; the result lacks what depends on the time that things take. The runs come beside it.
    """
    config, data = ground.setup.config, ground.setup.data
    rivals, runs = make_rivals(ground), run_all(ground, plan)
    choices = choose(ground, runs, rivals)
    student, reference = choices["student"], choices["reference"]
    tries = {"settings": [], "curve": []}
    if plan.tries and student:
        tries = try_settings(ground, runs, student, plan.tries)
    opened = open_test(ground, runs, rivals)
    titles = {name: candidate["title"] for name, candidate in choices["candidates"].items()} | {TEACHER: "The teacher"}
    judged = student is not None and reference is not None
    result = {
        "made_with": made_with("kd_helpers.experiments.verdict"),
        "config": config.to_dict(),
        "plan": dataclasses.asdict(plan),
        "effect": ground.effect,
        "measure": ground.measure,
        "sizes": describe_splits(data).to_dict("index"),
        "steps": runs.steps,
        "seeds": len(runs.runs[BASELINE]),
        "unfinished": list(runs.unfinished),
        "losses": {str(length): dict(losses) for length, losses in runs.losses.items()},
        "rates": {arm: recipe.recipe.learning_rate for arm, recipe in runs.arms.items()},
        "choices": choices,
        "questions": questions(opened, student, runs.unfinished, ground.measure, ground.effect),
        "table": measures_table(opened, titles),
        "by_class": class_differences(opened, student, reference, data.label_names) if judged else [],
        "tries": tries,
    }
    return result, runs


def describe_plan(plan: Plan, setup: Setup, whole: Setup) -> str:
    """What is about to run, in words; `whole` is the setup before the budget cut anything."""
    config, data = setup.config, setup.data
    arms = ", ".join(arm.title for arm in arms_of(config, data).values())
    epochs = f"{config.teacher_epochs} epochs" if config.teacher_epochs else "not fine-tuned"
    lines = [
        f"teacher: {len(data.teacher_train):,} labelled texts; {epochs}",
        f"students: {len(data.train):,} labelled texts, {len(data.transfer):,} without labels",
        *_cuts(setup, whole),
        f"arms: {arms}",
        f"steps: {' or '.join(f'{length:,}' for length in plan.lengths)}, until more steps no longer help",
        f"seeds: {' or '.join(map(str, dict.fromkeys(plan.seeds[1:])))} of each arm",
    ]
    if plan.seconds:
        lines.append(f"time: about {math.ceil(plan.seconds / 60)} minutes at most")
    if plan.exceeds:
        lines.append("this is more than the budget, but the least that can be run; the answer is a rough one")
    elif plan.rough:
        lines.append(f"this is a rough answer: {ROUGH / 60:.0f} minutes or more would allow a better one")
    return "\n".join(lines)


def _cuts(setup: Setup, whole: Setup) -> list[str]:
    """What the budget has cut, a sentence each."""
    said = []
    kept, labelled = len(setup.data.teacher_train), len(whole.data.teacher_train)
    if kept < labelled:
        said.append(f"To keep to the budget, {kept:,} of {labelled:,} labelled texts are used.")
    unlabelled, readable = len(whole.data.transfer), len(setup.data.transfer)
    if readable < unlabelled:
        said.append(f"To keep to the budget, {readable:,} of {unlabelled:,} texts without labels are used.")
    epochs, wanted = setup.config.teacher_epochs, whole.config.teacher_epochs
    if epochs < wanted:
        said.append(f"To keep to the budget, the teacher is fine-tuned for {epochs} epochs instead of {wanted}.")
    tokens, before = setup.config.max_length, whole.config.max_length
    if tokens < before:
        said.append(f"To keep to the budget, texts are cut at {tokens} tokens instead of {before}.")
    return said
