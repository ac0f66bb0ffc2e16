from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import pytest
from support.processes import build_slowly

from kd_helpers import artifacts


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "mine"))
    assert artifacts.artifacts_dir() == tmp_path / "mine"
    monkeypatch.delenv("KD_ARTIFACTS")
    assert artifacts.artifacts_dir().name == "artifacts"


def test_fingerprint_follows_the_content_alone():
    one = artifacts.fingerprint({"a": 1, "b": [2.0, "x"]})
    assert one == artifacts.fingerprint({"b": [2.0, "x"], "a": 1})
    assert one != artifacts.fingerprint({"a": 1, "b": [2.5, "x"]})
    assert len(one) == 16


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(target: Path) -> None:
        (target / "half.txt").write_text("half")
        raise RuntimeError("the power went out")

    with pytest.raises(RuntimeError, match="power"):
        artifacts.get_or_build(tmp_path / "thing", fail)
    assert [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_built_once_and_found_again(tmp_path):
    built = []

    def build(target: Path) -> None:
        built.append(1)
        (target / "a.txt").write_text("whole")

    assert artifacts.get_or_build(tmp_path / "thing", build) is False
    assert artifacts.get_or_build(tmp_path / "thing", build) is True
    assert built == [1]


def test_an_added_file_counts_as_damage(tmp_path):
    artifacts.write_folder(tmp_path / "thing", lambda target: (target / "a.txt").write_text("whole"))
    assert artifacts.is_intact(tmp_path / "thing")
    (tmp_path / "thing" / "b.txt").write_text("stranger")
    assert not artifacts.is_intact(tmp_path / "thing")


def test_what_a_file_browser_leaves_behind_is_no_damage(tmp_path):
    artifacts.write_folder(tmp_path / "thing", lambda target: (target / "a.txt").write_text("whole"))
    (tmp_path / "thing" / ".DS_Store").write_text("window size")
    assert artifacts.is_intact(tmp_path / "thing")


def test_a_folder_is_replaced_whole(tmp_path):
    artifacts.write_folder(tmp_path / "thing", lambda target: (target / "old.txt").write_text("old"))
    artifacts.write_folder(tmp_path / "thing", lambda target: (target / "new.txt").write_text("new"))
    assert {path.name for path in (tmp_path / "thing").iterdir()} == {"new.txt", artifacts.MANIFEST}
    assert artifacts.is_intact(tmp_path / "thing")


def test_many_processes_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_slowly, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds.log").read_text() == "built\n"


def test_one_who_does_not_wait_is_told_that_another_is_making_it(tmp_path):
    def make(target: Path) -> None:
        (target / "file.txt").write_text("made")

    folder = tmp_path / "deep" / "thing"
    with artifacts.locked(folder):
        with pytest.raises(artifacts.BeingMadeError, match=re.escape(f"another process is making {folder}.")):
            artifacts.get_or_build(folder, make, wait=False)
        assert artifacts.get_or_build(tmp_path / "deep" / "other", make, wait=False) is False
    assert artifacts.get_or_build(folder, make, wait=False) is False, "made now, not found"
    assert artifacts.get_or_build(folder, make, wait=False) is True


def test_what_a_killed_process_left_is_removed_even_if_the_folder_is_intact(tmp_path):
    def build(target):
        (target / "file.txt").write_text("all of it")

    folder = tmp_path / "made"
    artifacts.get_or_build(folder, build)
    abandoned = tmp_path / ".building-made-abc"
    abandoned.mkdir()
    (tmp_path / ".building-other-abc").mkdir()
    assert artifacts.get_or_build(folder, build) is True
    assert not abandoned.exists()
    assert (tmp_path / ".building-other-abc").exists(), "another process may be building that one"
