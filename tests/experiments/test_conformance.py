"""What other toolkits compute: the definition, the reading of a loss, its translation, and the stored result."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kd_helpers.experiments import conformance
from kd_helpers.experiments.conformance import (
    TOLERANCE,
    Case,
    Reading,
    as_markdown,
    cases,
    counted,
    definition,
    errors_table,
    instruction,
    measure,
    measure_toolkit,
    measured_elsewhere,
    not_run,
    note,
    reason,
    report,
    rows,
    stored_conformance,
    translation_table,
    verdict,
)
from kd_helpers.experiments.conformance_toolkits import TOOLKITS, Batch, Call, Toolkit
from kd_helpers.losses import distillation_loss, token_hard_loss, token_soft_loss

WORDS = ("equal", "translated", "partly", "differs")


def soft(batch: Batch, t: float, *, reduction: str = "batchmean") -> torch.Tensor:
    """PyTorch's KL, as most toolkits call it."""
    log_q, log_p = (logits.log_softmax(dim=-1) for logits in (batch.student / t, batch.teacher / t))
    return F.kl_div(log_q, log_p, log_target=True, reduction=reduction)


def hard(batch: Batch) -> torch.Tensor:
    return F.cross_entropy(batch.student, batch.labels)


def right(batch: Batch, t: float, alpha: float) -> torch.Tensor:
    return alpha * t**2 * soft(batch, t) + (1 - alpha) * hard(batch)


def flipped(batch: Batch, t: float, alpha: float) -> torch.Tensor:
    return right(batch, t, 1 - alpha)


def no_t_squared(batch: Batch, t: float, alpha: float) -> torch.Tensor:
    return alpha * soft(batch, t) + (1 - alpha) * hard(batch)


def two_weights(batch: Batch, t: float, first: float, second: float) -> torch.Tensor:
    return first * soft(batch, t) + second * hard(batch)


def mean(batch: Batch, t: float, alpha: float) -> torch.Tensor:
    return alpha * t**2 * soft(batch, t, reduction="mean") + (1 - alpha) * hard(batch)


def flipped_mean_without_t_squared(batch: Batch, t: float, alpha: float) -> torch.Tensor:
    return (1 - alpha) * soft(batch, t, reduction="mean") + alpha * hard(batch)


def dropped_at_0(batch: Batch, t: float, alpha: float) -> torch.Tensor:
    return soft(batch, t) if alpha == 0 else right(batch, t, 1 - alpha)


def one_sided(batch: Batch, t: float, alpha: float) -> torch.Tensor:
    undivided = batch._replace(student=batch.student * t)  # `soft` divides it again
    return alpha * t**2 * soft(undivided, t) + (1 - alpha) * hard(batch)


def cross_entropy_only(batch: Batch) -> torch.Tensor:
    rows_ = counted(batch)
    log_q = rows_.student.float().log_softmax(dim=-1)
    return -(rows_.teacher.float().softmax(dim=-1) * log_q).sum(dim=-1).mean()


def labelled_only(batch: Batch, t: float) -> torch.Tensor:
    counts = batch.labels != -100
    return soft(Batch(batch.student[counts], batch.teacher[counts], batch.labels[counts]), t)


def something_else(batch: Batch, t: float, alpha: float) -> torch.Tensor:
    return right(batch, t, alpha) + 0.1 * batch.student.square().mean()


@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "confident", "tokens"])
def test_the_definition_is_the_loss_of_the_package(kind):
    chosen = [case for case in cases() if case.kind == kind]
    assert len(chosen) >= 12
    for case in chosen:
        check_definition(case)


def check_definition(case: Case) -> None:
    (_, batch, t, alpha), near = case, {"rtol": 1e-5, "atol": 1e-6}
    student = batch.student.clone().requires_grad_()
    found = definition(batch._replace(student=student), t, alpha)
    (gradient,) = torch.autograd.grad(found, student)
    single = batch.student.float().requires_grad_()
    if case.kind == "tokens":
        counts = batch.labels != -100
        total = alpha * token_soft_loss(single, batch.teacher, counts, temperature=t)
        total = total + (1 - alpha) * token_hard_loss(single, batch.labels)
    else:
        total = distillation_loss(single, batch.teacher, batch.labels, temperature=t, alpha=alpha).total
    assert_close(total.double(), found, **near)
    assert_close(torch.autograd.grad(total, single)[0].double(), gradient, **near)


def test_the_cases_are_the_same_for_all_and_hold_what_is_asked():
    found = cases()
    assert {case.kind for case in found} == {"labelled", "unlabelled", "confident", "tokens"}
    assert {case.temperature for case in found} == {1.0, 2.0, 4.0}
    assert {case.alpha for case in found} == {0.0, 0.3, 0.9, 1.0}
    shapes = {tuple(case.batch.student.shape) for case in found if case.kind == "labelled"}
    assert shapes == {(size, classes) for size in (1, 8, 32) for classes in (2, 3, 20)}
    for case in found:
        assert (case.kind in ("unlabelled", "tokens")) == bool((case.batch.labels == -100).any())
    for again, case in zip(cases(tokens=False), found, strict=False):
        assert_close(again.batch.student, case.batch.student, rtol=0, atol=0)


ONE = ("weight",)


@pytest.mark.parametrize(
    ("call", "reading", "word", "set_there"),
    [
        (Call("right", right, ONE), {}, "equal", "`weight` = alpha"),
        (Call("flipped", flipped, ONE), {"weight_of": "hard"}, "translated", "`weight` = 1 − alpha"),
        (
            Call("no T²", no_t_squared, ONE),
            {"t_squared": "never"},
            "translated",
            "`weight` = alpha · T² / s, the total × s, where s = alpha · T² + 1 − alpha",
        ),
        (
            Call("two weights", two_weights, ("first", "second")),
            {"t_squared": "never"},
            "translated",
            "`first` = alpha · T², `second` = 1 − alpha",
        ),
        (
            Call("mean", mean, ONE),
            {"mean_over": "N · C"},
            "translated",
            "`weight` = alpha · C / s, the total × s, where s = alpha · C + 1 − alpha",
        ),
        (
            Call("three at once", flipped_mean_without_t_squared, ONE),
            {"weight_of": "hard", "mean_over": "N · C", "t_squared": "never"},
            "translated",
            "`weight` = (1 − alpha) / s, the total × s, where s = alpha · T² · C + 1 − alpha",
        ),
        (
            Call("dropped at 0", dropped_at_0, ONE),
            {"weight_of": "hard", "t_squared": "beside a hard loss"},
            "translated",
            "`weight` = 1 − alpha; at alpha = 1 the total × T²",
        ),
        (
            Call("cross-entropy", cross_entropy_only, takes_temperature=False, precision=torch.float32, tokens=True),
            {"divergence": "cross-entropy", "t_squared": "never"},
            "translated",
            "divide both logits by T; alpha · T² × its loss + (1 − alpha) × hard loss",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Call) else "",
)
def test_a_loss_is_read_and_translated(call, reading, word, set_there):
    row = measure(call)
    assert row["reading"] == dataclasses.asdict(Reading(**reading))
    assert verdict(row) == word
    assert instruction(row) == set_there
    assert row["translated"] == row["cases"]
    assert row["after"] <= (TOLERANCE if row["precision"] == "float64" else 20 * TOLERANCE)
    assert (row["before"] <= TOLERANCE) == (word == "equal")


def test_t_on_one_side_is_named_and_fits_at_1_only():
    row = measure(Call("one-sided", one_sided, ONE))
    assert row["reading"] == dataclasses.asdict(Reading(divided="teacher"))
    assert verdict(row) == "partly"
    assert {tuple(fits) for fits in row["fits"].values()} == {(1.0,)}
    assert "only the teacher's logits" in note(row)
    assert instruction(row) == "`weight` = alpha (at T = 1 only)"


def test_a_loss_that_drops_unlabelled_rows_fits_where_all_have_labels():
    row = measure(Call("labelled only", labelled_only))
    assert Reading(**row["reading"]).departures() == ["t_squared", "unlabelled"]
    assert verdict(row) == "partly"
    assert row["fits"] == {"labelled": [1.0, 2.0, 4.0], "unlabelled": [], "confident": [1.0, 2.0, 4.0]}
    assert row["after_where_it_fits"] <= TOLERANCE < row["after"]


def test_what_fits_no_reading_is_said_with_its_ratio():
    row = measure(Call("something else", something_else, ONE))
    assert row["reading"] is None
    assert verdict(row) == "differs"
    assert instruction(row) == "not possible with this call"
    assert note(row).startswith("not understood: 1")
    assert row["ratio"][2] > 1.1


def test_what_is_not_a_number_fits_nothing():
    row = measure(Call("nan", lambda batch, t, alpha: right(batch, t, alpha) * float("nan"), ONE))
    assert row["reading"] is None
    assert row["before"] == float("inf")
    assert row["equal"] == row["translated"] == 0


def test_a_loss_without_gradient_is_not_equal():
    row = measure(Call("detached", lambda batch, t: soft(batch._replace(student=batch.student.detach()), t), ()))
    assert row["translated"] < row["cases"]


def raising(message: str) -> Callable[..., torch.Tensor]:
    def adapter(*_: object) -> torch.Tensor:
        raise ImportError(message)

    return adapter


def test_what_does_not_run_is_named_without_a_place_on_this_machine():
    adapter = raising("cannot import name 'A' from 'b' (/somewhere/site-packages/b.py)\nmore")
    found = measure_toolkit(Toolkit("broken", ("kd-helpers",), (Call("one", adapter), Call("two", labelled_only))))
    assert found["not_run"] == [{"call": "one", "reason": "ImportError: cannot import name 'A' from 'b'"}]
    assert [row["verdict"] for row in found["rows"]] == ["partly"]
    assert reason(ValueError("")) == "ValueError: no message"


def test_this_course_is_measured_in_a_process_of_its_own(tmp_path):
    found = measured_elsewhere(TOOLKITS[0], tmp_path / "here")
    assert [row["verdict"] for row in found["rows"]] == ["equal"]
    assert found["not_run"] == []


def test_a_toolkit_that_cannot_be_installed_is_named(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no such version")
    monkeypatch.setattr(conformance.subprocess, "run", lambda *_, **__: failed)
    found = measured_elsewhere(TOOLKITS[1], tmp_path)
    assert found["rows"] == []
    assert {call["reason"] for call in found["not_run"]} == {"pip could not install it"}
    found = measured_elsewhere(TOOLKITS[0], tmp_path)
    assert {call["reason"] for call in found["not_run"]} == {"its process broke off"}


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    measured = [measure_toolkit(Toolkit("some", ("kd-helpers",), (Call("right", right, ONE),)))]
    monkeypatch.setattr(conformance, "measured_elsewhere", lambda toolkit, folder: measured.pop())
    monkeypatch.setattr(conformance.run, "__defaults__", ((Toolkit("some", ("kd-helpers",), ()),),))
    assert conformance.main(["--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["made_with"]["module"] == "kd_helpers.experiments.conformance"
    assert [row["call"] for row in rows(result)] == ["right"]
    assert report(result) in capsys.readouterr().out


def test_at_least_six_toolkits_are_stored_with_their_versions():
    result = stored_conformance()
    assert len({row["toolkit"] for row in rows(result)}) >= 6
    assert all(row["version"] for row in rows(result))
    assert {"torch", "date", "machine"} <= set(result["made_with"])
    assert result["tolerance"] == TOLERANCE
    ours = result["toolkits"][0]
    assert [row["verdict"] for row in ours["rows"]] == ["equal"]


def test_every_stored_row_is_equal_or_translated_or_named():
    for row in rows(stored_conformance()):
        limit = TOLERANCE if row["precision"] == "float64" else 20 * TOLERANCE
        assert row["verdict"] == verdict(row)
        if row["verdict"] in ("equal", "translated"):
            assert row["after"] <= limit, row
        else:
            assert note(row), row
            assert row["after_where_it_fits"] <= limit, row


def test_the_stored_result_is_what_chapter_03_says_of_it():
    found = {(row["toolkit"], row["call"]): Reading(**row["reading"]) for row in rows(stored_conformance())}
    verdicts = {(row["toolkit"], row["call"]): row["verdict"] for row in rows(stored_conformance())}
    by_name, by_class = (("Keras", f"LogitsDistillation{how}") for how in ("", "(loss=KLDivergence())"))
    assert found[by_name].divergence == "KL of the logits, without softmax"
    assert (verdicts[by_name], verdicts[by_class]) == ("differs", "partly")
    assert found["torchdistill", "KDLoss"].weight_of == "hard"
    assert found["NVIDIA ModelOpt", "LogitsDistillationLoss"].mean_over == "N · C"
    tokens = {(row["toolkit"], row["call"]) for row in rows(stored_conformance()) if row["tokens"]}
    assert {found[key].unlabelled for key in tokens} == {"left out"}
    assert {found[key].unlabelled for key in found.keys() - tokens} == {"counted"}


def test_every_call_is_stored_or_named_with_a_reason():
    result = stored_conformance()
    stored = [
        (toolkit["toolkit"], sorted(entry["call"] for entry in toolkit["rows"] + toolkit["not_run"]))
        for toolkit in result["toolkits"]
    ]
    assert stored == [(toolkit.name, sorted(call.name for call in toolkit.calls)) for toolkit in TOOLKITS]
    for line in not_run(result):
        assert len(line.split(": ", 1)[1]) > 10


def test_the_stored_result_names_no_place_and_the_tables_hold_every_row():
    result = stored_conformance()
    text = json.dumps(result)
    assert "/" not in text.replace("N/A", "")
    assert "Infinity" not in text
    assert "NaN" not in text
    assert len(translation_table(result)) == len(errors_table(result)) == len([*rows(result)])
    assert set(errors_table(result)["verdict"]) <= set(WORDS)
    assert not translation_table(result).isna().any(axis=None)
    assert as_markdown(translation_table(result)).count("\n") == len([*rows(result)]) + 1
