"""How fast models answer: every way gives the same answers, and the command writes what it measures."""

from __future__ import annotations

import json

import pytest
import torch
from support.runs import tiny_config
from torch.testing import assert_close

from kd_helpers.experiments import benchmark, serving
from kd_helpers.experiments.serving import WAYS, report, serving_table, serving_ways, times
from kd_helpers.export import cached_export
from kd_helpers.runs import distill

pytestmark = pytest.mark.filterwarnings("ignore:the teacher is not shown")
TEXTS = [f"a good day number {index} " + "very " * (index % 7) for index in range(40)]


@pytest.fixture
def run(own_artifacts, tmp_path, tokenizer):
    return distill(tiny_config(tmp_path, tokenizer))


def test_all_ways_answer_alike(run):
    graphs = cached_export(run.student, run.tokenizer, max_length=24)
    ways = serving_ways(run.student, run.tokenizer, graphs, max_length=24, threads=1)
    assert tuple(ways) == WAYS
    expected = ways["torch"].answer(TEXTS)
    assert expected.shape == (40, 3)
    for way, tolerance in (("ONNX", 1e-4), ("bfloat16", 0.05), ("int8", 0.05)):
        assert_close(ways[way].answer(TEXTS), expected, rtol=0, atol=tolerance)
    assert ways["int8"].megabytes < ways["ONNX"].megabytes
    assert ways["torch"].megabytes == pytest.approx(ways["ONNX"].megabytes, rel=0.1)
    assert ways["int8"].tokens(["very " * 99])["input_ids"].shape == (1, 24)


def test_a_table_has_a_row_for_each_model_way_and_number_of_threads(run):
    threads = torch.get_num_threads()
    graphs = cached_export(run.student, run.tokenizer, max_length=24)
    models = dict.fromkeys(("teacher", "student"), (run.student, run.tokenizer, graphs))
    table = serving_table(models, TEXTS, max_length=24, threads=(1, 2), rounds=2)
    assert len(table) == 2 * len(WAYS) * 2
    assert (table["p50_ms"] > 0).all()
    assert (table["p95_ms"] >= table["p50_ms"]).all()
    assert (table["tokenising_ms"] < table["p95_ms"]).all()
    assert (table["texts_per_second"] > 0).all()
    assert table["fidelity"].between(0.9, 1).all()
    assert torch.get_num_threads() == threads


def test_the_command_times_a_run_and_writes_what_it_found(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "TOGETHER", 64)
    monkeypatch.setattr(serving, "ALONE", 3)
    monkeypatch.setattr(serving, "ROUNDS", 1)
    assert benchmark.main(["--serve", str(run.folder), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "serving.json").read_text())
    assert result["config"] == run.config.to_dict()
    table = times(result)
    assert {("teacher", "torch", 1), ("student", "int8", 1)} <= set(table.index)
    assert report(result) in printed
    ratio = table.loc[("student", "int8"), "texts_per_second"] / table.loc[("teacher", "torch"), "texts_per_second"]
    assert f"answers {ratio.iloc[-1]:.1f} times as many texts a second as the teacher in torch" in printed


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert benchmark.main(["--serve", str(tmp_path)], prog="kd-helpers benchmark") == 2
    assert "holds no finished run" in capsys.readouterr().err
