"""Where results and caches are kept, and how they survive crashes.

Everything is kept under one folder and addressed by a fingerprint of its provenance: what it was made of. A file is
written under a temporary name and renamed when it is complete. A folder carries the SHA-256 of its files and is trusted
only while they match. If something cannot be written, one sentence says why, and what was there before stays.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

from kd_helpers.config import expanded

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"

_FREE = "free some space, then run again: what was finished before is kept"
_ELSEWHERE = "set KD_ARTIFACTS (or the output folder) to a place that you may write to"
WHY_NOT_WRITTEN = {
    errno.ENOSPC: ("the disk is full", _FREE),
    errno.EDQUOT: ("the disk quota is used up", _FREE),
    errno.EFBIG: ("the file is larger than this system allows", _FREE),
    errno.EROFS: ("the disk is read-only", _ELSEWHERE),
    errno.EACCES: ("you have no right to", _ELSEWHERE),
    errno.EPERM: ("you have no right to", _ELSEWHERE),
    errno.EEXIST: ("a file stands where a folder is needed", _ELSEWHERE),
    errno.EISDIR: ("a folder stands where a file is needed", _ELSEWHERE),
    errno.ENOTDIR: ("a file stands where a folder is needed", _ELSEWHERE),
}


def artifacts_dir() -> Path:
    """`KD_ARTIFACTS` if set, else `artifacts/` in the checkout, else in the working directory.

    Raises:
        ValueError: `KD_ARTIFACTS` begins with a `~someone` who is no user of this machine.
    """
    if chosen := os.environ.get("KD_ARTIFACTS"):
        return Path(expanded(chosen, "KD_ARTIFACTS")).resolve()
    checkout = Path(__file__).resolve().parent.parent
    root = checkout if (checkout / "notebooks").is_dir() else Path.cwd()
    return root / "artifacts"


def fingerprint(provenance: dict[str, Any]) -> str:
    """16 hexadecimal digits that change whenever anything in the provenance does."""
    canonical = json.dumps(provenance, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Weights, configuration, tokenizer and vocabulary: the files of a model's folder that change what it computes.
MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")


def model_folder_digest(folder: Path) -> str:
    """A digest of every file of a model's folder that changes what the model computes."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_FILES and path.is_file()]
    return fingerprint({path.name: file_digest(path) for path in files})


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old one or the whole new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the whole new one, never a part.

    Raises:
        OSError: it can't be written; one sentence says why.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Say in one sentence why `place` can't be written, whichever library found out; other errors pass as they are."""
    try:
        yield
    except Exception as error:
        code = _error_number(error)
        if code not in WHY_NOT_WRITTEN:
            raise
        reason, remedy = WHY_NOT_WRITTEN[code]
        sentence = OSError(f"{place} can't be written: {reason}; {remedy}.")
        sentence.errno = code
        raise sentence from error


def _error_number(error: Exception) -> int | None:
    """The system's number of an error; safetensors and tokenizers, written in Rust, have it in their text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\b(?:code: |os error )(\d+)", str(error))
    return int(found[1]) if found else None


def make_folder(folder: Path) -> None:
    """Make a folder, and those around it, where they are not there.

    Raises:
        OSError: it can't be made; one sentence says why.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def save_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def load_json(path: Path) -> Any:
    """Read what `save_json` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged; delete it and run again.") from error


class BeingMadeError(RuntimeError):
    """Another process is making a folder or a file at this moment (see `locked`)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"another process is making {folder}.")


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep other processes from making `folder` meanwhile.

    The operating system releases the lock of a process that dies, so a stale lock cannot block anyone.

    Args:
        folder: what is made.
        wait: for another process that is making it.

    Raises:
        BeingMadeError: another process is making it, and `wait` is False.
    """
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=wait)
        except filelock.Timeout as held:
            raise BeingMadeError(folder) from held
    try:
        yield
    finally:
        lock.release()


def require_same(folder: Path, provenance: dict[str, Any]) -> None:
    """Note the provenance of a folder that grows over several starts; refuse to continue with any other.

    Raises:
        ValueError: the folder was begun with another provenance; what differs is named.
    """
    note = folder / PROVENANCE
    with locked(folder / "provenance"):
        if not note.exists():
            save_json(note, provenance)
        before = load_json(note)
    if differ := differences(before, provenance):
        raise ValueError(f"{folder} was begun with {', '.join(differ)}; choose another folder, or delete it.")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of `now` was different before, in words."""
    return [f"{name} {before.get(name)!r} (now {value!r})" for name, value in now.items() if before.get(name) != value]


def get_or_build(folder: Path, build: Callable[[Path], None], *, wait: bool = True) -> bool:
    """Make sure that `folder` holds what `build` makes; build it at most once, also among many processes.

    Args:
        folder: the final place. A damaged one is reported and built anew.
        build: fills the empty folder it is given; that folder is then renamed to `folder`.
        wait: for another process that is building it.

    Returns:
        True if it was there already.

    Raises:
        BeingMadeError: another process is building it, and `wait` is False.
    """
    with locked(folder, wait=wait):
        _remove_abandoned(folder)
        if is_intact(folder):
            return True
        if folder.exists():
            warnings.warn(f"{folder.parent.name}/{folder.name} is damaged; it is built anew.", stacklevel=2)
        write_folder(folder, build)
    return False


def write_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a folder beside `folder`, seal it, and put it in `folder`'s place when it is whole.

    One process at a time may write a folder: the caller holds its lock.

    Raises:
        OSError: it can't be written; one sentence says why. What stood there before still stands.
    """
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=_building(folder), ignore_cleanup_errors=True
        ) as building:
            made = Path(building) / "made"
            made.mkdir()
            build(made)
            seal(made, _files(made))
            if folder.exists():
                os.replace(folder, Path(building) / "old")
            os.replace(made, folder)


def _building(folder: Path) -> str:
    """How the temporary folders begin in which `folder` is built."""
    return f".building-{folder.name}-"


def _remove_abandoned(folder: Path) -> None:
    """Remove what a process left behind that was killed while it built `folder`."""
    for abandoned in folder.parent.glob(f"{glob.escape(_building(folder))}*"):
        shutil.rmtree(abandoned, ignore_errors=True)


def seal(folder: Path, files: Iterable[str]) -> None:
    """Write down the SHA-256 of some of a folder's files; a change in them is found by `damaged`."""
    save_json(folder / MANIFEST, {name: file_digest(folder / name) for name in files})


def damaged(folder: Path) -> list[str]:
    """The sealed files of a folder that are missing or changed; the seal itself where it can't be read."""
    try:
        sealed = load_json(folder / MANIFEST)
    except (OSError, ValueError):
        return [MANIFEST]
    return [name for name, digest in sealed.items() if not _fits(folder / name, digest)]


def foreign_files(folder: Path) -> list[str]:
    """The files of a folder that were not sealed into it, hidden ones too: whoever replaces it would delete them."""
    try:
        sealed = load_json(folder / MANIFEST)
    except (OSError, ValueError):
        sealed = {}
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [name for name in files if name not in sealed and name != MANIFEST]


def is_intact(folder: Path) -> bool:
    """Whether a folder holds exactly the files that were sealed into it."""
    return damaged(folder) == [] and load_json(folder / MANIFEST).keys() == set(_files(folder))


def _fits(path: Path, digest: str) -> bool:
    try:
        return file_digest(path) == digest
    except OSError:
        return False


def _files(folder: Path) -> list[str]:
    """Its files, those in its folders too; hidden ones are what a file browser or an editor leaves behind."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        name.as_posix()
        for name in names
        if name.name != MANIFEST and not any(part.startswith(".") for part in name.parts)
    ]
