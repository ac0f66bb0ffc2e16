from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from kd_helpers.config import PRESETS, DistillConfig, settings_help

BAD_VALUES = [
    ("temperature", 0, ValueError, "greater than 0"),
    ("temperature", -1.0, ValueError, "greater than 0"),
    ("temperature", math.nan, ValueError, "finite number"),
    ("temperature", math.inf, ValueError, "finite number"),
    ("temperature", "2", TypeError, "give a number"),
    ("temperature", True, TypeError, "give a number"),
    ("alpha", -0.1, ValueError, "between 0"),
    ("alpha", 1.1, ValueError, "between 0"),
    ("alpha", math.nan, ValueError, "between 0"),
    ("alpha", None, TypeError, "give a number"),
    ("preset", "bert-small", ValueError, "offline, bert, bert-large"),
    ("preset", 3, ValueError, "choose one of"),
    ("student_init", "copied", ValueError, "preset, random"),
    ("precision", "float16", ValueError, "float32, bfloat16"),
    ("device", "tpu", ValueError, "cpu, cuda"),
    ("epochs", 0, ValueError, "at least 1"),
    ("epochs", 1.5, TypeError, "whole number"),
    ("batch_size", 0, ValueError, "at least 1"),
    ("batch_size", True, TypeError, "whole number"),
    ("train_size", -5, ValueError, "at least 1"),
    ("transfer_size", -1, ValueError, "at least 0"),
    ("max_length", 2, ValueError, "from 3 to 512"),
    ("max_length", 513, ValueError, "from 3 to 512"),
    ("max_steps", -1, ValueError, "at least 0"),
    ("seed", -1, ValueError, "from 0 to 4294967295"),
    ("seed", 2**32, ValueError, "from 0 to 4294967295"),
    ("seed", "0", TypeError, "whole number"),
    ("learning_rate", 0.0, ValueError, "greater than 0"),
    ("teacher_learning_rate", -1e-5, ValueError, "greater than 0"),
    ("max_grad_norm", 0, ValueError, "greater than 0"),
    ("weight_decay", -0.1, ValueError, "0 or greater"),
    ("warmup_ratio", 1.0, ValueError, "below 1"),
    ("lean", 1, TypeError, "True or False"),
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), BAD_VALUES)
def test_bad_value_gets_one_sentence(name, value, error, allowed):
    with pytest.raises(error) as caught:
        DistillConfig(**{name: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"{name} is ")
    assert allowed in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_replace_checks_anew():
    config = DistillConfig()
    assert config.replace(alpha=0.9).alpha == 0.9
    with pytest.raises(ValueError, match="alpha is 2"):
        config.replace(alpha=2)


def test_teacher_learning_rate_comes_from_the_preset():
    for name, preset in PRESETS.items():
        assert DistillConfig(preset=name).teacher_learning_rate == preset.teacher_learning_rate
    assert DistillConfig(teacher_learning_rate=1e-6).teacher_learning_rate == 1e-6


def test_another_preset_brings_its_own_teacher_learning_rate():
    assert DistillConfig().replace(preset="bert-large") == DistillConfig(preset="bert-large")
    chosen = DistillConfig(teacher_learning_rate=1e-6).replace(preset="bert", alpha=0.9)
    assert chosen.teacher_learning_rate == 1e-6


def test_whole_numbers_and_floats_are_one_setting():
    assert DistillConfig(temperature=2, alpha=1).to_dict() == DistillConfig(temperature=2.0, alpha=1.0).to_dict()
    assert isinstance(DistillConfig(alpha=1).alpha, float)


def test_every_field_is_documented():
    for field in dataclasses.fields(DistillConfig):
        explanation = field.metadata["help"]
        assert len(explanation.split()) >= 3, field.name
        assert settings_help()[field.name] == explanation
    assert list(settings_help()) == [field.name for field in dataclasses.fields(DistillConfig)]


def test_lean_is_on_unless_it_is_turned_off():
    assert DistillConfig().lean is True
    assert DistillConfig(lean=False).to_dict()["lean"] is False


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_lean_takes_no_stand_in_for_true_and_false(value):
    with pytest.raises(TypeError, match=rf"^lean is {value!r}; give True or False\.$"):
        DistillConfig(lean=value)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, kd_helpers, kd_helpers.config; kd_helpers.DistillConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
