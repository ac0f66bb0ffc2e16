"""Where results and caches are kept, and how they survive crashes.

Everything lies under one folder and is addressed by a fingerprint of what produced it. A file is
written under a temporary name and renamed when it is whole; a folder carries the SHA-256 of its files
and is trusted only while they fit.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

MANIFEST = "manifest.json"
RESULTS = Path(__file__).resolve().parent / "results"  # long results that come with the package, with what made them


def artifacts_dir() -> Path:
    """`KD_ARTIFACTS` if set, else `artifacts/` in the checkout, else in the working directory."""
    if chosen := os.environ.get("KD_ARTIFACTS"):
        return Path(chosen).expanduser().resolve()
    checkout = Path(__file__).resolve().parent.parent
    root = checkout if (checkout / "notebooks").is_dir() else Path.cwd()
    return root / "artifacts"


def fingerprint(made_of: dict[str, Any]) -> str:
    """16 hexadecimal digits that change whenever anything in `made_of` does."""
    canonical = json.dumps(made_of, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old one or the whole new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def load_json(path: Path) -> Any:
    """Read what `save_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def get_or_build(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make sure that `folder` holds what `build` makes; build it at most once, also among many processes.

    Args:
        folder: the final place. A damaged one is reported and built anew.
        build: fills the empty folder it is given; that folder is then renamed to `folder`.

    Returns:
        True if it was there already.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The operating system releases the lock of a process that dies, so a stale one can't block us.
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_intact(folder):
            return True
        if folder.exists():
            warnings.warn(f"{folder.parent.name}/{folder.name} is damaged; it is built anew.", stacklevel=2)
        write_folder(folder, build)
    return False


def write_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a folder beside `folder`, seal it, and put it in `folder`'s place when it is whole.

    One process at a time may write a folder: the caller holds its lock.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".building-{folder.name}-"
    for abandoned in folder.parent.glob(f"{glob.escape(prefix)}*"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as building:
        made = Path(building) / "made"
        made.mkdir()
        build(made)
        save_json(made / MANIFEST, _digests(made))
        if folder.exists():
            os.replace(folder, Path(building) / "old")
        os.replace(made, folder)


def is_intact(folder: Path) -> bool:
    """Whether a folder holds exactly the files that were sealed into it."""
    try:
        return load_json(folder / MANIFEST) == _digests(folder)
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): file_digest(path)
        for name, path in files.items()
        # Hidden files are those that a file browser or an editor leaves behind.
        if name.name != MANIFEST and not any(part.startswith(".") for part in name.parts)
    }
