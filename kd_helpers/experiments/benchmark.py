"""How fast is the course's loop? `python -m kd_helpers benchmark` measures it against the usual ways.

With `--serve` the command measures how fast teacher and student answer instead (see `serving`).

Every way trains the same student from the same first weights on the same texts for the same number of epochs. The ways
take turns, round after round, so that a machine that slows down slows all of them, and ratios within a round are
compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    DistilBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig, expanded
from kd_helpers.data import PAD_TO_MULTIPLE_OF, evaluation_batches, tokenize, training_batches
from kd_helpers.experiments import RESULTS
from kd_helpers.experiments.environment import environment
from kd_helpers.experiments.memory import peak_memory
from kd_helpers.experiments.overheads import evaluation_cost, run_cost, time_to_first_step
from kd_helpers.experiments.statistics import mean_interval
from kd_helpers.experiments.study import made_with
from kd_helpers.lean import lean_training
from kd_helpers.loop import distill_epoch, train_classifier
from kd_helpers.losses import distillation_loss
from kd_helpers.metrics import evaluate
from kd_helpers.models import Batch, freeze, load_student, model_inputs, random_like
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.resolve import resolve
from kd_helpers.runtime import processor, seed_everything
from kd_helpers.teacher import TeacherLogits, attach, cached_logits, fine_tuned_teacher

SHAPES = ("offline", "bert")
SWEPT_SETTINGS = [(temperature, alpha) for temperature in (1.0, 2.0, 4.0, 8.0) for alpha in (0.3, 0.5, 0.9)]
STEP_BATCH_SIZE = 64  # at which the share of the matrix units' peak is measured


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all ways share.

    Attributes:
        config: temperature, alpha, epochs, batch size, learning rate.
        teacher: frozen.
        student: makes the student of a seed, as it is before training.
        tokenizer: of both.
        texts: the tokenized training texts with the teacher's logits.
        validation: batches on which each trained student is measured, off the clock.
        device: where it runs.
        precision: of the ways that choose it.
    """

    config: DistillConfig
    teacher: PreTrainedModel
    student: Callable[[int], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    texts: datasets.Dataset
    validation: DataLoader[Any]
    device: torch.device
    precision: torch.dtype


def prepare_bench(shape: str, config: DistillConfig) -> Bench:
    """Teacher, student and texts; what the ways need before the clock starts.

    Args:
        shape: "offline" trains the course's student from its fine-tuned teacher; "bert" takes models of the shape
            of BERT-base and DistilBERT with random weights, which take as long as trained ones.
        config: sizes and settings.
    """
    setup = resolve(config)
    device, precision, data, tokenizer = setup.device, setup.precision, setup.data, setup.tokenizers.teacher
    if shape == "bert":
        teacher = freeze(AutoModelForSequenceClassification.from_config(BertConfig(num_labels=3))).to(device)
        base = AutoModelForSequenceClassification.from_config(DistilBertConfig(num_labels=3))

        def student(seed: int) -> PreTrainedModel:
            return random_like(base, seed=seed).to(device)

    else:
        teacher = fine_tuned_teacher(setup)

        def student(seed: int) -> PreTrainedModel:
            return load_student(config.replace(seed=seed), data.label_names).to(device)

    texts = tokenize(data.student_train, tokenizer, config.max_length)
    return Bench(
        config=config,
        teacher=teacher,
        student=student,
        tokenizer=tokenizer,
        texts=attach(texts, fresh_logits(teacher, texts, tokenizer, precision)),
        validation=evaluation_batches(tokenize(data.validation, tokenizer, config.max_length), tokenizer),
        device=device,
        precision=precision,
    )


def usual_loop(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """The loop of most tutorials: the teacher reads every batch, batches at random, float32, AdamW as it comes."""
    config = bench.config
    batches = DataLoader(
        _without_logits(bench).remove_columns(["id", "length"]),
        batch_size=config.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=DataCollatorWithPadding(bench.tokenizer),
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, config.epochs * len(batches))
    student.train()
    running = 0.0
    for _ in range(config.epochs):
        for batch in batches:
            with torch.no_grad():
                teacher_logits = bench.teacher(**model_inputs(bench.teacher, batch)).logits
            loss = _loss(bench, student(**model_inputs(student, batch)).logits, teacher_logits, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            running += loss.item()


def hugging_face_trainer(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """`transformers.Trainer` with the teacher in `compute_loss`, its own grouping by length and mixed precision."""
    from transformers import PrinterCallback, Trainer, TrainingArguments  # here, since they load much of the library

    class OnlineDistillation(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any) -> Any:
            with torch.no_grad():
                teacher_logits = bench.teacher(**model_inputs(bench.teacher, inputs)).logits
            outputs = model(**model_inputs(model, inputs))
            loss = _loss(bench, outputs.logits, teacher_logits, inputs)
            return (loss, outputs) if return_outputs else loss

    config = bench.config
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=bench.precision == torch.bfloat16,
            use_cpu=bench.device.type == "cpu",
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
        )
        trainer = OnlineDistillation(
            model=student,
            args=arguments,
            train_dataset=_without_logits(bench).remove_columns("id"),
            data_collator=DataCollatorWithPadding(bench.tokenizer, pad_to_multiple_of=PAD_TO_MULTIPLE_OF),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)  # else it stays under autocast


def plain_fine_tuning(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """The course's loop with alpha 0: what training the student costs when nobody teaches."""
    _train(dataclasses.replace(bench, config=bench.config.replace(alpha=0.0)), student, _without_logits(bench), seed)


def distillation_cold(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """The course's loop on a machine that has no teacher logits yet."""
    _train(bench, student, _with_fresh_logits(bench), seed)


def distillation_warm(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """The course's loop with cached teacher logits, as in every run but the first."""
    _train(bench, student, bench.texts, seed)


def distillation_float32(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """The same in float32, against which the accuracy of the faster precision is held."""
    _train(dataclasses.replace(bench, precision=torch.float32), student, bench.texts, seed)


def distillation_not_lean(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """The same without `lean_training`: the whole embedding table, torch's own dropout and attention."""
    _train(dataclasses.replace(bench, config=bench.config.replace(lean=False)), student, bench.texts, seed)


def distillation_online(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """The same, but the teacher runs at every step."""
    _train(bench, student, _without_logits(bench), seed, teacher=bench.teacher)


def distillation_random_batches(bench: Bench, student: PreTrainedModel, seed: int) -> None:
    """The same with texts of any length in a batch."""
    _train(bench, student, bench.texts, seed, pool_batches=1)


WAYS: dict[str, Callable[[Bench, PreTrainedModel, int], None]] = {
    "usual loop": usual_loop,
    "Trainer, online teacher": hugging_face_trainer,
    "distillation, online teacher": distillation_online,
    "distillation, float32": distillation_float32,
    "distillation, random batches": distillation_random_batches,
    "distillation, not lean": distillation_not_lean,
    "distillation, cold": distillation_cold,
    "distillation": distillation_warm,
    "fine-tuning": plain_fine_tuning,
}
# For readers of a table. Every way has the same student, texts, epochs and batch size.
DESCRIPTIONS = {
    "usual loop": "float32, random batches, the teacher runs at every step, PyTorch's AdamW with weight decay on all "
    "parameters, no warm-up",
    "Trainer, online teacher": "Hugging Face's `Trainer`: grouped by length, the teacher runs at every step, "
    "mixed precision where the machine is faster with it",
    "distillation": "the course's loop: batches of similar length, cached teacher logits, lean, "
    "bfloat16 where the machine is faster with it",
    "distillation, cold": "as *distillation*, but the time includes the one pass of the teacher over the texts",
    "distillation, not lean": "as *distillation*, with `lean=False`",
    "distillation, random batches": "as *distillation*, with texts of any length in a batch",
    "distillation, float32": "as *distillation*, in float32",
    "distillation, online teacher": "as *distillation*, but the teacher runs at every step",
    "fine-tuning": "the course's loop without a teacher (alpha 0)",
}


def fresh_logits(
    teacher: PreTrainedModel, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, precision: torch.dtype
) -> TeacherLogits:
    """The teacher's logits, computed into an empty cache and so never found."""
    with tempfile.TemporaryDirectory() as empty:
        return cached_logits(teacher, texts, tokenizer, precision=precision, root=Path(empty))


def _with_fresh_logits(bench: Bench) -> datasets.Dataset:
    return attach(bench.texts, fresh_logits(bench.teacher, bench.texts, bench.tokenizer, bench.precision))


def _without_logits(bench: Bench) -> datasets.Dataset:
    return bench.texts.remove_columns("teacher_logits")


def _loss(bench: Bench, student_logits: torch.Tensor, teacher_logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    labels = batch["labels"].to(student_logits.device)
    settings = {"temperature": bench.config.temperature, "alpha": bench.config.alpha}
    return distillation_loss(student_logits, teacher_logits, labels, **settings).total


def _train(
    bench: Bench,
    student: PreTrainedModel,
    texts: datasets.Dataset,
    seed: int,
    *,
    teacher: PreTrainedModel | None = None,
    pool_batches: int | None = None,
) -> None:
    batches = training_batches(texts, bench.tokenizer, bench.config.batch_size, seed=seed)
    if pool_batches is not None:
        batches.batch_sampler.pool_batches = pool_batches
    train_classifier(
        student, batches, config=bench.config, precision=bench.precision, teacher=teacher, description="Training"
    )


def time_ways(bench: Bench, ways: dict[str, Callable[..., None]], rounds: int) -> pd.DataFrame:
    """Let the ways take turns.

    Returns:
        One row a way and round: `seconds`, `tokens_per_second` (padding not counted), `peak_megabytes` above what was
        held before (NaN where it can't be read), and accuracy and NLL on validation, in float32 for all.
    """
    rows = []
    tokens = bench.config.epochs * sum(bench.texts["length"][:])
    names = list(ways)
    # Each round begins with another way, so that none always follows the same one.
    plan = [(turn, names[(turn + place) % len(names)]) for turn in range(rounds) for place in range(len(names))]
    turns = tqdm(plan, desc="Benchmark", unit="run", leave=False)
    for turn, name in turns:
        turns.set_postfix_str(name)
        student = bench.student(turn)
        seed_everything(turn)
        work = functools.partial(ways[name], bench, student, turn)
        with peak_memory(bench.device) as memory:
            seconds = timed(work, bench.device)
        measures = evaluate(student, bench.validation)
        rows.append(
            {
                "way": name,
                "round": turn,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                **memory,
                "accuracy": measures["accuracy"],
                "nll": measures["nll"],
            }
        )
    return pd.DataFrame(rows)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes, from an idle device until the device is done."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def sweep_cost(bench: Bench) -> dict[str, float]:
    """What twelve settings of T and alpha cost, the teacher logits included, against twelve plain trainings.

    Returns:
        `settings`, `sweep_seconds`, `plain_seconds` and their `ratio`.
    """
    with_logits: list[datasets.Dataset] = []
    sweep = timed(lambda: with_logits.append(_with_fresh_logits(bench)), bench.device)
    plain = 0.0
    for temperature, alpha in tqdm(SWEPT_SETTINGS, desc="Sweep", unit="setting", leave=False):
        changed = bench.config.replace(alpha=alpha, temperature=temperature)
        distil = functools.partial(
            _train, dataclasses.replace(bench, config=changed), bench.student(0), with_logits[0], 0
        )
        fine_tune = functools.partial(plain_fine_tuning, bench, bench.student(0), 0)
        sweep += timed(distil, bench.device)
        plain += timed(fine_tune, bench.device)
    return {"settings": len(SWEPT_SETTINGS), "sweep_seconds": sweep, "plain_seconds": plain, "ratio": sweep / plain}


def compile_cost(bench: Bench) -> dict[str, float]:
    """What `torch.compile` costs and brings.

    Returns:
        Seconds of one training: `compiled_first`, compilation included; `compiled_again`, the kernels being there;
        `uncompiled`.
    """
    student = bench.student(0)
    work = functools.partial(_train, bench, student, bench.texts, 0)
    uncompiled = timed(work, bench.device)
    with tempfile.TemporaryDirectory() as empty, environment({"TORCHINDUCTOR_CACHE_DIR": empty}):
        student.forward = torch.compile(student.forward, dynamic=True)
        first, again = (timed(work, bench.device) for _ in range(2))
    return {"compiled_first": first, "compiled_again": again, "uncompiled": uncompiled}


def step_share(bench: Bench, precision: torch.dtype, repeats: int = 30) -> dict[str, float]:
    """How much of the device's peak a step of the student reaches, on a batch of the middle length.

    Returns:
        `batch_size`, `tokens` (padding included), `gigaflop` of a step, `milliseconds` (median), `gigaflops` a second,
        `peak_gigaflops` a second of the fastest large matrix product, and their ratio `share`.
    """
    batch = _middle_batch(bench)
    with _lean_step(bench, batch, precision) as step:
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = statistics.median(timed(step, bench.device) for _ in range(repeats))
    peak = matrix_peak(bench.device, precision)
    reached = counter.get_total_flops() / seconds
    return {
        "batch_size": len(batch["labels"]),
        "tokens": batch["input_ids"].numel(),
        "gigaflop": counter.get_total_flops() / 1e9,
        "milliseconds": 1e3 * seconds,
        "gigaflops": reached / 1e9,
        "peak_gigaflops": peak / 1e9,
        "share": reached / peak,
    }


PEAK_SIZES = (1024, 2048, 4096)


def matrix_peak(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations a second of the fastest of some square matrix products."""
    repeats, best = 10, 0.0  # several in a row, or a fast GPU would spend its time waiting for Python
    for size in PEAK_SIZES:
        left, right = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
        products = functools.partial(_repeat, torch.matmul, left, right, times=repeats)
        seconds = min(timed(products, device) for _ in range(5))
        best = max(best, repeats * 2 * size**3 / seconds)
    return best


def _repeat(function: Callable[..., Any], *arguments: Any, times: int) -> None:
    for _ in range(times):
        function(*arguments)


# What the kernels of a step are for; the names are PyTorch's.
KERNELS = {
    "matrix products": ("mm", "addmm", "bmm", "scaled_dot_product"),
    "copies and casts": ("copy_", "_to_copy", "clone", "cat"),
    "AdamW": ("_fused_adamw_", "zero_grad", "AdamW"),
    "gradient norm and clipping": ("linalg_vector_norm", "_foreach_norm", "mul_", "_foreach_mul_"),
    "random numbers": ("random_", "bernoulli_", "native_dropout"),
    "embedding table": ("embedding", "index", "fill_"),
    "GELU, softmax, LayerNorm": ("gelu", "_softmax", "native_layer_norm", "log_softmax"),
}


def step_profile(bench: Bench, repeats: int = 20) -> dict[str, float]:
    """Where the time of a step of the student goes: the share of each kind of kernel (torch.profiler, by itself)."""
    on_gpu = bench.device.type == "cuda"
    with _lean_step(bench, _middle_batch(bench), bench.precision) as step:
        step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
            for _ in range(repeats):
                step()
    microseconds: dict[str, float] = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in profiled.key_averages():
        if event.device_type != DeviceType.CPU:  # a GPU's kernels, whose time the operators have as well
            continue
        microseconds[_kind(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(microseconds.values())
    return {kind: value / total for kind, value in sorted(microseconds.items(), key=lambda item: -item[1])}


def _kind(kernel: str) -> str:
    name = kernel.removeprefix("aten::")
    for kind, names in KERNELS.items():
        if any(name == known or (len(known) > 5 and known in name) for known in names):
            return kind
    return "other"


def _middle_batch(bench: Bench) -> Batch:
    by_length = sorted(range(len(bench.texts)), key=bench.texts["length"].__getitem__)
    start = max(0, len(by_length) // 2 - STEP_BATCH_SIZE // 2)
    middle = bench.texts.select(by_length[start : start + STEP_BATCH_SIZE])
    return next(iter(evaluation_batches(middle, bench.tokenizer, STEP_BATCH_SIZE)))


@contextlib.contextmanager
def _lean_step(bench: Bench, batch: Batch, precision: torch.dtype) -> Iterator[Callable[[], Any]]:
    """An optimiser step of a fresh student on one batch, to be repeated within."""
    student, config = bench.student(0), bench.config
    with lean_training(student, bench.texts["input_ids"][:]):
        optimizer = make_optimizer(student, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        scheduler = make_scheduler(optimizer, steps=1_000_000)
        settings = {"temperature": config.temperature, "alpha": config.alpha, "precision": precision}
        yield lambda: distill_epoch(student, [batch], optimizer, scheduler, **settings)


def run(shape: str, config: DistillConfig, *, rounds: int, compiled: bool) -> dict[str, Any]:
    """The whole benchmark.

    Returns:
        JSON-ready: `made_with`, `shape`, `config`, `ways` (see `time_ways`), `sweep` (see `sweep_cost`), `step` by
        precision (see `step_share`), `profile` (see `step_profile`), `evaluation` (see `evaluation_cost`), with the
        shape "offline" `run` and `start` (see `run_cost` and `time_to_first_step`), and, if asked for, `compile` (see
        `compile_cost`).
    """
    bench = prepare_bench(shape, config)
    short = dataclasses.replace(bench, texts=bench.texts.select(range(min(64, len(bench.texts)))))
    for way in WAYS.values():  # first calls load libraries and make kernels
        way(short, bench.student(0), 0)
    measured = time_ways(bench, WAYS, rounds)
    precisions = dict.fromkeys([bench.precision, torch.float32])
    return {
        "made_with": made_with("kd_helpers.experiments.benchmark")
        | {
            "precision": _name(bench.precision),
            "threads": torch.get_num_threads(),
            "processor": processor(bench.device),
        },
        "shape": shape,
        "config": config.to_dict(),
        "ways": measured.to_dict("records"),
        "sweep": sweep_cost(bench),
        "step": {_name(precision): step_share(bench, precision) for precision in precisions},
        "profile": step_profile(bench),
        "evaluation": evaluation_cost(bench.student(0).eval(), bench.validation, bench.tokenizer, bench.precision),
        **({"run": run_cost(config), "start": time_to_first_step(config)} if shape == "offline" else {}),
        **({"compile": compile_cost(bench)} if compiled else {}),
    }


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def _by_round(result: dict[str, Any], measure: str) -> pd.DataFrame:
    """One measure with a row a round and a column a way."""
    return pd.DataFrame(result["ways"]).pivot(index="round", columns="way", values=measure)


def ways_table(result: dict[str, Any]) -> pd.DataFrame:
    """One row a way, medians over the rounds, fastest last.

    Returns:
        `seconds` with `fastest` and `slowest` round, `times` (its time over the course's distillation, within a
        round), `tokens_per_second`, `peak_megabytes`, mean `accuracy` and `nll`.
    """
    seconds = _by_round(result, "seconds")
    table = (
        pd.DataFrame(result["ways"])
        .groupby("way")
        .agg(
            seconds=("seconds", "median"),
            fastest=("seconds", "min"),
            slowest=("seconds", "max"),
            tokens_per_second=("tokens_per_second", "median"),
            peak_megabytes=("peak_megabytes", "median"),
            accuracy=("accuracy", "mean"),
            nll=("nll", "mean"),
        )
    )
    table.insert(3, "times", seconds.div(seconds["distillation"], axis=0).median())
    return table.sort_values("seconds", ascending=False)


def ratio(result: dict[str, Any], way: str, other: str) -> float:
    """Time of one way over that of another: median of the ratios within a round."""
    seconds = _by_round(result, "seconds")
    return float((seconds[way] / seconds[other]).median())


def accuracy_gap(result: dict[str, Any], way: str, other: str) -> tuple[float, float, float]:
    """Accuracy on validation of one way minus that of another, seed by seed: mean, low and high (95%)."""
    accuracy = _by_round(result, "accuracy")
    return mean_interval(accuracy[way] - accuracy[other])


def targets(result: dict[str, Any]) -> pd.DataFrame:
    """What the course's loop is meant to reach: `measured`, `target` and whether it is `met`."""
    share, sweep = result["step"][result["made_with"]["precision"]]["share"], result["sweep"]["ratio"]
    settings = len(SWEPT_SETTINGS)
    rows = [
        ("time of distillation ÷ fine-tuning", ratio(result, "distillation", "fine-tuning"), "≤", 1.03),
        ("time of the usual loop ÷ distillation", ratio(result, "usual loop", "distillation"), "≥", 7.0),
        ("time of the Trainer ÷ distillation", ratio(result, "Trainer, online teacher", "distillation"), "≥", 3.0),
        (f"time of {settings} settings, teacher run once ÷ {settings} fine-tunings", sweep, "≤", 1.08),
        (f"share of the machine's peak in a step of {STEP_BATCH_SIZE} texts", share, "≥", 0.3),
    ]
    if "evaluation" in result:  # results of version 0.4.0 and before lack it
        rows.append(("time of evaluation ÷ forward passes alone", result["evaluation"]["ratio"], "≤", 1.3))
    if "run" in result:
        rows.append(("seconds of a run outside steps and evaluations", result["run"]["outside"], "≤", 3.0))
        rows.append(("seconds from import to the first step", result["start"]["first_step"], "≤", 5.0))
    table = pd.DataFrame(rows, columns=["", "measured", "sign", "target"]).set_index("")
    below = table["measured"] <= table["target"]
    table["met"] = below.where(table["sign"] == "≤", table["measured"] >= table["target"])
    table["target"] = table["sign"] + " " + table["target"].map("{:g}".format)
    return table.drop(columns="sign")


def report(result: dict[str, Any]) -> str:
    """The benchmark as plain text."""
    made, config = result["made_with"], result["config"]
    difference, low, high = accuracy_gap(result, "distillation", "usual loop")
    step = "\n".join(
        f"  {precision:9} {row['milliseconds']:7.1f} ms, "
        f"{row['gigaflops']:,.0f} of {row['peak_gigaflops']:,.0f} GFLOP/s: {row['share']:.1%}"
        for precision, row in result["step"].items()
    )
    where = "\n".join(f"  {kind:28} {share:6.1%}" for kind, share in result["profile"].items())
    return f"""{made["processor"]}, {made["threads"]} threads, torch {made["torch"]}, {made["precision"]}
shape {result["shape"]}: {config["train_size"]:,} texts, {config["epochs"]} epochs, batches of {config["batch_size"]}

{ways_table(result).round(3).to_string(index_names=False)}

accuracy, distillation minus usual loop: {difference:+.3f} ({low:+.3f} to {high:+.3f})

A step of the student, {STEP_BATCH_SIZE} texts
{step}

Where its time goes
{where}

{targets(result).round(3).to_string()}
{_compile_line(result)}"""


def _compile_line(result: dict[str, Any]) -> str:
    if "compile" not in result:
        return ""
    seconds = result["compile"]
    return (
        f"\ntorch.compile: {seconds['compiled_first']:.1f} s the first time, {seconds['compiled_again']:.1f} s again, "
        f"{seconds['uncompiled']:.1f} s without (one run each)\n"
    )


def stored_benchmark() -> dict[str, Any]:
    """The benchmark that comes with the course, made by `make benchmark`."""
    return artifacts.load_json(RESULTS / "benchmark.json")


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers benchmark") -> int:
    """Measure the course's loop against the usual ways and write benchmark.json.

    Returns:
        Exit status: 0. A request that can't be met exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Time the course's training loop against the usual ways of distilling, in turn, on this machine. "
        "Run it on an idle machine: times of a busy one say little.",
        epilog=f"Example: {prog} --texts 500 --rounds 3. Prints a report and writes benchmark.json (or serving.json).",
    )
    parser.add_argument(
        "--serve",
        nargs="?",
        const="",
        metavar="RUN",
        help="instead, time how fast teacher and student answer, in torch, as ONNX and with weights of eight bits: "
        "those of a run's folder, or the course's own; needs kd-helpers[deploy]",
    )
    parser.add_argument("--shape", choices=SHAPES, default="offline", help="of the models; bert has random weights")
    parser.add_argument("--texts", type=int, default=1000, help="labelled tweets to train on (default 1000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (default 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts in a step (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="how often the ways take turns; each has its own seed")
    parser.add_argument("--compile", action="store_true", help="also train a student compiled by torch.compile")
    parser.add_argument("--out", type=Path, default=None, help="folder; artifacts/benchmark when left out")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds is {chosen.rounds}; give at least 1.")
    try:
        config = DistillConfig(train_size=chosen.texts, epochs=chosen.epochs, batch_size=chosen.batch_size)
        folder = Path(expanded(chosen.out or artifacts.artifacts_dir() / "benchmark", "--out"))
        artifacts.make_folder(folder)  # before anything is measured that could not be written
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if chosen.serve is not None:
        return _serve(chosen.serve, folder, prog)
    result = run(chosen.shape, config, rounds=chosen.rounds, compiled=chosen.compile)
    artifacts.save_json(folder / "benchmark.json", result)
    print(report(result) + f"\nwritten to {folder / 'benchmark.json'}")
    return 0


def _serve(source: str, folder: Path, prog: str) -> int:
    from kd_helpers.experiments import serving  # here, since it needs onnxruntime

    try:
        result = serving.run(source)
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    artifacts.save_json(folder / "serving.json", result)
    print(serving.report(result) + f"\nwritten to {folder / 'serving.json'}")
    return 0
