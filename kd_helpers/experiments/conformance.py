"""The same loss elsewhere: what other toolkits compute when they are given our logits, temperature and alpha.

Toolkits agree on the formula and differ in what is around it: one multiplies by T² and another does not, alpha weights
the soft loss here and the hard loss there, one takes the mean over the classes too. None warns its users. So their
own code is run and compared:

1. `cases` are the same logits and labels for all, at several temperatures, alphas and sizes.
2. `definition` is this course's loss, written out in float64 without any library.
3. A `Reading` says in what respects a loss departs from the definition. `computed` is what a toolkit with this reading
   must return. `reading_of` tries all readings, those with the fewest departures first, and keeps the first that
   reproduces value and gradient of every case. No reading is assumed.
4. `translated` derives from a reading what to set there for our temperature and alpha. The toolkit is run again with
   these settings, and value and gradient are held against the definition.

`python -m kd_helpers conformance` (or `make conformance`) installs each toolkit into a folder of its own,
measures it in a process of its own, and stores the result. The adapters are in `conformance_toolkits`.

Shapes: N examples, C classes; of tokens B texts, L tokens of each, V tokens in the vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from kd_helpers import artifacts
from kd_helpers.experiments import RESULTS
from kd_helpers.experiments.conformance_toolkits import TOOLKITS, Batch, Call, Toolkit
from kd_helpers.experiments.token_speed import compared

TOLERANCE = 1e-6  # relative, of value and gradient
TEMPERATURES = (1.0, 2.0, 4.0)
ALPHAS = (0.0, 0.3, 0.9, 1.0)
SIZES = (1, 8, 32)
CLASSES = (2, 3, 20)
SPREAD = 2.0  # standard deviation of the logits
CONFIDENT = 20.0  # the same where both models are so sure that some probabilities lie far below 1e-7
NO_LABEL = -100


# --- Cases ---


class Case(NamedTuple):
    """A batch, its settings, and what is particular about it.

    Attributes:
        kind: "labelled" (every example has a label), "unlabelled" (a quarter has none), "confident" (probabilities
            close to 0 and 1) or "tokens" (`[B, L, V]`, with padding).
        batch: in float64.
        temperature: T.
        alpha: weight of the soft loss.
    """

    kind: str
    batch: Batch
    temperature: float
    alpha: float


def cases(*, tokens: bool = True) -> list[Case]:
    """The cases of a toolkit, the same for all; those of tokens only where a toolkit takes them."""
    generator = torch.Generator().manual_seed(0)

    def batch(*shape: int, spread: float = SPREAD) -> Batch:
        student, teacher = (spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return Batch(student, teacher, torch.randint(shape[-1], shape[:-1], generator=generator))

    batches = [("labelled", batch(size, classes)) for size in SIZES for classes in CLASSES]
    for size, classes in itertools.product(SIZES[1:], CLASSES):
        some = batch(size, classes)
        some.labels[::4] = NO_LABEL
        batches.append(("unlabelled", some))
    batches += [("confident", batch(SIZES[1], classes, spread=CONFIDENT)) for classes in CLASSES]
    padded = batch(4, 6, 20)
    for row, length in enumerate((6, 4, 1, 5)):
        padded.labels[row, length:] = NO_LABEL
    if tokens:
        batches.append(("tokens", padded))
    settings = itertools.product(batches, TEMPERATURES, ALPHAS)
    return [Case(kind, one, temperature, alpha) for (kind, one), temperature, alpha in settings]


# --- The definition ---


def definition(batch: Batch, temperature: float, alpha: float) -> torch.Tensor:
    """`alpha · T² · KL(p_T ‖ q_S) + (1 − alpha) · CE`, a scalar in the precision of the logits.

    For `[N, C]` the soft loss is a mean over all examples and the hard loss over those that have a label. For
    `[B, L, V]` both are means over the tokens that have one: the others are padding.
    """
    student, teacher, labels = counted(batch)
    soft = temperature**2 * kl(log_softmax(teacher / temperature), log_softmax(student / temperature)).mean()
    return alpha * soft + (1 - alpha) * hard_loss(student, labels)


def counted(batch: Batch) -> Batch:
    """Rows of logits `[N, C]` and their labels `[N]`; of tokens those that count."""
    if batch.student.ndim == 2:
        return batch
    return labelled(Batch(batch.student.flatten(0, -2), batch.teacher.flatten(0, -2), batch.labels.flatten()))


def labelled(batch: Batch) -> Batch:
    """The rows that have a label."""
    return Batch(*(part[batch.labels != NO_LABEL] for part in batch))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """`z − log Σ exp(z)`, shape as the logits."""
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`Σ p (log p − log q)` of each row, from `[N, C]` to `[N]`."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def hard_loss(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of `−log q(label)` over the rows that have a label."""
    rows = labels != NO_LABEL
    return -log_softmax(student)[rows].gather(-1, labels[rows, None]).mean()


# --- What a toolkit computes ---


def cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`−Σ p log q` of each row: KL plus the teacher's entropy."""
    return -(log_softmax(teacher).exp() * log_softmax(student)).sum(dim=-1)


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Half of `KL(p ‖ m) + KL(q ‖ m)` of each row, where m is the mean of p and q."""
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def cut_off(values: torch.Tensor) -> torch.Tensor:
    """Values between 1e-7 and 1, as Keras keeps probabilities."""
    return values.clip(1e-7, 1)


def kl_of_numbers(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`Σ a log(a / b)` of each row, where a and b are what is given for teacher and student, cut off."""
    return (cut_off(teacher) * (cut_off(teacher) / cut_off(student)).log()).sum(dim=-1)


# How far a student's logits are from a teacher's, row by row, both divided by T already.
DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "KL": lambda student, teacher: kl(log_softmax(teacher), log_softmax(student)),
    "cross-entropy": cross_entropy,
    "KL, probabilities kept above 1e-7": lambda student, teacher: kl_of_numbers(
        log_softmax(student).exp(), log_softmax(teacher).exp()
    ),
    "reverse KL": lambda student, teacher: kl(log_softmax(student), log_softmax(teacher)),
    "Jensen-Shannon": jensen_shannon,
    "squared distance of the logits": lambda student, teacher: (student - teacher).square().sum(dim=-1),
    "KL of the logits, without softmax": kl_of_numbers,
}
SAME_STUDENT = ("KL", "cross-entropy", "KL, probabilities kept above 1e-7")  # what settings can translate


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a loss computes; the defaults are the definition's.

    Attributes:
        weight_of: the loss that the toolkit's one weight multiplies, "soft" or "hard".
        t_squared: whether the soft loss is multiplied by T²: "always", "never", or "beside a hard loss", when T² is
            dropped where the hard loss has no weight.
        mean_over: what the soft loss is divided by: "N", or "N · C" with the classes.
        divergence: a key of `DIVERGENCES`.
        divided: whose logits the soft loss divides by T: "both", "teacher" or "none".
        unlabelled: whether examples without a label count in the soft loss: "counted" or "left out".
    """

    weight_of: str = "soft"
    t_squared: str = "always"
    mean_over: str = "N"
    divergence: str = "KL"
    divided: str = "both"
    unlabelled: str = "counted"

    def departures(self) -> list[str]:
        """The attributes in which this is not the definition."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]


def readings(call: Call) -> list[Reading]:
    """All readings that make sense for a call, those with the fewest departures first."""
    options = {
        "weight_of": ("soft", "hard") if len(call.weights) == 1 else ("soft",),
        # Without an argument T, T² cannot be there.
        "t_squared": ("always", "never", "beside a hard loss") if call.takes_temperature else ("never",),
        "mean_over": ("N", "N · C"),
        "divergence": tuple(DIVERGENCES),
        "divided": ("both", "teacher", "none") if call.takes_temperature else ("both",),
        "unlabelled": ("counted", "left out"),
    }
    found = [Reading(**dict(zip(options, values, strict=True))) for values in itertools.product(*options.values())]
    return sorted(found, key=lambda reading: len(reading.departures()))


class Settings(NamedTuple):
    """What is set in a toolkit.

    Attributes:
        temperature: its T; for a toolkit without one, what the user divides the logits by.
        weights: the values of its own weights. A toolkit without weights: those of the soft and of the hard loss.
        factor: what its total is multiplied by afterwards.
        entropy: how many times the teacher's entropy at T is subtracted from its total, which moves no gradient.
    """

    temperature: float
    weights: tuple[float, ...]
    factor: float = 1.0
    entropy: float = 0.0


def as_named(call: Call, case: Case) -> Settings:
    """Our temperature and alpha in the place of the toolkit's own, as somebody would copy them."""
    weights = (case.alpha,) if len(call.weights) == 1 else (case.alpha, 1 - case.alpha)
    return Settings(case.temperature if call.takes_temperature else 1.0, weights)


def computed(reading: Reading, settings: Settings, batch: Batch) -> torch.Tensor:
    """What a toolkit returns that computes this reading, in float64."""
    batch = counted(batch)
    soft, hard = settings.weights if len(settings.weights) == 2 else (settings.weights[0], 1 - settings.weights[0])
    if reading.weight_of == "hard":
        soft, hard = hard, soft
    rows = labelled(batch) if reading.unlabelled == "left out" else batch
    t = settings.temperature
    student = rows.student / (t if reading.divided == "both" else 1)
    teacher = rows.teacher / (1 if reading.divided == "none" else t)
    distance = DIVERGENCES[reading.divergence](student, teacher).mean()
    if reading.mean_over == "N · C":
        distance = distance / batch.student.shape[-1]
    if reading.t_squared == "always" or (reading.t_squared == "beside a hard loss" and hard > 0):
        distance = t**2 * distance
    return soft * distance + hard * hard_loss(batch.student, batch.labels)


def translated(reading: Reading, call: Call, case: Case) -> Settings:
    """What to set in a toolkit with this reading, so that its total is the definition at our T and alpha."""
    times = 1.0  # what is missing in its soft loss
    if reading.t_squared == "never" or (reading.t_squared == "beside a hard loss" and case.alpha == 1):
        times *= case.temperature**2
    if reading.mean_over == "N · C":
        times *= case.batch.student.shape[-1]
    soft, hard = case.alpha * times, 1 - case.alpha
    factor = 1.0
    weights: tuple[float, ...] = (soft, hard)
    if len(call.weights) == 1:  # its weights sum to 1
        factor = soft + hard
        weights = (soft / factor,) if reading.weight_of == "soft" else (1 - soft / factor,)
    entropy = case.alpha * case.temperature**2 if reading.divergence == "cross-entropy" else 0.0
    return Settings(case.temperature, weights, factor, entropy)


# --- Comparing ---


class Measured(NamedTuple):
    """A loss and its gradient on the student's logits, in float64."""

    value: torch.Tensor
    gradient: torch.Tensor


def measured(loss: Callable[[Batch], torch.Tensor], batch: Batch, precision: torch.dtype = torch.float64) -> Measured:
    """Compute a loss of logits in some precision, and its gradient."""
    student = batch.student.to(precision).requires_grad_()
    value = loss(Batch(student, batch.teacher.to(precision), batch.labels))
    gradient = torch.zeros_like(student)
    if value.requires_grad:  # a loss that ignores the student has none
        (found,) = torch.autograd.grad(value, student, allow_unused=True)
        gradient = gradient if found is None else found
    return Measured(value.detach().double(), gradient.double())


def expected(case: Case) -> Measured:
    """The definition."""
    return measured(partial(definition, temperature=case.temperature, alpha=case.alpha), case.batch)


def returned(call: Call, case: Case, settings: Settings) -> Measured:
    """What a toolkit returns with some settings, its own code run."""

    def total(batch: Batch) -> torch.Tensor:
        temperature: tuple[float, ...] = (settings.temperature,)
        theirs = batch
        if not call.takes_temperature:
            theirs = batch._replace(student=batch.student / temperature[0], teacher=batch.teacher / temperature[0])
            temperature = ()
        if call.weights:
            loss = call.adapter(theirs, *temperature, *settings.weights)
        else:
            soft, hard = settings.weights
            rows = counted(batch)
            loss = soft * call.adapter(theirs, *temperature) + hard * hard_loss(rows.student, rows.labels)
        if settings.entropy:
            log_p = log_softmax(counted(batch).teacher.double() / settings.temperature)
            return settings.factor * loss + settings.entropy * (log_p.exp() * log_p).sum(dim=-1).mean()
        return settings.factor * loss

    printed = contextlib.redirect_stdout(io.StringIO())
    with printed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measured(total, case.batch, call.precision)


def relative_error(found: Measured, wanted: Measured) -> float:
    """The larger of the relative errors of value and gradient; infinite where one is not a number."""
    errors = [
        ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()
        for ours, theirs in zip(found, wanted, strict=True)
    ]
    return max(math.inf if math.isnan(error) else error for error in errors)


def tolerances(call: Call, chosen: Iterable[Case]) -> list[float]:
    """What relative error counts as rounding, for each case: `TOLERANCE`, in float32 more where much is cancelled.

    KL is a small difference of cross-entropy and entropy. Rounding is relative to these two, so relative to KL it is
    larger, by as much as they are larger than KL. A toolkit that computes in float32 is allowed twice that.
    """
    if call.precision == torch.float64:
        return [TOLERANCE for _ in chosen]
    return [max(TOLERANCE, 2 * torch.finfo(call.precision).eps * cancelled(case)) for case in chosen]


def cancelled(case: Case) -> float:
    """How much larger the numbers are that are added and subtracted in the definition than the definition itself."""
    student, teacher, labels = counted(case.batch)
    t, alpha = case.temperature, case.alpha
    soft = t**2 * (cross_entropy(student / t, teacher / t) + cross_entropy(teacher / t, teacher / t)).mean()
    total = definition(case.batch, t, alpha)
    return ((alpha * soft + (1 - alpha) * hard_loss(student, labels)) / total).item()


def reading_of(
    call: Call, chosen: Sequence[Case], found: Sequence[Measured], allowed: Sequence[float]
) -> Reading | None:
    """The first reading that reproduces what a toolkit returned with our settings in every case, or None."""

    def fits(reading: Reading) -> bool:
        return all(
            relative_error(theirs, measured(partial(computed, reading, as_named(call, case)), case.batch)) <= tolerance
            for case, theirs, tolerance in zip(chosen, found, allowed, strict=True)
        )

    return next((reading for reading in readings(call) if fits(reading)), None)


def measure(call: Call) -> dict[str, Any]:
    """Run a toolkit's loss on all cases, read what it computes, translate, and run it again.

    Returns:
        Ready for JSON: `call`, `weights`, `takes_temperature`, `tokens`, `precision`; `cases`; `reading` (its
        attributes, or None); `before` and `after`, the largest relative error with our settings and with the
        translated ones; `after_where_it_fits`, the same over the cases that fit; `equal` and `translated`, how many
        cases fit; `fits`, for each kind of case the temperatures at which all of them fit after the translation;
        `ratio`, least, median and largest of its total with our settings, divided by ours.
    """
    chosen = cases(tokens=call.tokens)
    wanted = [expected(case) for case in chosen]
    allowed = tolerances(call, chosen)
    named = [returned(call, case, as_named(call, case)) for case in chosen]
    reading = reading_of(call, chosen, named, allowed)
    after = [
        returned(call, case, translated(reading, call, case)) if reading else theirs
        for case, theirs in zip(chosen, named, strict=True)
    ]
    frame = pd.DataFrame([{"kind": case.kind, "temperature": case.temperature} for case in chosen])
    frame["before"], frame["after"] = (
        [relative_error(theirs, ours) for theirs, ours in zip(found, wanted, strict=True)] for found in (named, after)
    )
    frame["equal"], frame["translated"] = (frame[when] <= allowed for when in ("before", "after"))
    fits = frame.groupby(["kind", "temperature"], sort=False)["translated"].all()
    ratios = [(theirs.value / ours.value).item() for theirs, ours in zip(named, wanted, strict=True)]
    return {
        "call": call.name,
        "weights": list(call.weights),
        "takes_temperature": call.takes_temperature,
        "tokens": call.tokens,
        "precision": str(call.precision).removeprefix("torch."),
        "cases": len(frame),
        "reading": dataclasses.asdict(reading) if reading else None,
        "before": frame["before"].max(),
        "after": frame["after"].max(),
        "after_where_it_fits": frame["after"][frame["translated"]].max() if frame["translated"].any() else None,
        "equal": int(frame["equal"].sum()),
        "translated": int(frame["translated"].sum()),
        "fits": {kind: [float(t) for t in TEMPERATURES if fits[kind, t]] for kind in frame["kind"].drop_duplicates()},
        "ratio": [min(ratios), statistics.median(ratios), max(ratios)],
    }


def verdict(row: Mapping[str, Any]) -> str:
    """What a measured row shows.

    Returns:
        "equal" (with our T and alpha in the place of its own), "translated" (with other settings, in every case),
        "partly" (at some temperatures or for some kinds of cases), or "differs".
    """
    if row["equal"] == row["cases"]:
        return "equal"
    if row["translated"] == row["cases"]:
        return "translated"
    return "partly" if any(row["fits"].values()) else "differs"


# --- Running every toolkit where it is installed ---


def measure_toolkit(toolkit: Toolkit) -> dict[str, Any]:
    """The rows of a toolkit that is installed here, and why calls of it could not run.

    A row has the `reading`, the `verdict` and the errors (see `measure`), and of a call that is timed `speed` (see
    `token_speed.compared`).
    """
    package = re.split("[<=>]", toolkit.requirements[0])[0]
    version = importlib.metadata.version(package)
    found: dict[str, Any] = {"toolkit": toolkit.name, "version": version, "rows": [], "not_run": []}
    for call in toolkit.calls:
        try:
            row = measure(call)
            speed = {"speed": compared(call)} if call.timed else {}
        except Exception as error:  # whatever a toolkit raises is the answer
            found["not_run"].append({"call": call.name, "reason": reason(error)})
        else:
            found["rows"].append(row | {"verdict": verdict(row)} | speed)
    return found


def reason(error: BaseException) -> str:
    """The first line of an error, without anything that names a place on this machine."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {re.sub(r'[ (]*[^ (]*/[^ ]*', '', first).strip()}"


def measured_elsewhere(toolkit: Toolkit, folder: Path) -> dict[str, Any]:
    """Install a toolkit into an empty folder, without its dependencies, and measure it in a process of its own.

    What the toolkit imports beside its requirements is that of the course's environment, above all torch. So no two
    toolkits have to agree on a version, and none changes the course's environment.
    """
    shutil.rmtree(folder, ignore_errors=True)
    packages, result = folder / "packages", folder / "result.json"
    python = [sys.executable, "-m"]
    install = ["pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", packages]
    offline = {"PYTHONPATH": str(packages), "KERAS_BACKEND": "torch", "HF_HUB_OFFLINE": "1"}
    needed = [name for name in toolkit.requirements if name != "kd-helpers"]
    steps = [[*python, *install, *needed]] if needed else []
    steps.append([*python, "kd_helpers.experiments.conformance", "--measure", toolkit.name, "--out", result])
    for words, step in zip(("pip could not install it", "its process broke off")[-len(steps) :], steps, strict=True):
        done = subprocess.run(step, env={**os.environ, **offline}, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            calls = [{"call": call.name, "reason": words} for call in toolkit.calls]
            return {"toolkit": toolkit.name, "version": None, "rows": [], "not_run": calls}
    shutil.rmtree(packages, ignore_errors=True)
    return artifacts.load_json(result)


def run(folder: Path, toolkits: Sequence[Toolkit] = TOOLKITS) -> dict[str, Any]:
    """Measure all toolkits, each in a folder of its own.

    Returns:
        Ready for JSON: `made_with`, `tolerance`, and `toolkits` (see `measure_toolkit`).
    """
    from kd_helpers.experiments.study import made_with  # here, since a toolkit's process must not load it

    found = []
    for toolkit in toolkits:
        print(f"{toolkit.name} …", flush=True)
        found.append(measured_elsewhere(toolkit, folder / toolkit.name.replace(" ", "_")))
    return {
        "made_with": made_with("kd_helpers.experiments.conformance"),
        "tolerance": TOLERANCE,
        "toolkits": found,
    }


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers conformance") -> int:
    """Measure all toolkits and write conformance.json; with `--measure`, one that is installed here.

    Returns:
        Exit status: 0.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run the distillation losses of other toolkits on the same logits and compare them with ours.",
    )
    parser.add_argument("--measure", choices=[toolkit.name for toolkit in TOOLKITS], help="only this one, here")
    parser.add_argument("--out", type=Path, default=RESULTS / "conformance.json", help="the file to write")
    chosen = parser.parse_args(arguments)
    if chosen.measure:
        toolkit = next(toolkit for toolkit in TOOLKITS if toolkit.name == chosen.measure)
        artifacts.save_json(chosen.out, measure_toolkit(toolkit))
        return 0
    result = run(artifacts.artifacts_dir() / "conformance")
    artifacts.save_json(chosen.out, result)
    print(report(result))
    print(f"written to {chosen.out}")
    return 0


# --- The stored result ---


def stored_conformance() -> dict[str, Any]:
    """The result that comes with the course, made by `make conformance`."""
    return artifacts.load_json(RESULTS / "conformance.json")


def rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The measured rows, each with its `toolkit` and `version`; this course's own is left out."""
    for toolkit in result["toolkits"]:
        if toolkit["toolkit"] != "this course":
            for row in toolkit["rows"]:
                yield {"toolkit": toolkit["toolkit"], "version": toolkit["version"], **row}


def not_run(result: Mapping[str, Any]) -> list[str]:
    """What could not be measured, and why, a line for each."""
    return [
        f"{toolkit['toolkit']} {toolkit['version'] or ''}".strip() + f", `{call['call']}`: {call['reason']}"
        for toolkit in result["toolkits"]
        for call in toolkit["not_run"]
    ]


def errors_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """Verdict and largest relative error of each call, by `toolkit` and `call`.

    `before` is the error with our settings, `after` with the translated ones, and `after_where_it_fits` the same over
    the cases that fit: all of them, unless the verdict is "partly" or "differs".
    """
    columns = ["toolkit", "version", "call", "precision", "verdict", "cases", "equal", "translated"]
    errors = ["before", "after", "after_where_it_fits"]
    return pd.DataFrame(rows(result))[columns + errors].set_index(["toolkit", "call"])


def translation_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """What each toolkit's loss computes and what to set there for our T and alpha, in Markdown.

    Bold is what departs from this course's definition.
    """
    return pd.DataFrame(
        [
            {
                "loss": f"{row['toolkit']} {row['version']}, `{row['call']}`",
                "what it computes": "; ".join(
                    filter(None, [weight_of(row), f"T²: {t_squared(row)}", f"mean over {mean_over(row)}", note(row)])
                ),
                "for our T and alpha, set": f"{instruction(row)} (*{verdict(row)}*)",
            }
            for row in rows(result)
        ]
    )


def speed_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """Time and memory of other toolkits' token losses against ours, as texts."""
    return pd.DataFrame(
        [
            {
                "loss": f"{row['toolkit']} {row['version']}, `{row['call']}`",
                "vocabulary": f"{speed['vocabulary']:,}",
                "toolkit, ms": f"{1e3 * speed['seconds']:.0f}",
                "ours, ms": f"{1e3 * speed['ours_seconds']:.0f}",
                "toolkit ÷ ours": f"{speed['times']:.1f}",
                "toolkit, MB": f"{speed['megabytes']:.0f}",
                "ours, MB": f"{speed['ours_megabytes']:.0f}",
            }
            for row in rows(result)
            for speed in row.get("speed", ())
        ]
    )


def as_markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    lines = [list(table.columns), [":--"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def weight_of(row: Mapping[str, Any]) -> str:
    """What a toolkit's weights multiply, in a few words; nothing where it has none."""
    names = [f"`{name}`" for name in row["weights"]]
    if not names:
        return ""
    if len(names) == 2:
        return f"{names[0]}: soft, {names[1]}: hard"
    return f"{names[0]}: {_marked(row, 'weight_of')}"


def t_squared(row: Mapping[str, Any]) -> str:
    """Whether T² is there, in a few words."""
    if not row["takes_temperature"]:
        return "**no T**"
    words = {"always": "yes", "never": "no", "beside a hard loss": "only beside a hard loss"}
    return _marked(row, "t_squared", words)


def mean_over(row: Mapping[str, Any]) -> str:
    """What the soft loss is a mean over."""
    return _marked(row, "mean_over").replace("N", "tokens" if row["tokens"] else "N")


def _marked(row: Mapping[str, Any], name: str, words: Mapping[str, str] | None = None) -> str:
    """An attribute of a row's reading, in bold if it departs from the definition."""
    if row["reading"] is None:
        return "?"
    reading = Reading(**row["reading"])
    value = (words or {}).get(getattr(reading, name), getattr(reading, name))
    return f"**{value}**" if name in reading.departures() else value


def instruction(row: Mapping[str, Any]) -> str:
    """What to set in a toolkit for our T and alpha, in words; what `translated` computes in numbers."""
    if verdict(row) == "differs":
        return "not possible with this call"
    reading = Reading(**row["reading"])
    only_at_1 = reading.divided != "both"
    missing = ["T²"] if reading.t_squared == "never" and not only_at_1 else []
    missing += ["C"] if reading.mean_over == "N · C" else []
    soft = " · ".join(["alpha", *missing])
    names = [f"`{name}`" for name in row["weights"]]
    if not names:
        words = f"{soft} × its loss + (1 − alpha) × hard loss"
    elif len(names) == 2:
        words = f"{names[0]} = {soft}, {names[1]} = 1 − alpha"
    elif missing:
        share = f"{soft} / s" if reading.weight_of == "soft" else "(1 − alpha) / s"
        words = f"{names[0]} = {share}, the total × s, where s = {soft} + 1 − alpha"
    else:
        words = f"{names[0]} = {'alpha' if reading.weight_of == 'soft' else '1 − alpha'}"
    if reading.t_squared == "beside a hard loss":
        words += "; at alpha = 1 the total × T²"
    if not row["takes_temperature"]:
        words = f"divide both logits by T; {words}"
    return f"{words} (at T = 1 only)" if only_at_1 else words


def note(row: Mapping[str, Any]) -> str:
    """In what a loss departs from the definition beyond its settings."""
    if row["reading"] is None:
        low, middle, high = row["ratio"]
        return f"not understood: {low:.2g} to {high:.2g} times ours, {middle:.2g} in the middle"
    reading, words = Reading(**row["reading"]), []
    if reading.divergence == "cross-entropy":
        words.append("cross-entropy: a larger value, the same gradient")
    elif reading.divergence != "KL":
        words.append(reading.divergence)
    if reading.divided == "none":
        words.append("its T does not reach the loss")
    elif reading.divided == "teacher":
        words.append("only the teacher's logits are divided by T")
    if reading.unlabelled == "left out":
        words.append("rows without a label are left out")
    return "; ".join(words)


def report(result: Mapping[str, Any]) -> str:
    """The result as plain text."""
    with pd.option_context("display.width", 200, "display.max_columns", 20, "display.float_format", "{:.1e}".format):
        lines = [errors_table(result).to_string(), "", *not_run(result)]
    for row in rows(result):
        lines.append(f"{row['toolkit']} {row['version']}, {row['call']}: {instruction(row)}. {note(row)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
