"""What goes wrong on real machines: a sentence says so, nothing finished is lost, nothing half-written is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest
import torch
from support.models import tiny_bert
from support.runs import same_run, tiny_config

from kd_helpers import artifacts, checkpoints, loop, runs, teacher
from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, training_batches
from kd_helpers.experiments import sweep
from kd_helpers.loop import DivergedError, distill_epoch, train_classifier
from kd_helpers.losses import DistillationLoss
from kd_helpers.models import load_saved
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.resolve import resolve
from kd_helpers.runs import distill, find_run, load_run

pytestmark = pytest.mark.filterwarnings("ignore:the teacher is not shown")  # these are too small to learn


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer) -> DistillConfig:
    return tiny_config(tmp_path_factory.mktemp("models"), tokenizer)


@pytest.fixture(scope="module")
def data(small_data) -> DataSplits:
    return dataclasses.replace(small_data, teacher_train=small_data.train)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config, data):
    """The run as it ends where nothing goes wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_ARTIFACTS", str(tmp_path_factory.mktemp("whole")))
        return distill(config, data=data)


# A disk that is full, read-only, or not there


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes within; what comes after them is an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def disk(place: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A disk of its own at `place`; gives a function that mounts it again with other options."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield lambda other: subprocess.run(["mount", "-o", f"remount,{other}", str(place)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_file_that_can_not_grow_is_said_and_the_run_goes_on_later(own_artifacts, config, data, whole):
    with files_up_to(100_000), pytest.raises(OSError, match=r"can't be written: the file is larger .* is kept\.$"):
        distill(config, data=data)
    assert no_part_is_left(own_artifacts)
    assert same_run(whole, distill(config, data=data))


@pytest.mark.parametrize("kilobytes", [100, 2000, 5500, 8000, 10_000])
def test_a_full_disk_is_said_wherever_it_strikes_and_the_run_goes_on_later(
    tmp_path, monkeypatch, config, data, whole, kilobytes
):
    """The sizes are those at which the teacher, its logits, a checkpoint, the run and its last files meet the end."""
    with disk(tmp_path / "disk", f"size={kilobytes}k") as remount:
        monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "disk" / "artifacts"))
        with pytest.raises(OSError, match=r"can't be written: the disk is full; free some space, then run again"):
            distill(config, data=data)
        assert no_part_is_left(tmp_path / "disk")
        remount("size=100m")
        assert same_run(whole, distill(config, data=data))


def test_a_read_only_disk_is_said_and_what_is_on_it_can_be_read(tmp_path, monkeypatch, config, data, whole):
    with disk(tmp_path / "disk", "size=100m") as remount:
        monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "disk"))
        run = distill(config, data=data)
        remount("ro")
        with pytest.raises(OSError, match=r"can't be written: the disk is read-only; set KD_ARTIFACTS"):
            distill(config.replace(seed=1), data=data)
        assert same_run(whole, load_run(run.folder))


def test_a_folder_of_somebody_else_is_said(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o555)
    tmp_path.chmod(0o755)

    def write_as_nobody() -> None:
        if os.geteuid() == 0:  # root may write anywhere
            os.setuid(65534)
        try:
            artifacts.save_json(tmp_path / "theirs" / "file.json", {})
        except OSError as error:
            os._exit("you have no right to; set KD_ARTIFACTS" in str(error))

    process = multiprocessing.get_context("fork").Process(target=write_as_nobody)
    process.start()
    process.join()
    assert process.exitcode == 1


def test_a_file_where_a_folder_is_needed_is_said(tmp_path, monkeypatch, config, data):
    (tmp_path / "artifacts").write_text("mine")
    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "artifacts"))
    with pytest.raises(OSError, match="a file stands where a folder is needed"):
        distill(config, data=data)
    assert (tmp_path / "artifacts").read_text() == "mine"


def test_an_output_folder_that_can_not_be_made_is_said(own_artifacts, tmp_path, config, data):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError, match="a file stands where a folder is needed"):
        distill(config, data=data, output_dir=tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def no_part_is_left(folder: Path) -> bool:
    """Whether every folder with a seal is intact, and nothing half-built has a final name."""
    sealed = [path.parent for path in folder.rglob(artifacts.MANIFEST) if ".building" not in str(path)]
    return all(artifacts.damaged(place) == [] for place in sealed) and not list(folder.rglob("*.tmp"))


# Damaged files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = (truncate, flip_a_bit, empty, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [*runs.RUN_FILES, "student/model.safetensors", "student/config.json"])
def test_a_damaged_run_is_never_read(tmp_path, whole, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    provenance = artifacts.load_json(folder / artifacts.PROVENANCE)
    damage(folder / name)
    with pytest.raises(ValueError, match=rf"is damaged \({name}\); delete it and run again\.$"):
        load_run(folder)
    with pytest.warns(UserWarning, match="; it is made again"):
        assert find_run(folder, provenance) is None


def test_a_damaged_run_is_made_again(own_artifacts, config, data, whole):
    run = distill(config, data=data)
    flip_a_bit(run.folder / "metrics.json")
    with pytest.warns(UserWarning, match=r"is damaged \(metrics.json\); it is made again"):
        assert same_run(whole, distill(config, data=data))
    assert same_run(whole, load_run(run.folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "history.json", artifacts.MANIFEST])
def test_a_damaged_teacher_is_said_and_tuned_again(own_artifacts, config, data, name):
    setup = resolve(config, data)
    weights = [teacher.fine_tuned_teacher(setup).state_dict()]
    (folder,) = (own_artifacts / "teachers").glob("[!.]*")
    flip_a_bit(folder / name)
    with pytest.warns(UserWarning, match="damaged; it is built anew"):
        weights.append(teacher.fine_tuned_teacher(setup).state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("damage", DAMAGES[:3], ids=lambda damage: damage.__name__)
def test_a_damaged_plan_of_a_sweep_is_refused(tmp_path, damage):
    """A flipped bit in a parameter would put a run's numbers beside the wrong temperature."""
    content = {"notebook": "toy", "made_of": {}, "settings": [{"parameters": {"x": 1.0}, "run": "x=1.0-abc"}]}
    artifacts.save_json(tmp_path / "plan.json", content | {"digest": artifacts.fingerprint(content)})
    assert len(sweep.collect(tmp_path)) == 1
    damage(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"plan.json is damaged; delete it and give the same command again"):
        sweep.collect(tmp_path)


def test_a_finished_run_of_other_parameters_is_neither_taken_nor_overwritten(own_artifacts, tmp_path, config, data):
    first = distill(config, data=data, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a finished run with temperature 2.0 \(now 4.0\); choose another"):
        distill(config.replace(temperature=4.0), data=data, output_dir=tmp_path / "run")
    other = dataclasses.replace(data, train=data.train.select(range(60)))
    with pytest.raises(ValueError, match="holds a finished run with other texts, other teacher logits; choose another"):
        distill(config, data=other, output_dir=tmp_path / "run")
    assert same_run(first, load_run(tmp_path / "run"))


# Other processes, dead and alive


def test_what_a_lock_file_says_does_not_matter(own_artifacts, config, data, whole):
    distill(config, data=data)
    for lock in own_artifacts.rglob(".*.lock"):
        lock.write_bytes(b"\x00garbage")
    assert same_run(whole, distill(config, data=data))


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    def hold() -> None:
        with artifacts.locked(tmp_path / "thing"):
            (tmp_path / "held").touch()
            time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    lock = filelock.FileLock(tmp_path / ".thing.lock", timeout=0)
    with pytest.raises(filelock.Timeout):
        lock.acquire()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with artifacts.locked(tmp_path / "thing"):
        pass


def test_two_processes_make_one_run(own_artifacts, one_thread, config, data, whole):
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=distill, args=(config,), kwargs={"data": data}) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert same_run(whole, distill(config, data=data))
    for kind in ("teachers", "teacher_logits", "runs"):
        assert len(list((own_artifacts / kind).glob("[!.]*"))) == 1
    assert not list((own_artifacts / "checkpoints").glob("[!.]*"))


# Training that can't go on


def small_run(tokenized, tokenizer, *, batch_size: int = 16, **options):
    batches = training_batches(tokenized, tokenizer, batch_size, seed=0)
    return train_classifier(tiny_bert(), batches, description=None, **options)


def test_a_run_that_diverges_stops_and_says_where(tmp_path, monkeypatch, tokenized, tokenizer):
    seen = []

    def burst(student_logits, *given, **options):
        seen.append(1)
        return DistillationLoss(*([student_logits.sum() * (torch.inf if len(seen) == 11 else 1e-3)] * 3))

    monkeypatch.setattr(loop, "distillation_loss", burst)
    with pytest.raises(DivergedError) as caught:
        small_run(tokenized, tokenizer, config=DistillConfig(alpha=0.0), checkpoints=tmp_path)
    sentence = str(caught.value)
    assert sentence.startswith("training diverged at step 11 (total ")
    assert "gradient norm nan" in sentence or "gradient norm inf" in sentence
    assert sentence.endswith(f"the last good checkpoint is {tmp_path / 'step-00000008'}.")
    assert checkpoints.last_checkpoint(tmp_path) == tmp_path / "step-00000008"


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tokenized, tokenizer):
    student = tiny_bert()
    optimizer = make_optimizer(student, learning_rate=1e-3, weight_decay=0.01)
    scheduler = make_scheduler(optimizer, steps=100)
    student.classifier.weight.register_hook(lambda gradient: gradient * torch.nan)
    batches = training_batches(tokenized, tokenizer, 16, seed=0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(DivergedError, match=r"at step 1 \(total 1\.\d+, soft 0, hard 1\.\d+, gradient norm nan\)"):
        distill_epoch(student, batches, optimizer, scheduler, temperature=1.0, alpha=0.0)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_learning_rate_that_is_far_too_high_is_a_divergence(own_artifacts, config, data):
    with pytest.raises(DivergedError, match="lower the learning rate"):
        distill(config.replace(learning_rate=1e30, alpha=0.0), data=data)


@pytest.mark.parametrize(("batch_size", "remedy"), [(16, "try batch_size=8."), (1, "try a max_length below {length}.")])
def test_too_little_memory_says_what_to_try(monkeypatch, tokenized, tokenizer, batch_size, remedy):
    def greedy(*given, **options):
        return torch.empty(2**46, dtype=torch.uint8)  # more than any machine has

    monkeypatch.setattr(loop, "distillation_loss", greedy)
    length = next(iter(training_batches(tokenized, tokenizer, batch_size, seed=0)))["input_ids"].shape[1]
    with pytest.raises(MemoryError) as caught:
        small_run(tokenized, tokenizer, batch_size=batch_size, config=DistillConfig(alpha=0.0))
    assert str(caught.value) == (
        f"a step with batch_size={batch_size} and {length} tokens a text needs more memory than there is; "
        f"{remedy.format(length=length)}"
    )


def test_an_error_of_another_kind_passes_as_it_is(monkeypatch, tokenized, tokenizer):
    def broken(*given, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(loop, "distillation_loss", broken)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        small_run(tokenized, tokenizer, config=DistillConfig(alpha=0.0))


def test_a_student_that_was_saved_is_still_there_when_the_next_run_fails(own_artifacts, monkeypatch, config, data):
    run = distill(config, data=data)
    with files_up_to(100_000), pytest.raises(OSError, match="can't be written"):
        distill(config.replace(seed=1), data=data)
    assert artifacts.damaged(run.folder) == []
    assert load_saved(run.folder / "student").config.num_labels == 3
