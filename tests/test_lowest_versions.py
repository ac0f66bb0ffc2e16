"""The lowest versions that pyproject.toml declares are enough, and the set-up cell names what is older."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from support.processes import TWO, free_port
from support.small_run import DISTIL, write_texts_and_models

from kd_helpers.course import publish
from kd_helpers.course.notebooks import ROOT

# What transformers did otherwise before: the scale of accumulated gradients, and the names in a saved file.
TRAIN = """
import datasets, torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, TrainingArguments
from kd_helpers import DistillationTrainer

texts = [{"input_ids": [2, 5 + i % 4, 3], "attention_mask": [1, 1, 1], "label": i % 3} for i in range(16)]
texts = datasets.Dataset.from_list([{**text, "teacher_logits": [0.0, 1.0, 2.0]} for text in texts])


def trained(folder, batch_size, steps):
    off = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    student = BertForSequenceClassification.from_pretrained("student", **off)
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "num_train_epochs": 1}
    rest = {"logging_steps": 1, "report_to": "none", "use_cpu": True, "train_sampling_strategy": "sequential"}
    trainer = DistillationTrainer(student, TrainingArguments(folder, **sizes, **rest), train_dataset=texts)
    trainer.train()
    trainer.save_model(folder)
    assert load_file(f"{folder}/model.safetensors").keys() == student.state_dict().keys()
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


(whole,), (parts,) = trained("whole", 16, 1), trained("parts", 4, 4)
assert abs(whole - parts) < 1e-4 * whole, (whole, parts)
"""  # fmt: skip
DIVERGE = """
from kd_helpers.train import main
options = ["--data", "texts.csv", "--teacher_checkpoint", "teacher", "--student_checkpoint", "student", "--use_cpu"]
more = ["--max_length", "16", "--learning_rate", "1e30", "--save_strategy", "no", "--output_dir", "diverged"]
assert main([*options, *more]) == 1
"""


def lowest() -> list[str]:
    """The base dependencies of pyproject.toml, each as the lowest version that it allows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"(?ms)^dependencies = \[(.*?)^\]", text)[1]
    pinned = []
    for needed in map(Requirement, re.findall(r'"(.+)"', block)):
        (bound,) = needed.specifier
        assert bound.operator == ">=", needed
        pinned.append(f"{needed.name}=={bound.version}")
    return pinned


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment that has the lowest versions."""
    folder = tmp_path_factory.mktemp("lowest") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *lowest()], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def work(tmp_path) -> Path:
    """A folder with texts, a random teacher and a random student."""
    return write_texts_and_models(tmp_path)


@pytest.mark.longer  # it installs torch, on Linux with the libraries for CUDA: some 3 GB
def test_the_lowest_versions_are_enough(python, work):
    """All in one test: each part is short, and the installation takes minutes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["KD_ARTIFACTS"] = str(work / "artifacts")

    def call(*command: str) -> str:
        done = subprocess.run(
            [python, *command], cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    installed = call("-m", "pip", "freeze")
    for line in lowest():
        name, _, version = line.partition("==")
        assert re.search(
            rf"(?im)^{re.escape(name).replace('_', '[-_]')}=={re.escape(version)}(\.0)*(\+\w+)?$", installed
        ), line
    call("-c", DISTIL)
    call("-c", TRAIN)
    call("-c", DIVERGE)
    assert "--alpha" in call("-m", "kd_helpers.train", "--help")
    options = ("--data", "texts.csv", "--teacher_checkpoint", "teacher", "--student_checkpoint", "student", "--use_cpu")
    script = ("kd_helpers.train", *options, "--online", "--max_length", "16", "--output_dir", "out")
    two = (*TWO, free_port(), "-m", *script, "--save_strategy", "steps", "--save_steps", "1")
    call(*two, "--max_steps", "2")
    call(*two, "--max_steps", "2")  # which goes on from the checkpoint


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        ("transformers>=5.6", None),
        ("transformers>=99", r"transformers is \S+, and the course needs >=99: run `%pip install '"),
        ("transformers>=99; extra == 'course'", None),  # those are for a checkout
    ],
)  # fmt: skip
def test_the_setup_cell_says_which_package_is_too_old(monkeypatch, declared, sentence):
    """On Colab it installs without dependencies, which leaves alone what is there."""
    shell = types.SimpleNamespace(run_line_magic=lambda name, line: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["numpy>=1.0", declared])
    monkeypatch.setitem(sys.modules, "google.colab", object())
    cell = TransformerManager().transform_cell(publish.setup())
    refused = pytest.raises(ImportError, match=sentence) if sentence else contextlib.nullcontext()
    with refused:
        exec(cell, {"get_ipython": lambda: shell})
