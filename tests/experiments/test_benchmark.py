"""The benchmark: every way trains what it says, on all texts; the clock is fair; the report says what was measured."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import tiny_bert

import kd_helpers
from kd_helpers import loop
from kd_helpers.config import DistillConfig
from kd_helpers.course import plots
from kd_helpers.data import evaluation_batches
from kd_helpers.experiments import benchmark
from kd_helpers.experiments.benchmark import WAYS, Bench
from kd_helpers.experiments.memory import peak_memory
from kd_helpers.lean import lean_training
from kd_helpers.losses import soft_loss
from kd_helpers.metrics import predict
from kd_helpers.models import freeze
from kd_helpers.optim import make_optimizer
from kd_helpers.teacher import attach, cached_logits

EPOCHS = 2


@pytest.fixture
def bench(own_artifacts, tokenized, tokenizer):
    teacher = freeze(tiny_bert(seed=9))
    teacher_logits = benchmark.fresh_logits(teacher, tokenized, tokenizer, torch.float32)
    return Bench(
        config=DistillConfig(epochs=EPOCHS, batch_size=16, learning_rate=1e-3),
        teacher=teacher,
        student=lambda seed: tiny_bert(seed=seed, dropout=0.0),
        tokenizer=tokenizer,
        texts=attach(tokenized, teacher_logits),
        validation=evaluation_batches(tokenized.select(range(96)), tokenizer),
        device=torch.device("cpu"),
        precision=torch.float32,
    )


def texts_read(model: torch.nn.Module) -> list[int]:
    """Fills with the number of texts of every forward pass."""
    seen: list[int] = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(
    ("way", "epochs_of_teacher"),
    [
        ("usual loop", EPOCHS),
        ("Trainer, online teacher", EPOCHS),
        ("distillation, cold", 1),
        ("distillation", 0),
        ("distillation, online teacher", EPOCHS),
        ("distillation, float32", 0),
        ("distillation, random batches", 0),
        ("distillation, not lean", 0),
        ("fine-tuning", 0),
    ],
)
def test_every_way_trains_on_every_text_in_every_epoch(bench, way, epochs_of_teacher):
    student = bench.student(0)
    by_student, by_teacher = texts_read(student), texts_read(bench.teacher)
    WAYS[way](bench, student, 0)
    assert sum(by_student) == EPOCHS * len(bench.texts)
    assert sum(by_teacher) == epochs_of_teacher * len(bench.texts)
    assert set(by_student) == {bench.config.batch_size}
    start = bench.student(0)
    for name, value in student.state_dict().items():
        if "key.bias" not in name:  # softmax does not see it
            assert value.isfinite().all()
            assert not torch.equal(value, start.state_dict()[name]), name


def test_the_loop_without_lean_trains_the_whole_table(bench, monkeypatch):
    sizes = {}
    original = benchmark.train_classifier

    def watching(model, *arguments, **settings):
        progress = original(model, *arguments, **settings)
        sizes[way] = {len(p) for group in made[-1].param_groups for p in group["params"]}
        return progress

    made = []
    monkeypatch.setattr(benchmark, "train_classifier", watching)
    monkeypatch.setattr(
        "kd_helpers.loop.make_optimizer", lambda *a, **k: made.append(make_optimizer(*a, **k)) or made[-1]
    )
    for way in ("distillation", "distillation, not lean"):
        WAYS[way](bench, bench.student(0), 0)
    rows = bench.student(0).get_input_embeddings().num_embeddings
    assert rows in sizes["distillation, not lean"]
    assert rows not in sizes["distillation"]


def test_only_the_way_that_is_not_lean_does_without(bench, monkeypatch):
    current, entered = [], []

    def recording(model, token_ids):
        entered.append(current[-1])
        return lean_training(model, token_ids)

    monkeypatch.setattr(loop, "lean_training", recording)
    for way in WAYS:
        current.append(way)
        WAYS[way](bench, bench.student(0), 0)
    courses = {way for way in WAYS if way.startswith("distillation")} - {"distillation, not lean"} | {"fine-tuning"}
    assert sorted(entered) == sorted(courses), "once for each training, and never by the others"


def test_lean_is_the_only_difference(bench, monkeypatch):
    """Without dropout and weight decay, training with lean and without comes to the same."""
    bench = dataclasses.replace(bench, config=bench.config.replace(weight_decay=0.0))
    students = [bench.student(0), bench.student(0)]
    for way, student in zip(("distillation", "distillation, not lean"), students, strict=True):
        WAYS[way](bench, student, 0)
    for name, value in students[0].state_dict().items():
        if "key.bias" not in name:  # which nothing but rounding moves
            torch.testing.assert_close(value, students[1].state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_nothing_in_the_package_is_replaced_by_a_mock():
    """A way that is timed with something patched is not what a reader runs."""
    sources = sorted(Path(kd_helpers.__file__).parent.rglob("*.py"))
    assert len(sources) > 40
    for path in sources:
        found = re.findall(r"\b(?:unittest|mock|Mock|MagicMock|monkeypatch|mocker)\b", path.read_text(encoding="utf-8"))
        assert found == [], path


def test_fresh_logits_never_find_a_cache(bench, own_artifacts):
    cached_logits(bench.teacher, bench.texts, bench.tokenizer, precision=torch.float32)
    before = sorted(own_artifacts.rglob("*"))
    by_teacher = texts_read(bench.teacher)
    found = cached_logits(bench.teacher, bench.texts, bench.tokenizer, precision=torch.float32)
    assert by_teacher == [], "a cache is there"
    for passes in (1, 2):
        fresh = benchmark.fresh_logits(bench.teacher, bench.texts, bench.tokenizer, torch.float32)
        assert sum(by_teacher) == passes * len(bench.texts)
        assert torch.equal(fresh.lookup(found.ids), found.logits)
    assert sorted(own_artifacts.rglob("*")) == before, "and leave none"
    assert os.environ["KD_ARTIFACTS"] == str(own_artifacts)


def test_fine_tuning_carries_no_teacher_logits(bench, monkeypatch):
    columns = []
    monkeypatch.setattr(
        benchmark, "train_classifier", lambda student, batches, *_, **__: columns.append(batches.dataset.column_names)
    )
    benchmark.plain_fine_tuning(bench, bench.student(0), 0)
    benchmark.distillation_warm(bench, bench.student(0), 0)
    assert ["teacher_logits" in names for names in columns] == [False, True]


def test_all_ways_of_distilling_come_near_the_teacher(bench):
    with torch.no_grad():
        bench.teacher.classifier.weight.mul_(20)
    teacher_logits = benchmark.fresh_logits(bench.teacher, bench.texts, bench.tokenizer, torch.float32)
    longer = bench.config.replace(alpha=1.0, epochs=6, learning_rate=3e-3)
    bench = dataclasses.replace(bench, texts=attach(bench.texts, teacher_logits), config=longer)
    batches = evaluation_batches(bench.texts, bench.tokenizer)

    def gap(student) -> float:
        predictions = predict(student, batches)
        return soft_loss(predictions.logits, teacher_logits.lookup(predictions.ids), 1.0).item()

    before = gap(bench.student(0))
    for way in WAYS.keys() - {"fine-tuning"}:
        student = bench.student(0)
        WAYS[way](bench, student, 0)
        assert gap(student) < 0.5 * before, way


def test_the_ways_take_turns(bench, monkeypatch):
    turns = []
    ways = {name: lambda bench, student, seed, name=name: turns.append((name, seed)) for name in ("a", "b")}
    table = benchmark.time_ways(bench, ways, rounds=2)
    assert turns == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]  # and begin in turn
    assert (table["seconds"] > 0).all()
    tokens = EPOCHS * sum(bench.texts["length"][:])
    np.testing.assert_allclose(table["tokens_per_second"] * table["seconds"], tokens)


def test_a_sweep_runs_the_teacher_once(bench):
    by_teacher = texts_read(bench.teacher)
    cost = benchmark.sweep_cost(bench)
    assert sum(by_teacher) == len(bench.texts)
    assert cost["settings"] == 12
    assert cost["ratio"] == pytest.approx(cost["sweep_seconds"] / cost["plain_seconds"])


def test_the_work_of_a_step_is_counted(bench, monkeypatch):
    monkeypatch.setattr(benchmark, "PEAK_SIZES", (256,))  # the large ones take minutes on one thread
    step = benchmark.step_share(bench, torch.float32, repeats=2)
    assert step["batch_size"] == 64
    model = bench.student(0)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "encoder" in n]
    products = 6 * step["tokens"] * sum(p.numel() for p in matrices)  # forward and twice that backward
    assert products < 1e9 * step["gigaflop"] < 1.5 * products  # attention, pooler and head come on top
    assert 0 < step["share"] == pytest.approx(step["gigaflops"] / step["peak_gigaflops"])


def test_the_profile_shares_out_all_the_time(bench):
    shares = benchmark.step_profile(bench, repeats=2)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["matrix products"] > 0
    assert shares["AdamW"] > 0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::mul", "other"),
        ("aten::mul_", "gradient norm and clipping"),
        ("aten::_fused_adamw_", "AdamW"),
        ("aten::embedding_dense_backward", "embedding table"),
        ("aten::masked_fill_", "other"),
        ("aten::random_", "random numbers"),
        ("aten::add", "other"),
    ],
)
def test_kernels_have_their_kind(kernel, kind):
    assert benchmark._kind(kernel) == kind


def test_peak_memory_sees_what_is_held_for_a_moment():
    with peak_memory(torch.device("cpu")) as nothing:
        pass
    if np.isnan(nothing["peak_megabytes"]):
        pytest.skip("this system does not tell")
    with peak_memory(torch.device("cpu")) as memory:
        torch.ones(100_000_000)
    assert nothing["peak_megabytes"] < 50
    assert 350 < memory["peak_megabytes"] < 500


def result() -> dict:
    seconds = {"usual loop": (14, 15, 30), "Trainer, online teacher": (6, 6, 12), "distillation, cold": (3, 3, 6)}
    seconds |= {"distillation": (2, 2, 4), "distillation, float32": (6, 6, 12), "fine-tuning": (2, 1.9, 4)}
    seconds |= {"distillation, not lean": (3, 3, 6)}
    rows = [
        {"way": way, "round": turn, "seconds": value, "tokens_per_second": 1.0, "peak_megabytes": 1.0}
        | {"accuracy": 0.7 + 0.01 * turn + (0.01 if way == "usual loop" else 0), "nll": 1.0}
        for way, values in seconds.items()
        for turn, value in enumerate(values)
    ]
    step = {"milliseconds": 1.0, "gigaflops": 20.0, "peak_gigaflops": 100.0, "share": 0.2}
    return {
        "made_with": {"torch": "2", "precision": "bfloat16", "threads": 2, "processor": "a CPU"},
        "shape": "offline",
        "config": DistillConfig().to_dict(),
        "ways": rows,
        "sweep": {"ratio": 1.05},
        "step": {"bfloat16": step, "float32": step},
        "profile": {"matrix products": 0.6, "other": 0.4},
        "evaluation": {"ratio": 1.2},
        "run": {"outside": 2.5},
        "start": {"first_step": 5.5},
    }


def test_ratios_are_taken_within_a_round():
    assert benchmark.ratio(result(), "usual loop", "distillation") == 7.5
    table = benchmark.ways_table(result())
    assert table.loc["usual loop", "times"] == 7.5
    assert table.loc["usual loop", "seconds"] == 15
    assert table.index[0] == "usual loop"
    difference, low, high = benchmark.accuracy_gap(result(), "distillation", "usual loop")
    assert [difference, low, high] == pytest.approx([-0.01] * 3)


def test_targets_are_met_or_not():
    met = benchmark.targets(result())["met"].to_dict()
    assert [name for name, reached in met.items() if not reached] == [
        "share of the machine's peak in a step of 64 texts",
        "seconds from import to the first step",
    ]
    slow = result()
    slow["sweep"]["ratio"] = 1.2
    assert benchmark.targets(slow)["met"].sum() == 5
    del slow["evaluation"], slow["run"], slow["start"]
    assert benchmark.targets(slow)["met"].sum() == 3, "results of older versions"


def test_compiling_trains_the_same_way(bench, monkeypatch):
    compiled = []
    monkeypatch.setattr(benchmark.torch, "compile", lambda forward, dynamic: compiled.append(dynamic) or forward)
    cost = benchmark.compile_cost(bench)
    assert compiled == [True]
    assert min(cost.values()) > 0


def test_every_way_is_described():
    assert benchmark.DESCRIPTIONS.keys() == WAYS.keys()


def test_the_report_says_where_and_what():
    text = benchmark.report(result())
    for part in ("a CPU, 2 threads", "usual loop", "20 of 100 GFLOP/s: 20.0%", "matrix products", "-0.010"):
        assert part in text


def test_the_stored_benchmark_is_whole():
    stored = benchmark.stored_benchmark()
    assert set(WAYS) <= {row["way"] for row in stored["ways"]}
    assert len({row["round"] for row in stored["ways"]}) >= 3
    _, alt = plots.benchmark_figure(benchmark.ways_table(stored))
    assert all(way in alt for way in WAYS)


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--rounds", "0"], "at least 1"), (["--texts", "0"], "train_size is 0")]
)
def test_wrong_arguments_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("also", [[], ["--serve"]])
def test_where_the_result_goes_is_looked_at_before_anything_is_measured(also, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file.csv").write_text("mine")
    with pytest.raises(SystemExit) as refused:
        benchmark.main(["--out", str(tmp_path / "file.csv"), *also])
    assert refused.value.code == 2
    assert "file.csv can't be written: a file stands where a folder is needed" in capsys.readouterr().err
