from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_bert

from kd_helpers.course import plots
from kd_helpers.experiments import benchmark
from kd_helpers.experiments.benchmark import Bench, WAYS
from kd_helpers.config import DistillConfig
from kd_helpers.data import evaluation_batches
from kd_helpers.losses import soft_loss
from kd_helpers.models import freeze
from kd_helpers.optim import make_optimizer
from kd_helpers.teacher import attach
from kd_helpers.metrics import predict

EPOCHS = 2


@pytest.fixture
def bench(own_artifacts, tokenized, tokenizer):
    teacher = freeze(tiny_bert(seed=9))
    answers = benchmark.ask_once(teacher, tokenized, tokenizer, torch.float32)
    return Bench(
        config=DistillConfig(epochs=EPOCHS, batch_size=16, learning_rate=1e-3),
        teacher=teacher,
        student=lambda seed: tiny_bert(seed=seed, dropout=0.0),
        tokenizer=tokenizer,
        texts=attach(tokenized, answers),
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
    ("way", "asked"),
    [
        ("usual loop", EPOCHS),
        ("Trainer, online teacher", EPOCHS),
        ("distillation, cold", 1),
        ("distillation", 0),
        ("distillation, float32", 0),
        ("distillation, not lean", 0),
        ("fine-tuning", 0),
    ],
)
def test_every_way_trains_on_every_text_in_every_epoch(bench, way, asked):
    student = bench.student(0)
    by_student, by_teacher = texts_read(student), texts_read(bench.teacher)
    WAYS[way](bench, student, 0)
    assert sum(by_student) == EPOCHS * len(bench.texts)
    assert sum(by_teacher) == asked * len(bench.texts)
    assert set(by_student) == {bench.config.batch_size}
    start = bench.student(0)
    for name, value in student.state_dict().items():
        if "key.bias" not in name:  # softmax does not see it
            assert value.isfinite().all()
            assert not torch.equal(value, start.state_dict()[name]), name


def test_the_loop_without_lean_trains_the_whole_table(bench, monkeypatch):
    sizes = {}
    original = benchmark.train

    def watching(model, *arguments, **settings):
        history = original(model, *arguments, **settings)
        sizes[way] = {len(p) for group in made[-1].param_groups for p in group["params"]}
        return history

    made = []
    monkeypatch.setattr(benchmark, "train", watching)
    monkeypatch.setattr(
        "kd_helpers.training.make_optimizer", lambda *a, **k: made.append(make_optimizer(*a, **k)) or made[-1]
    )
    for way in ("distillation", "distillation, not lean"):
        WAYS[way](bench, bench.student(0), 0)
    rows = bench.student(0).get_input_embeddings().num_embeddings
    assert rows in sizes["distillation, not lean"]
    assert rows not in sizes["distillation"]


def test_fine_tuning_carries_no_answers(bench, monkeypatch):
    columns = []
    monkeypatch.setattr(
        benchmark, "train", lambda student, batches, *_, **__: columns.append(batches.dataset.column_names)
    )
    benchmark.plain_fine_tuning(bench, bench.student(0), 0)
    benchmark.distillation_warm(bench, bench.student(0), 0)
    assert ["teacher_logits" in names for names in columns] == [False, True]


def test_all_ways_of_distilling_come_near_the_teacher(bench):
    with torch.no_grad():
        bench.teacher.classifier.weight.mul_(20)
    answers = benchmark.ask_once(bench.teacher, bench.texts, bench.tokenizer, torch.float32)
    longer = bench.config.replace(alpha=1.0, epochs=6, learning_rate=3e-3)
    bench = dataclasses.replace(bench, texts=attach(bench.texts, answers), config=longer)
    batches = evaluation_batches(bench.texts, bench.tokenizer)

    def gap(student) -> float:
        predictions = predict(student, batches)
        return soft_loss(predictions.logits, answers.lookup(predictions.ids), 1.0).item()

    before = gap(bench.student(0))
    for way in WAYS.keys() - {"fine-tuning"}:
        student = bench.student(0)
        WAYS[way](bench, student, 0)
        assert gap(student) < 0.5 * before, way


def test_the_ways_take_turns(bench, monkeypatch):
    turns = []
    ways = {name: lambda bench, student, seed, name=name: turns.append((name, seed)) for name in ("a", "b")}
    table = benchmark.measure(bench, ways, rounds=2)
    assert turns == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]  # and begin in turn
    assert (table["seconds"] > 0).all()
    tokens = EPOCHS * sum(bench.texts["length"][:])
    np.testing.assert_allclose(table["tokens_per_second"] * table["seconds"], tokens)


def test_a_sweep_asks_the_teacher_once(bench):
    asked = texts_read(bench.teacher)
    cost = benchmark.sweep_cost(bench)
    assert sum(asked) == len(bench.texts)
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
    with benchmark.peak_memory(torch.device("cpu")) as nothing:
        pass
    if np.isnan(nothing["peak_megabytes"]):
        pytest.skip("this system does not tell")
    with benchmark.peak_memory(torch.device("cpu")) as memory:
        torch.ones(100_000_000)
    assert nothing["peak_megabytes"] < 50
    assert 350 < memory["peak_megabytes"] < 500


def result() -> dict:
    seconds = {"usual loop": (12, 14, 26), "Trainer, online teacher": (4, 4, 8), "distillation, cold": (3, 3, 6)}
    seconds |= {"distillation": (2, 2, 4), "distillation, float32": (6, 6, 12), "fine-tuning": (2, 1.9, 4)}
    seconds |= {"distillation, not lean": (3, 3, 6)}
    rows = [
        {"way": way, "round": turn, "seconds": value, "tokens_per_second": 1.0, "peak_megabytes": 1.0}
        | {"accuracy": 0.7 + 0.01 * turn + (0.01 if way == "usual loop" else 0), "nll": 1.0}
        for way, values in seconds.items()
        for turn, value in enumerate(values)
    ]
    step = {"milliseconds": 1.0, "gigaflops": 30.0, "peak_gigaflops": 100.0, "share": 0.3}
    return {
        "made_with": {"torch": "2", "precision": "bfloat16", "threads": 2, "processor": "a CPU"},
        "shape": "offline",
        "config": DistillConfig().to_dict(),
        "ways": rows,
        "sweep": {"ratio": 1.05},
        "step": {"bfloat16": step, "float32": step},
        "profile": {"matrix products": 0.6, "other": 0.4},
    }


def test_ratios_are_taken_within_a_round():
    assert benchmark.ratio(result(), "usual loop", "distillation") == 6.5
    table = benchmark.ways_table(result())
    assert table.loc["usual loop", "times"] == 6.5
    assert table.loc["usual loop", "seconds"] == 14
    assert table.index[0] == "usual loop"
    difference, low, high = benchmark.accuracy_gap(result(), "distillation", "usual loop")
    assert [difference, low, high] == pytest.approx([-0.01] * 3)


def test_targets_are_met_or_not():
    met = benchmark.targets(result())["met"].to_dict()
    assert [name for name, reached in met.items() if not reached] == [
        "share of the machine's peak in a step of 64 texts"
    ]
    slow = result()
    slow["sweep"]["ratio"] = 1.2
    assert benchmark.targets(slow)["met"].sum() == 3


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
    for part in ("a CPU, 2 threads", "usual loop", "30 of 100 GFLOP/s: 30.0%", "matrix products", "-0.010"):
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
