"""The one command line: what it lists, loads, refuses and returns."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import kd_helpers.__main__ as command_line
from kd_helpers.course.notebooks import ROOT, notebook_paths

COMMANDS = (
    "train",
    "sweep",
    "export",
    "study",
    "again",
    "stories",
    "explanations",
    "verdict",
    "benchmark",
    "conformance",
    "course",
)


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    """A fresh interpreter in the checkout."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch):
    """Puts a `main` of the test's own in the place of the command `sweep`."""

    def pretend(main) -> None:
        module = types.ModuleType("pretended")
        module.main = main
        monkeypatch.setitem(sys.modules, "pretended", module)
        monkeypatch.setitem(command_line.COMMANDS, "sweep", command_line.Command("pretended", "Nothing."))
        monkeypatch.setattr(sys, "argv", ["/bin/kd-helpers"])

    return pretend


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_list_of_commands_loads_nothing_else(arguments):
    script = (
        "import sys\nfrom kd_helpers.__main__ import main\n"
        f"try:\n    status = main({arguments!r})\nexcept SystemExit as done:\n    status = done.code\n"
        "loaded = [name for name in sys.modules if name.startswith('kd_helpers')]\n"
        "assert sorted(loaded) == ['kd_helpers', 'kd_helpers.__main__'], loaded\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert re.search(rf"(?m)^  {name} +[A-Z].+\.$", done.stdout), name


def test_the_help_of_the_course_needs_neither_torch_nor_the_extra_packages():
    blocked = ("torch", "nbformat", "nbconvert", "papermill", "matplotlib")
    script = (
        f"import sys\nsys.modules |= dict.fromkeys({blocked!r})\n"
        "from kd_helpers.__main__ import main\nmain(['course', '--help'])"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert {"run", "store", "site", "readme", "sweep", "publish"} <= set(re.findall(r"(?m)^    (\w+)", done.stdout))


# transformers can't import peft there: some of its own classes miss their docstrings.
WITHOUT_DOCSTRINGS = """
import sys
sys.modules["peft"] = None
from kd_helpers.__main__ import main
for name in sys.argv[1:]:
    try:
        main([name, "--help"])
    except SystemExit as end:
        if end.code:
            raise
    print("end of a help")
"""


@pytest.mark.longer  # all that the commands import is compiled anew
def test_every_command_explains_itself_where_docstrings_are_removed():
    done = python("-OO", "-c", WITHOUT_DOCSTRINGS, *COMMANDS)
    assert done.returncode == 0, done.stderr[-2000:]
    *helps, rest = done.stdout.split("end of a help\n")
    assert not rest
    for name, text in zip(COMMANDS, helps, strict=True):
        noise, usage, rest = text.partition(f"usage: kd-helpers {name} ")
        assert usage, name
        assert all(line.startswith("[ERROR]") for line in noise.splitlines())  # transformers misses its docstrings
        description = rest.partition("\n\n")[2].partition("\n\n")[0]
        assert re.match(r"[A-Z].+\.$", " ".join(description.split())), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_function_of_its_arguments_and_of_the_name_it_goes_by(name):
    module = command_line.COMMANDS[name].module
    parameters = inspect.signature(__import__(module, fromlist=["main"]).main).parameters
    assert list(parameters) == ["arguments", "prog"]
    assert parameters["prog"].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_module_that_accelerate_starts_stays():
    done = python("-m", "kd_helpers.train", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage: python -m kd_helpers.train ")


def test_an_unknown_command_is_refused_in_one_sentence():
    done = python("-m", "kd_helpers", "distil")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"python -m kd_helpers: there is no command 'distil'; choose one of {', '.join(COMMANDS)}.\n"
    )


def test_options_in_front_of_a_command_are_refused(capsys):
    for given in (["--dry-run", "sweep"], ["--"]):
        with pytest.raises(SystemExit) as refused:
            command_line.main(given)
        assert refused.value.code == 2
        assert "usage: " in capsys.readouterr().err


def test_the_version_can_be_asked_for(capsys):
    with pytest.raises(SystemExit) as done:
        command_line.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"kd-helpers {command_line.__version__}\n"


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_gets_its_arguments_and_its_name_and_gives_the_exit_status(pretended, returned, status):
    calls = []

    def main(arguments, *, prog):
        calls.append((arguments, prog))
        return returned

    pretended(main)
    assert command_line.main(["sweep", "a.ipynb", "--", "-x", "--help"]) == status
    assert calls == [(["a.ipynb", "--", "-x", "--help"], "kd-helpers sweep")]


@pytest.mark.parametrize(("module", "extra"), [("papermill.execute", "course"), ("onnxruntime", "deploy")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(pretended, capsys, module, extra):
    def main(arguments, *, prog):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    pretended(main)
    assert command_line.main(["sweep"]) == 2
    assert capsys.readouterr().err == (
        f"kd-helpers sweep needs the package {module.partition('.')[0]}, which is not installed: "
        f"run `pip install 'kd-helpers[{extra}]'`.\n"
    )


def test_a_missing_module_of_our_own_is_an_error_not_a_request(pretended):
    def main(arguments, *, prog):
        raise ModuleNotFoundError("No module named 'kd_helpers.lost'", name="kd_helpers.lost")

    pretended(main)
    with pytest.raises(ModuleNotFoundError, match=r"kd_helpers\.lost"):
        command_line.main(["sweep"])


def test_an_interrupt_ends_at_once_though_threads_are_running():
    script = """
import signal, sys, threading, time, types
import kd_helpers.__main__ as command_line
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
def main(arguments, *, prog):
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("unfinished line", end="")
    print("running", file=sys.stderr, flush=True)
    for _ in range(600):  # a minute of short naps: a signal that arrives just before one is seen after it
        time.sleep(0.1)
sys.modules["pretended"] = types.SimpleNamespace(main=main)
command_line.COMMANDS["sweep"] = command_line.Command("pretended", "")
command_line.main(["sweep"])
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert out == f"unfinished line\n{command_line.INTERRUPTED}\n"
    assert err == ""


def written_commands() -> dict[str, str]:
    """Every file that tells a reader what to type, with its text."""
    files = [ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci" / "run", *(ROOT / "binder").iterdir()]
    files += [*(ROOT / ".github" / "workflows").iterdir(), *(ROOT / "kd_helpers").rglob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    for path in notebook_paths():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path.name] = "\n".join("".join(cell["source"]) for cell in cells)
    return texts


def test_what_readers_are_told_to_type_exists():
    for name, text in written_commands().items():
        for command in re.findall(r"-m kd_helpers ([a-z]+)", text):
            assert command in COMMANDS, f"{name}: {command}"
        for module in re.findall(r"-m kd_helpers\.([a-z_.]+[a-z])", text):
            assert module == "train", f"{name}: python -m kd_helpers.{module}"
        for study in re.findall(r"-m kd_helpers study ([a-z_]+)", text):
            assert (Path(ROOT) / "kd_helpers" / "experiments" / f"{study}.py").is_file(), f"{name}: {study}"
