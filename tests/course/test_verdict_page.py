"""The page of a verdict, and the command that writes it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from support.own_texts import own_config

from kd_helpers import artifacts
from kd_helpers.course import verdict_page
from kd_helpers.course.verdict_page import (
    answer_word,
    break_even,
    classes_table,
    headline,
    interval,
    main,
    models_table,
    next_steps,
    seconds_of,
    write_page,
)
from kd_helpers.experiments.judgement import CANNOT_TELL, DOES_NOT_PAY, PAYS, UNFINISHED
from kd_helpers.experiments.signals import BASELINE
from kd_helpers.experiments.verdict import TEACHER, verdict
from kd_helpers.experiments.verdict_plan import Plan
from kd_helpers.experiments.verdict_runs import DISTILLED, TRANSFER


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> dict:
    """A small verdict, with everything that a page shows."""
    folder = tmp_path_factory.mktemp("verdict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_ARTIFACTS", str(folder / "artifacts"))
        patch.setattr("kd_helpers.experiments.verdict.costs", made_up_costs)
        plan = Plan(lengths=(2, 4), seeds=(4, 4), tries=8)
        result = verdict(own_config(folder, tokenizer), plan=plan, report=lambda plan: None)
    return json.loads(json.dumps(result))


def made_up_costs(ground, runs, student, *, eight_bits):
    rows = [("teacher", "torch", 100.0), ("student", "torch", 400.0), ("student", "int8", 1000.0)]
    shared = {"megabytes": 1.0, "latency_p50_ms": 2.0}
    return [{"model": m, "way": way, "texts_per_second": speed, "accuracy": 0.5} | shared for m, way, speed in rows]


@pytest.fixture
def result(made) -> dict:
    """The same, to be changed."""
    return copy.deepcopy(made)


def judged(result: dict, *answers: str) -> dict:
    """The result with these answers, to the two parts of the first question and to the others."""
    estimate = {"gain": 0.046, "low": 0.031, "high": 0.06, "level": 0.95}
    entries = []
    for (question, student), found in zip(
        (("baseline", DISTILLED), ("baseline", TRANSFER), ("teacher", TRANSFER), ("rivals", TRANSFER)),
        answers,
        strict=True,
    ):
        entry = {"question": question, "student": student, "against": BASELINE, "answer": found}
        if found != UNFINISHED:
            entry["estimate"] = estimate | {"gain": estimate["gain"] + (student == TRANSFER) / 100}
        if found == CANNOT_TELL:
            entry["needed"] = {"seeds": None, "texts": 3456}
        entries.append(entry)
    return result | {"questions": entries}


def test_the_verdict_in_one_sentence(result):
    assert headline(judged(result, CANNOT_TELL, PAYS, DOES_NOT_PAY, CANNOT_TELL)) == (
        "Distillation **pays** against the same student without a teacher (+5.6 points, +3.1 to +6.0); the student "
        "**is not close enough** to its teacher (+5.6 points, +3.1 to +6.0); these texts **cannot tell** whether it "
        "pays against the cheap rivals."
    )
    assert headline(judged(result, DOES_NOT_PAY, UNFINISHED, UNFINISHED, UNFINISHED)).startswith("Whether distillation")
    assert headline(judged(result, *[UNFINISHED] * 4)).startswith("**Nothing is judged yet**: students were still")


def test_the_first_question_is_answered_by_its_better_part(result):
    for parts, expected in (
        ((PAYS, DOES_NOT_PAY), PAYS),
        ((DOES_NOT_PAY, CANNOT_TELL), CANNOT_TELL),
        ((DOES_NOT_PAY, DOES_NOT_PAY), DOES_NOT_PAY),
    ):
        found = judged(result, *parts, PAYS, PAYS)
        assert verdict_page.of_question(found, "baseline")["answer"] == expected


def test_what_would_decide_is_said_in_test_texts_and_in_labelled_texts(result):
    said = "\n".join(next_steps(judged(result, CANNOT_TELL, PAYS, PAYS, PAYS)))
    assert "about 3,500 test texts (17,000 labelled texts in all) would do" in said
    result["config"]["test_data"] = "test.csv"
    said = "\n".join(next_steps(judged(result, CANNOT_TELL, PAYS, PAYS, PAYS)))
    assert "about 3,500 test texts in a file of their own (`--test-data`) would do" in said


def test_what_the_budget_has_cut_is_named_first(result):
    assert not any("All labels" in one for one in next_steps(result))
    assert any("More validation texts" in one for one in next_steps(result))
    result["before"]["labelled"] = 5000
    (said,) = (one for one in next_steps(result) if "All labels" in one)
    assert f"only {result['sizes']['teacher_train']['all']:,} of 5,000 labelled texts" in said
    result["sizes"]["validation"]["all"] = 200
    assert not any("More validation texts" in one for one in next_steps(result))


def test_an_unfinished_arm_is_named_and_the_budget_is_the_remedy(result):
    result["unfinished"] = [DISTILLED]
    said = next_steps(result)[0]
    assert "“Distilled, same labels”" in said
    assert "`--budget 2m`; what is trained already is used again." in said
    result["before"]["max_length"] = 4 * result["config"]["max_length"]
    assert f"`--budget 2m` with `--max-length {result['config']['max_length']}`" in next_steps(result)[0]
    assert "Distilled, same labels (still improving)" in models_table(result)


def test_a_teacher_that_is_no_better_than_the_student_is_the_first_thing_to_change(result):
    for row in result["table"]:
        row["accuracy"] = 0.6 if row["name"] == TEACHER else 0.7
    assert any("A better teacher first" in one for one in next_steps(result))
    for row in result["table"]:
        row["accuracy"] = 0.8 if row["name"] == TEACHER else 0.7
    assert not any("A better teacher first" in one for one in next_steps(result))


def test_settings_are_advised_only_where_they_are_shown_to_be_better(result):
    usual = {name: result["config"][name] for name in ("temperature", "alpha")}
    hotter = usual | {"temperature": 4.0, "gain": 0.02, "low": -0.01, "high": 0.05}
    softer = usual | {"alpha": 1.0, "gain": 0.01, "low": -0.01, "high": 0.03}
    result["tries"]["settings"] = [softer, hotter]
    (said,) = (one for one in next_steps(result) if "Settings" in one)
    assert "other values of temperature and alpha, one at a time" in said
    assert "None was shown to be better" in said
    assert "The best was temperature 4 (+2.0 points, −1.0 to +5.0)" in said
    result["tries"]["settings"] = [softer, hotter | {"low": 0.01}]
    (said,) = (one for one in next_steps(result) if "Settings" in one)
    assert "Temperature 4 was better than the usual" in said
    assert "`--temperature 4`" in said
    assert "--alpha" not in said


def test_the_rates_are_named_for_every_kind_of_student(result):
    rate = result["config"]["learning_rate"]
    result["rates"] = dict.fromkeys(result["rates"], rate) | {DISTILLED: 3 * rate}
    said = verdict_page.rates_used(result)
    assert f"rates {rate:g} and {3 * rate:g} were tried" in said
    assert f"Distilled, same labels: {3 * rate:g}" in said
    assert f"Labels only: {rate:g}" in said
    result["plan"]["rates"] = [3.0]
    assert verdict_page.rates_used(result) == f"Learning rate {3 * rate:g}."


def test_a_class_that_suffers_is_named_whatever_its_name_holds(result):
    row = {"class": "a|*b*", "texts": 9, "student": 0.2, "reference": 0.5, "gain": -0.3, "low": -0.5, "high": -0.1}
    result["by_class"] = [row]
    assert any(r"the class a\|\*b\*" in one for one in next_steps(result))
    assert r"| a\|\*b\* | 9 | 50.0% | 20.0% | −30.0 points, −50.0 to −10.0 |" in classes_table(result)


def test_break_even_is_the_training_time_over_the_time_that_a_text_saves(result):
    result["seconds"] = {"student": 30.0, "teacher": 45.0}
    assert "after about 10,000 texts" in break_even(result), "75 s over 1/100 − 1/400 s a text"
    for row in result["costs"]:
        row["texts_per_second"] = 100.0
    assert "never paid back" in break_even(result)


def test_labels_of_lines_that_end_close_to_each_other_are_moved_apart():
    assert verdict_page.label_offsets({"a": 0.0, "b": 1.0, "c": 100.0}, height=200, gap=15) == {"a": 0, "b": 13, "c": 0}


@pytest.mark.parametrize(("share", "written"), [(0.0123, "+1.2"), (-0.0123, "−1.2"), (0.0, "0.0"), (-0.0004, "0.0")])
def test_points_have_a_sign_unless_they_are_zero(share, written):
    assert verdict_page.points(share) == written
    assert verdict_page.points(share, signed=False) == written.lstrip("+")


def test_the_page_stands_alone_and_says_what_the_result_says(result, tmp_path):
    write_page(result, "texts.csv", tmp_path)
    text, page = ((tmp_path / name).read_text(encoding="utf-8") for name in ("verdict.md", "verdict.html"))
    assert artifacts.load_json(tmp_path / "verdict.json") == result
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "nothing is loaded from elsewhere"
    assert text.count("![") == page.count("<img") == len(list(tmp_path.glob("*.png")))
    assert str(tmp_path) not in text + page
    for entry in result["questions"]:
        assert f"**{answer_word(entry)}**" in text
        if "estimate" in entry:
            assert interval(entry["estimate"]) in text
    for row in result["table"]:
        assert f"{row['accuracy']:.1%}" in text
    assert "<h1>Does distillation pay on texts.csv?</h1>" in page


def test_a_page_without_any_answer(result, tmp_path):
    nothing = judged(result, *[UNFINISHED] * 4) | {"by_class": [], "tries": {"settings": [], "curve": []}}
    for entry in nothing["questions"][2:]:
        entry |= {"student": None, "against": None}
    write_page(nothing, "texts.csv", tmp_path)
    assert not (tmp_path / "differences.png").exists()
    assert "no distilled student was finished" in (tmp_path / "verdict.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("1h", 3600), ("1h30m", 5400), ("90s", 90), (" 5M ", 300)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0m", "-5m", "1.5h", "30m1h"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match="give a time such as 30m, 1h30m or 90s"):
        seconds_of(text)


def test_the_command_says_its_plan_and_writes_its_page(tmp_path, own_artifacts, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("kd_helpers.experiments.verdict.costs", made_up_costs)
    config = own_config(tmp_path, tokenizer)
    models = [f"--{name}-checkpoint={tmp_path / name}" for name in ("teacher", "student")]
    status = main([config.data, *models, "--teacher-epochs=0", "--budget=1s", f"--out={tmp_path / 'page'}"])
    assert status == 0
    said = capsys.readouterr().out
    assert said.startswith("The plan for texts.csv\nteacher: ")
    assert "the answer is a rough one" in said
    assert f"The page: {tmp_path / 'page' / 'verdict.html'}" in said
    result = artifacts.load_json(tmp_path / "page" / "verdict.json")
    assert result["sizes"]["train"]["all"] == result["sizes"]["teacher_train"]["all"] > 100, "all labels, for both"
    assert result["plan"]["rough"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget", "soon"], "the budget is 'soon'; give a time such as 30m, 1h30m or 90s."),
        (["--effect", "0"], "effect is 0.0; give a share between 0 and 1: 0.01 is one point."),
        (["--labels", "0"], "train_size is 0; give a whole number of at least 1."),
        (["nowhere.csv"], "there is no file 'nowhere.csv'"),
    ],
)
def test_what_the_command_refuses(arguments, sentence, own_artifacts, capsys):
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, own_artifacts, capsys):
    (tmp_path / "page").write_text("")
    with pytest.raises(SystemExit):
        main([f"--out={tmp_path / 'page'}"])
    assert "is a file; choose a folder for the page." in capsys.readouterr().err
    assert Path(tmp_path / "page").is_file()


def test_the_page_of_another_question_is_not_written_over(result, tmp_path, own_artifacts, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "texts.csv").write_text("text,label\n")
    page = own_artifacts / "verdicts" / "texts"
    write_page(result, "texts.csv", page)
    written = (page / "verdict.json").read_bytes()
    own = result["config"]
    models = [f"--{name}-checkpoint={own[f'{name}_checkpoint']}" for name in ("teacher", "student")]
    for arguments, differs in (
        ([str(tmp_path / "other" / "texts.csv")], "data "),
        ([own["data"], "--measure=macro_recall"], "measure 'accuracy' (now 'macro_recall')"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *models])
        assert f"holds the page of another verdict, with {differs}" in capsys.readouterr().err
    assert (page / "verdict.json").read_bytes() == written
