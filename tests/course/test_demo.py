"""The page in which models answer: what it loads, and packages of npm that are not what they should be."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from support.architectures import tiny

from kd_helpers.course import demo, npm
from kd_helpers.course.demo import Shown, write_demo
from kd_helpers.course.npm import NpmPackage, npm_files
from kd_helpers.export import cached_export


def packed(content: bytes) -> tuple[bytes, str]:
    """A package of npm with one file, and its integrity."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/dist/library.js")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    data = buffer.getvalue()
    return data, "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


@pytest.fixture
def package(monkeypatch):
    """A package, and a pretended npm that sends it and counts."""
    data, integrity = packed(b"export default 1;")
    sent = []

    def fetch(wanted):
        sent.append(wanted.name)
        return data

    monkeypatch.setattr(npm, "_fetch", fetch)
    return NpmPackage("@some/library", "1.2.3", integrity, ("dist/library.js",)), sent


def test_a_package_is_fetched_once_and_checked(own_artifacts, package):
    wanted, sent = package
    for _ in range(2):
        (file,) = npm_files(wanted)
        assert file.read_bytes() == b"export default 1;"
    assert file.parent == own_artifacts / "npm" / "@some+library@1.2.3"
    assert sent == ["@some/library"]


def test_a_package_with_another_content_is_refused(own_artifacts, package):
    wanted = dataclasses.replace(package[0], integrity="sha512-" + "0" * 86 + "==")
    with pytest.raises(ValueError, match=r"^npm sent another @some/library@1\.2\.3 than expected \(sha512-"):
        npm_files(wanted)
    assert not (own_artifacts / "npm" / "@some+library@1.2.3").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", r"^npm is needed to fetch x@1; install Node\.js, which brings it\."),
        (
            "#!/bin/sh\necho 'npm error 404' >&2\nexit 1\n",
            r"^npm can't fetch x@1 \(npm error 404\); check the connection",
        ),
    ],
)
def test_a_missing_or_failing_npm_is_said_in_a_sentence(own_artifacts, tmp_path, monkeypatch, script, message):
    programs = tmp_path / "programs"
    programs.mkdir()
    if script:
        (programs / "npm").write_text(script)
        (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin" if script else str(programs))
    with pytest.raises(ValueError, match=message):
        npm_files(NpmPackage("x", "1", "sha512-", ("x.js",)))


def test_the_page_stands_beside_all_that_it_loads(own_artifacts, tmp_path, monkeypatch):
    library = tmp_path / "library.js"
    library.write_text("export default 1;")
    monkeypatch.setattr(demo, "npm_files", lambda package: [library])
    graphs = cached_export(*tiny("bert"), max_length=48)
    shown = [Shown(name, name.title(), "2 layers & a head", graphs) for name in ("teacher", "student")]
    path = write_demo(tmp_path / "site", shown, {"teacher": 0.801, "student": 0.79})
    html = path.read_text()
    assert "right on 80.1% of the test tweets" in html
    assert "2 layers &amp; a head" in html
    assert html.count("<section data-model=") == 2
    assert "https://cdn" not in html
    files = {
        file.relative_to(tmp_path / "site" / "demo").as_posix() for file in (tmp_path / "site" / "demo").rglob("*")
    }
    assert {"library.js", "student/onnx/model_quantized.onnx", "teacher/tokenizer.json"} <= files
    assert "student/onnx/model.onnx" not in files


def test_the_page_names_the_files_that_are_fetched():
    template = (Path(demo.__file__).parent / "templates" / "demo.html.j2").read_text()
    script = (Path(demo.__file__).parent / "templates" / "demo.js").read_text()
    for package in (demo.TRANSFORMERS_JS, demo.ONNXRUNTIME_WEB):
        for name in package.files:
            assert name == "LICENSE" or Path(name).name in template + script
