"""ONNX: every kind of model, equal to torch or refused; eight bits; and an environment that has no torch."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from support.architectures import KINDS, tiny
from support.runs import tiny_config
from torch.testing import assert_close
from transformers import BertModel

from kd_helpers import export
from kd_helpers.data import evaluation_batches, load_splits, tokenize
from kd_helpers.export import FLOAT32, INT8, OnnxClassifier, cached_export, export_onnx, write_onnx
from kd_helpers.loop import train_classifier
from kd_helpers.metrics import evaluate, fidelity, latency, predict, predict_and_evaluate
from kd_helpers.models import match_tokenizer, model_inputs, save_model
from kd_helpers.pretrained import read_tokenizer
from kd_helpers.runs import distill
from kd_helpers.teacher import cached_logits

pytestmark = pytest.mark.filterwarnings("ignore:the teacher is not shown")

LABELS = ("Mid", "bad", "GOOD")
# What torch's exporter can't follow: a rule of its own for positions, pooling over time, windows and blocks.
NOT_EXPORTED = {"xlnet", "funnel", "longformer", "big_bird"}
TEXTS = ("good", "what a great day today, I love it so much", "the bad", "not at all 123!", "")


def saved(folder: Path, kind: str = "bert", **changes) -> Path:
    save_model(folder / kind, *tiny(kind, LABELS, seed=1, **changes))
    return folder / kind


def logits_of(model, tokenizer, texts) -> torch.Tensor:
    batch = dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
    with torch.inference_mode():
        return model(**model_inputs(model, batch)).logits


# One of each way to count positions and to look back, and one that is refused. torch's exporter takes up to two
# minutes for a kind, so `make test-longer` exports the others.
OFTEN = {"bert", "distilbert", "roberta", "albert", "deberta-v2", "gpt2", "xlnet"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in OFTEN else pytest.mark.longer) for kind in KINDS]
)
def test_every_kind_computes_what_torch_does_or_is_refused(kind, tmp_path):
    source = saved(tmp_path, kind)
    if kind in NOT_EXPORTED:
        with pytest.raises(ValueError, match=rf"^a {kind} can't be exported as ONNX \(\w+\); serve it with torch"):
            export_onnx(source, tmp_path / "out", max_length=48)
        assert not (tmp_path / "out").exists()
        return
    folder = export_onnx(source, tmp_path / "out", int8=True, max_length=48)
    model, tokenizer = tiny(kind, LABELS, seed=1)
    match_tokenizer(model, read_tokenizer(kind, str(source)), 48, kind)
    tokenizer = read_tokenizer(kind, str(source))
    graph = OnnxClassifier(folder)
    for texts in (TEXTS[:4], TEXTS[:1], TEXTS[1:3]):
        assert_close(logits_of(graph, tokenizer, texts), logits_of(model, tokenizer, texts), rtol=1e-4, atol=1e-4)
    rounded = logits_of(OnnxClassifier(folder, int8=True), tokenizer, TEXTS[:4])
    exact = logits_of(model, tokenizer, TEXTS[:4])
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).abs().max()) < 0.5 * float(exact.std() + exact.abs().max())
    assert graph.config.id2label == dict(enumerate(LABELS))


def test_the_torch_model_stays_as_it_is(tmp_path):
    model, tokenizer = tiny("bert", LABELS)
    before, attention, length = (
        copy.deepcopy(model.state_dict()),
        model.config._attn_implementation,
        tokenizer.model_max_length,
    )
    for training in (False, True):
        model.train(training)
        write_onnx(model, tokenizer, tmp_path / str(training), max_length=48)
        assert {module.training for module in model.modules()} == {training}
    assert model.config._attn_implementation == attention
    assert tokenizer.model_max_length == length
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_graph_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", 1e-12)
    with pytest.raises(ValueError, match=r"exported bert computes other logits than the model: .* by up to \d"):
        export_onnx(saved(tmp_path), tmp_path / "out", max_length=48)
    assert not (tmp_path / "out").exists()


def test_a_graph_of_eight_bits_is_a_quarter_as_large(tmp_path):
    folder = export_onnx(
        saved(tmp_path, hidden_size=128, intermediate_size=512), tmp_path / "out", int8=True, max_length=48
    )
    sizes = [OnnxClassifier(folder, int8=int8).megabytes for int8 in (True, False)]
    assert 0.22 < sizes[0] / sizes[1] < 0.35
    assert (folder / INT8).stat().st_size == 1e6 * sizes[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        return distill(tiny_config(tmp_path_factory.mktemp("models"), tokenizer))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """The run, exported by the command, with both graphs; what was printed lies beside it. An export takes seconds."""
    folder = tmp_path_factory.mktemp("exported")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert export.main([str(run.folder), "--int8", "--out", str(folder / "out")], prog="export") == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder / "out"


@pytest.fixture
def earlier(exported, tmp_path) -> Path:
    """A copy of that export, which may be changed and replaced."""
    return shutil.copytree(exported, tmp_path / "out")


def test_a_run_is_exported_with_its_quality(run, exported):
    printed = (exported.parent / "printed.txt").read_text()
    quality = json.loads((exported / "quality.json").read_text())
    assert list(quality) == ["torch", "onnx", "int8"]
    card = (exported / "README.md").read_text()
    assert "negative, neutral, positive" in card
    assert "Texts are cut at 24 tokens." in card
    for way, row in quality.items():
        assert f"| {way} | {row['accuracy']:.4f} |" in card
        assert re.search(rf"(?m)^{way} +{round(row['accuracy'], 4)}", printed)
    test = tokenize(load_splits(run.config).test, run.tokenizer, 24)
    measured = evaluate(run.student, evaluation_batches(test, run.tokenizer))
    assert {name: quality["torch"][name] for name in measured} == pytest.approx(measured, abs=1e-6)
    int8 = predict(OnnxClassifier(exported, int8=True), evaluation_batches(test, run.tokenizer, batch_size=1))
    assert quality["int8"]["fidelity"] == fidelity(int8.logits, run.predictions.logits)["fidelity"]


def test_a_run_without_its_data_is_exported_without_quality(own_artifacts, tmp_path, tokenizer, small_data):
    run = distill(tiny_config(tmp_path, tokenizer), data=small_data)
    with pytest.warns(UserWarning, match=r"not measured, because .* was made with data given to it"):
        folder = export_onnx(run.folder, tmp_path / "out")
    assert not (folder / "quality.json").exists()
    assert "How good the graphs are was not measured." in (folder / "README.md").read_text()


def test_every_measure_of_the_course_takes_a_graph(run, exported):
    graph = OnnxClassifier(exported)
    test = tokenize(load_splits(run.config).test.select(range(20)), run.tokenizer, 24)
    batches = list(evaluation_batches(test, run.tokenizer, batch_size=8))
    assert_close(predict(graph, batches).logits, predict(run.student, batches).logits, rtol=1e-4, atol=1e-4)
    assert evaluate(graph, batches) == pytest.approx(evaluate(run.student, batches), abs=1e-4)
    assert predict_and_evaluate(graph, "graph", batches)["texts"] == 20
    assert 0 < latency(graph, batches)["p50"] < 1000
    alone = {"input_ids": batches[0]["input_ids"][:1, :5]}  # neither a mask nor types, as torch allows
    assert_close(graph(**alone).logits, run.student(**alone).logits, rtol=1e-4, atol=1e-4)


def test_caches_keep_the_logits_of_two_graphs_apart(own_artifacts, run, exported):
    test = tokenize(load_splits(run.config).test.select(range(20)), run.tokenizer, 24)
    cached = [
        cached_logits(OnnxClassifier(exported, int8=int8), test, run.tokenizer, precision=torch.float32)
        for int8 in (False, True)
    ]
    assert not torch.equal(cached[0].logits, cached[1].logits)
    assert_close(cached[0].logits, cached[1].logits, rtol=0.1, atol=0.05)


def test_an_exported_model_is_found_again(own_artifacts):
    model, tokenizer = tiny("bert", LABELS)
    folder = cached_export(model, tokenizer, max_length=48)
    written = (folder / FLOAT32).stat().st_mtime_ns
    assert cached_export(model, tokenizer, max_length=48) == folder
    assert (folder / FLOAT32).stat().st_mtime_ns == written
    with torch.no_grad():
        model.classifier.bias += 1
    assert cached_export(model, tokenizer, max_length=48) != folder


def test_a_graph_cannot_be_trained(run, exported):
    graph = OnnxClassifier(exported)
    test = tokenize(load_splits(run.config).test.select(range(20)), run.tokenizer, 24)
    with pytest.raises(ValueError, match="the student is frozen, so it can't learn"):
        train_classifier(
            graph,
            evaluation_batches(test, run.tokenizer),
            config=run.config.replace(alpha=0.0),
            precision=torch.float32,
            description="Distilling",
        )


def test_requests_that_make_no_sense_are_refused(earlier, tmp_path, capsys):
    source = saved(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine is there already and holds no export; choose another folder"):
        export_onnx(source, tmp_path / "mine", max_length=48)
    with pytest.raises(ValueError, match=r"notes\.txt is there already"):
        export_onnx(source, tmp_path / "mine" / "notes.txt", max_length=48)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"

    with pytest.raises(ValueError, match=r"max_length is 512, but .* has positions for 128 tokens"):
        export_onnx(source, tmp_path / "new")
    with pytest.raises(ValueError, match="max_length is 2; give a whole number of at least 3"):
        export_onnx(source, tmp_path / "new", max_length=2)
    (earlier / INT8).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*model_quantized\.onnx; export a model first"):
        OnnxClassifier(earlier, int8=True)
    with pytest.raises(ValueError, match="threads is -1"):
        OnnxClassifier(earlier, threads=-1)
    (earlier / FLOAT32).write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"onnxruntime can't read .*model\.onnx \(\w+\); export the model again"):
        OnnxClassifier(earlier)

    model, tokenizer = tiny("bert", LABELS)
    save_model(tmp_path / "body", BertModel(model.config), tokenizer)
    with pytest.raises(ValueError, match="body' has no trained classification head"):
        export_onnx(tmp_path / "body", tmp_path / "new")
    model.config.problem_type = "multi_label_classification"
    save_model(tmp_path / "many", model, tokenizer)
    with pytest.raises(ValueError, match="was trained for multi_label_classification"):
        export_onnx(tmp_path / "many", tmp_path / "new")
    assert not (tmp_path / "new").exists()

    assert export.main([str(tmp_path / "nowhere")], prog="kd-helpers export") == 2
    assert capsys.readouterr().err.startswith("kd-helpers export: ")


def test_an_earlier_export_is_replaced_as_a_whole(earlier, tmp_path):
    assert (earlier / INT8).exists()
    assert (earlier / "quality.json").exists()
    export_onnx(saved(tmp_path), earlier, max_length=40)
    assert not (earlier / INT8).exists()
    assert not (earlier / "quality.json").exists()
    assert json.loads((earlier / "tokenizer_config.json").read_text())["model_max_length"] == 40


def test_an_export_deletes_nothing_that_no_export_wrote(own_artifacts, earlier, tmp_path, monkeypatch, capsys):
    source = saved(tmp_path)
    for name in ("notes.md", ".git/config"):
        own = earlier / name
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")
        with pytest.raises(ValueError, match=rf"out holds {re.escape(name)}, which no export wrote and which would"):
            export_onnx(source, earlier, max_length=40)
        assert own.read_text() == "mine"
        own.unlink()
    # As on the hub, where models have a graph of their own beside their weights.
    (source / FLOAT32).parent.mkdir()
    shutil.copy(earlier / FLOAT32, source / FLOAT32)
    with pytest.raises(ValueError, match="which no export wrote"):
        export_onnx(source, source, max_length=48)
    assert (source / "model.safetensors").exists()

    (tmp_path / "link").symlink_to(earlier)
    export_onnx(source, tmp_path / "link", max_length=32)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((earlier / "tokenizer_config.json").read_text())["model_max_length"] == 32

    monkeypatch.chdir(source)
    assert export.main([".", "--max-length", "32"]) == 0
    assert (own_artifacts / "exports" / source.name / FLOAT32).exists()


def closure(*distributions: str) -> set[str]:
    """Some distributions and all that they require, as far as it is installed."""
    found, waiting = set(), list(distributions)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for line in importlib.metadata.requires(name) or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    waiting.append(needed.name)
    return found


SERVE = """
import json, sys
import numpy as np, onnxruntime, tokenizers

for absent in ("torch", "transformers", "kd_helpers"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{absent} is installed")
folder, texts = sys.argv[1], json.load(sys.stdin)
tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
for name in ("model", "model_quantized"):
    session = onnxruntime.InferenceSession(f"{folder}/onnx/{name}.onnx")
    answers = []
    for text in map(tokenizer.encode, texts):
        given = {"input_ids": text.ids, "attention_mask": text.attention_mask, "token_type_ids": text.type_ids}
        inputs = {entry.name: np.array([given[entry.name]]) for entry in session.get_inputs()}
        (logits,) = session.run(["logits"], inputs)
        answers.append(logits[0].tolist())
    print(json.dumps(answers))
"""


def test_onnxruntime_alone_serves_the_folder(run, exported, tmp_path):
    """In an environment that has onnxruntime, tokenizers and what they require, but neither torch nor transformers."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in closure("onnxruntime", "tokenizers", "numpy"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if not file.parts[0].startswith("..")}:
            place = packages / top
            if not place.exists() and top != "__pycache__":
                place.symlink_to(Path(distribution.locate_file(top)).resolve())
    texts = ["what a lovely day", "no", "never again " * 60]  # the last is cut at 24 tokens
    program = f"import sys; sys.path.insert(0, {str(packages)!r})\n{SERVE}"
    command = [sys.executable, "-I", "-S", "-c", program, exported]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [np.array(json.loads(line)) for line in done.stdout.splitlines()]
    for index, int8 in enumerate((False, True)):
        graph = OnnxClassifier(exported, int8=int8)
        encoded = [run.tokenizer(text, truncation=True, max_length=24, return_tensors="pt") for text in texts]
        expected = torch.cat([graph(**model_inputs(graph, dict(one))).logits for one in encoded])
        np.testing.assert_allclose(answers[index], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_overflow_of_eight_bit_sums_is_found_and_told(exported, monkeypatch):
    flags = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and flags.exists():
        known = set(flags.read_text().partition("flags")[2].partition("\n")[0].split())
        assert export.sums_overflow() == (not known & {"avx512_vnni", "avx_vnni"})
    monkeypatch.setattr(export, "sums_overflow", lambda: True)
    with pytest.warns(UserWarning, match="sums of eight-bit products can overflow, so the graph may predict otherwise"):
        OnnxClassifier(exported, int8=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OnnxClassifier(exported)
        monkeypatch.setattr(export, "sums_overflow", lambda: False)
        OnnxClassifier(exported, int8=True)
