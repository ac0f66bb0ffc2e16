"""Killing a process right before any of its writes, or in the middle of one.

A forked child counts, through an audit hook, whatever it does to files below a folder, and ends itself as SIGKILL would
(`os._exit` runs no `finally`, flushes nothing and removes nothing). What native code writes, an audit hook does not
see; safetensors' files are therefore announced by a patched `save_file`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import transformers

KILLED = 9
WRITING = "support.write"  # announced by `save_file`


class Event(NamedTuple):
    """Something that a process is about to do to a file or folder."""

    kind: str
    path: str

    @property
    def writes(self) -> bool:
        """Whether it makes the content of a file, so that a part of it may be on the disk when the process dies."""
        return self.kind in ("open", WRITING)


def events_of(action: Callable[[], object], folder: Path) -> list[Event]:
    """What `action` does to files below `folder`, in a process of its own that nobody kills."""
    log = folder.with_name(f"{folder.name}.events.json")
    code = _in_child(action, folder, log=log)
    assert code == 0, f"the process ended with exit status {code}"
    return [Event(*entry) for entry in json.loads(log.read_text())]


def killed_before(action: Callable[[], object], folder: Path, number: int) -> None:
    """Let a process die right before its event of that number, counted from 0."""
    assert _in_child(action, folder, at=number) == KILLED


def killed_within(action: Callable[[], object], folder: Path, number: int) -> None:
    """Let a process die when the file that its event of that number writes is half on the disk."""
    assert _in_child(action, folder, at=number, half=True) == KILLED


def _in_child(action: Callable[[], object], folder: Path, **options: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=_watched, args=(action, folder), kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


def _watched(
    action: Callable[[], object], folder: Path, *, at: int | None = None, half: bool = False, log: Path | None = None
) -> None:
    below = f"{folder.resolve()}{os.sep}"
    events: list[Event] = []
    begun: list[str] = []  # the file that is to be half on the disk

    def die_within() -> None:
        os.truncate(begun[0], os.path.getsize(begun[0]) // 2)
        os._exit(KILLED)

    def happens(kind: str, path: str) -> None:
        if begun:
            die_within()
        if len(events) == at:
            if not half:
                os._exit(KILLED)
            begun.append(path)
        events.append(Event(kind, path))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        path = _changed(event, args)
        if path is not None and path.startswith(below):
            happens(event, path)

    _announce_writes()
    sys.addaudithook(hook)
    action()
    if begun:
        die_within()
    if log is not None:
        log.write_text(json.dumps(events))
    os._exit(0)


def _changed(event: str, args: tuple[Any, ...]) -> str | None:
    """The file or folder that an audited event changes; None where it changes none."""
    if event == "open":
        writes = not isinstance(args[0], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return os.path.abspath(os.fsdecode(args[0])) if writes else None
    if event in ("os.fsync", WRITING):
        return args[0]
    if event == "os.rename":
        return _absolute(args[1], args[3])
    if event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
        path = _absolute(args[0], args[-1])
        # Making what is there already, or removing what is not, changes nothing.
        return path if os.path.lexists(path) != (event == "os.mkdir") else None
    return None


def _absolute(path: Any, folder: int | None) -> str:
    """A path that may be relative to an open folder."""
    start = os.getcwd() if folder in (None, -1) else os.readlink(f"/proc/self/fd/{folder}")
    return os.path.normpath(os.path.join(start, os.fsdecode(path)))


def _announce_writes() -> None:
    """Raise an event before a file is synced to the disk, and before safetensors writes one."""
    fsync, save_file = os.fsync, safetensors.torch.save_file

    def announced_fsync(descriptor: int) -> None:
        sys.audit("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def announced_save_file(tensors: Any, filename: Any, *given: Any, **options: Any) -> None:
        sys.audit(WRITING, os.path.abspath(filename))
        save_file(tensors, filename, *given, **options)

    os.fsync = announced_fsync
    assert transformers.modeling_utils.safe_save_file is save_file
    safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = announced_save_file
