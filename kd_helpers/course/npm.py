"""Files of npm packages, for pages that need a library: fetched once, checked, and kept under `artifacts/npm`."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kd_helpers import artifacts


@dataclass(frozen=True)
class NpmPackage:
    """A package of exactly this content, and the files of it that a page needs.

    Attributes:
        name: as npm knows it.
        version: as npm knows it.
        integrity: "sha512-" and the digest of the package in base64, as in a lock file of npm.
        files: paths in the package.
    """

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]


def npm_files(package: NpmPackage) -> list[Path]:
    """The files of a package, each in a folder that bears the package's name and version.

    Raises:
        ValueError: npm is not installed or can't fetch the package; or it has another content than expected.
    """
    folder = artifacts.artifacts_dir() / "npm" / f"{package.name.replace('/', '+')}@{package.version}"
    artifacts.get_or_build(folder, functools.partial(_unpack, package))
    return [folder / Path(name).name for name in package.files]


def _unpack(package: NpmPackage, target: Path) -> None:
    packed = _fetch(package)
    if (found := "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode()) != package.integrity:
        raise ValueError(f"npm sent another {package.name}@{package.version} than expected ({found}); nothing is kept.")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for name in package.files:
            (target / Path(name).name).write_bytes(archive.extractfile(f"package/{name}").read())


def _fetch(package: NpmPackage) -> bytes:
    """The package as npm packs it. No script of it is run."""
    wanted = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", wanted, "--silent", "--ignore-scripts", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
        except FileNotFoundError as error:
            raise ValueError(f"npm is needed to fetch {wanted}; install Node.js, which brings it.") from error
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.stdout).strip().partition("\n")[0]
            raise ValueError(f"npm can't fetch {wanted} ({said}); check the connection and npm's registry.") from error
        (file,) = Path(folder).glob("*.tgz")
        return file.read_bytes()
