from __future__ import annotations

import json

import pytest
import torch

from kd_helpers import runtime
from kd_helpers.config import DistillConfig
from kd_helpers.runtime import machine, pick_device, pick_precision, precision_decision, seed_everything

CPU = torch.device("cpu")


def test_device_that_is_absent_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="lacks"):
        pick_device("cuda")
    assert pick_device("auto").type in ("cpu", "mps")


def test_precision_can_be_forced():
    assert pick_precision("float32", CPU) == torch.float32
    assert pick_precision("bfloat16", CPU) == torch.bfloat16


def a_machine_of(monkeypatch, speedup: float) -> list[float]:
    """Let a matrix product be so many times faster in bfloat16; the list grows with every measurement."""
    measured = []
    monkeypatch.setattr(runtime, "bfloat16_speedup", lambda device: measured.append(speedup) or speedup)
    return measured


def stored(artifacts_folder):
    (path,) = (artifacts_folder / "machines").glob("*.json")
    return path


def test_auto_is_decided_once(own_artifacts, monkeypatch):
    """A busy machine must not decide otherwise tomorrow, since the precision is part of what a run is found by."""
    assert a_machine_of(monkeypatch, 3.0) == []
    assert pick_precision("auto", CPU) == torch.bfloat16
    said = json.loads(stored(own_artifacts).read_text())
    assert said["precision"] == "bfloat16"
    assert said["speedup"] == 3.0
    assert said["device"] == "cpu"
    assert said["torch"] == torch.__version__
    assert said["processor"] == runtime.processor(CPU)
    assert said == precision_decision(CPU)
    measured = a_machine_of(monkeypatch, 0.5)
    assert pick_precision("auto", CPU) == torch.bfloat16
    assert machine(DistillConfig(device="cpu")).precision == torch.bfloat16
    assert measured == []
    monkeypatch.setenv("KD_ARTIFACTS", str(own_artifacts / "other"))
    assert pick_precision("auto", CPU) == torch.float32
    assert json.loads(stored(own_artifacts / "other").read_text())["precision"] == "float32"
    assert measured == [0.5]


@pytest.mark.parametrize("content", [b"", b'{"precision": "bfl', b"\x00\xff"])
def test_a_damaged_decision_is_measured_again(own_artifacts, monkeypatch, content):
    a_machine_of(monkeypatch, 3.0)
    assert pick_precision("auto", CPU) == torch.bfloat16
    stored(own_artifacts).write_bytes(content)
    measured = a_machine_of(monkeypatch, 0.5)
    assert pick_precision("auto", CPU) == torch.float32
    assert pick_precision("auto", CPU) == torch.float32
    assert measured == [0.5]
    assert json.loads(stored(own_artifacts).read_text())["precision"] == "float32"


def test_bfloat16_must_be_clearly_faster(own_artifacts, monkeypatch):
    a_machine_of(monkeypatch, runtime.WORTHWHILE)
    assert pick_precision("auto", CPU) == torch.float32


def test_a_precision_that_was_asked_for_is_not_measured(own_artifacts, monkeypatch):
    measured = a_machine_of(monkeypatch, 3.0)
    assert machine(DistillConfig(device="cpu", precision="float32")) == (CPU, torch.float32)
    assert measured == []
    assert not (own_artifacts / "machines").exists()


def test_the_speedup_is_a_ratio_of_two_times():
    assert 0 <= runtime.bfloat16_speedup(CPU) < 1000


@pytest.mark.parametrize(("half", "rounds", "speedup"), [(0.01, 8, 4.0), (0.4, 3, 0.1), (4.0, 2, 0.01)])
def test_an_emulated_product_is_not_waited_for_eight_times(monkeypatch, half, rounds, speedup):
    """On a made-up clock a product takes 0.04 s in float32. The first round takes five times as long."""
    now, products = 0.0, []

    class Matrix:
        def __init__(self, *_shape, dtype, device):
            self.dtype = dtype

        def __matmul__(self, other):
            nonlocal now
            usual = half if self.dtype == torch.bfloat16 else 0.04
            now += usual * (5 if len(products) < 2 else 1)
            products.append(self.dtype)
            return torch.zeros(1, 1)

    monkeypatch.setattr(torch, "ones", Matrix)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: now)
    assert runtime.bfloat16_speedup(CPU) == pytest.approx(speedup)
    assert products == [torch.float32, torch.bfloat16] * rounds


def test_seed_everything_repeats_draws():
    seed_everything(5)
    first = torch.rand(3)
    seed_everything(5)
    assert torch.equal(first, torch.rand(3))


def test_seeding_calls_exp_on_a_single_value_first(monkeypatch):
    """Else the first large call may be imprecise in one of its threads, and one seed would give two results."""
    sizes = []
    monkeypatch.setattr(torch, "exp", lambda values: sizes.append(values.numel()))
    seed_everything(0)
    assert sizes == [1]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_put_back_into_its_mode_even_after_an_error(training):
    model = torch.nn.Dropout().train(training)
    with runtime.evaluating(model):
        assert not model.training
    assert model.training == training
    with pytest.raises(KeyError), runtime.evaluating(model):
        raise KeyError
    assert model.training == training
