"""What the course must never do: talk to the network, write elsewhere, run what is only data, or leave its folders.

Whole runs happen in processes of their own, under an audit hook: once set it can't be taken off, and it sees what
libraries do as well as what the course does. What native code does behind Python's back (safetensors and tokenizers
write files so) the hook doesn't see; new files are therefore also looked for on the disk.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import functools
import html.parser
import json
import os
import re
import socket
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import safetensors
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from support.models import tiny_bert
from transformers import dynamic_module_utils

import kd_helpers
from kd_helpers.config import DATA_FILES, DistillConfig
from kd_helpers.course.contents import docs_paths
from kd_helpers.course.notebooks import NOTEBOOKS, ROOT, notebook_paths
from kd_helpers.course.site import site
from kd_helpers.data import LABEL_NAMES
from kd_helpers.experiments.sweep import Notebook, plan
from kd_helpers.models import load_classifier, load_saved, load_tokenizer, save_model, warn_if_swapped
from kd_helpers.runs import distill

# Python imports a `sitecustomize` by itself, at the start of each process that has its folder on PYTHONPATH: also in a
# notebook's kernel. Each process notes what it tried in a file of its own.
GUARD = """
import ipaddress
import json
import os
import socket
import sys

LOOPBACK = os.environ["KD_GUARD"] == "loopback"  # a kernel is talked to over loopback; a run needs no socket at all
LOG = os.open(os.path.join(os.environ["KD_GUARD_LOG"], f"{os.getpid()}.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")


def note(kind, what):
    os.write(LOG, (json.dumps([kind, what]) + "\\n").encode())


def stays_here(host):
    host = os.fsdecode(host or "")
    try:
        return LOOPBACK and (host in ("", "localhost") or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def leaves(event, args):
    if event == "socket.__new__":
        return not LOOPBACK and args[1] in (socket.AF_INET, socket.AF_INET6)
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):  # what is no tuple is the path of a UNIX socket
        return isinstance(args[1], tuple) and not stays_here(args[1][0])
    return event in LOOK_UPS and not stays_here(args[0][0] if isinstance(args[0], tuple) else args[0])


def hook(event, args):
    if event.startswith("socket.") and leaves(event, args):
        note("network", f"{event} {args if event in LOOK_UPS else args[1:]}")
        raise PermissionError(f"{event} is forbidden here")
    if event == "open" and not isinstance(args[0], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        note("write", os.path.realpath(os.fsdecode(args[0])))
    elif event == "os.mkdir" and not os.path.isdir(args[0]):
        note("write", os.path.realpath(os.fsdecode(args[0])))
    elif event in ("os.rename", "os.link", "os.symlink"):
        note("write", os.path.realpath(os.fsdecode(args[1])))


note("guarded", " ".join(sys.orig_argv))
sys.addaudithook(hook)
"""
# What must not reach a sandbox.
OURS = ("COVERAGE_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "KD_", "XDG_", "TORCHINDUCTOR_")


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """A folder in which everything lies that a process of the test may find: home, caches, working directory."""

    root: Path

    def __post_init__(self) -> None:
        for name in ("guard", "log", "home", "cache", "tmp", "cwd", "hf", "artifacts", "output"):
            (self.root / name).mkdir()
        (self.root / "guard" / "sitecustomize.py").write_text(GUARD)

    def python(self, *arguments: str | Path, network: str = "none") -> subprocess.CompletedProcess[str]:
        """Run the interpreter under the guard; `network` is "none" or "loopback"."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        paths = [str(self.root / "guard"), os.environ.get("PYTHONPATH", "")]
        environment |= {
            "HOME": str(self.root / "home"),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "TMPDIR": str(self.root / "tmp"),
            "HF_HOME": str(self.root / "hf"),
            "KD_ARTIFACTS": str(self.root / "artifacts"),
            "KD_GUARD": network,
            "KD_GUARD_LOG": str(self.root / "log"),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",  # compiled modules are Python's business
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, *map(str, arguments)]
        options = {"cwd": self.root / "cwd", "env": environment, "stdin": subprocess.DEVNULL}
        return subprocess.run(command, **options, capture_output=True, text=True, check=False)

    def noted(self, kind: str) -> list[str]:
        """What all processes noted so far: "guarded", "network" or "write"."""
        logs = sorted((self.root / "log").iterdir())
        lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        return [what for noted, what in lines if noted == kind]

    def tree(self) -> set[Path]:
        """Every file and folder, but for the guard's own."""
        own = (self.root / "guard", self.root / "log")
        return {path for path in self.root.rglob("*") if not any(path.is_relative_to(folder) for folder in own)}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path.resolve())


# No network


PROBE = """
import socket, sys, urllib.request

host, port = sys.argv[1], int(sys.argv[2])
attempts = {
    "connect": lambda: socket.create_connection((host, port), timeout=2),
    "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"?", (host, port)),
    "look up": lambda: socket.getaddrinfo(host, port),
    "old look up": lambda: socket.gethostbyname(host),
    "download": lambda: urllib.request.urlopen(f"http://{host}:{port}/", timeout=2),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except PermissionError:
        print(name, "forbidden")
    except OSError as error:  # urllib wraps what it gets; and nobody answers a request here
        print(name, "forbidden" if "forbidden" in str(error) else "tried")
    else:
        print(name, "tried")
"""
ATTEMPTS = ("connect", "datagram", "look up", "old look up", "download")
NOWHERE = "192.0.2.1"  # belongs to nobody (RFC 5737)


@pytest.mark.parametrize(
    ("network", "host", "outcome"),
    [("none", "127.0.0.1", "forbidden"), ("loopback", NOWHERE, "forbidden"), ("loopback", "127.0.0.1", "tried")],
)
def test_the_guard_stops_real_attempts(sandbox, network, host, outcome):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = sandbox.python("-c", PROBE, host, str(listener.getsockname()[1]), network=network)
        listener.setblocking(False)
        with contextlib.nullcontext() if outcome == "tried" else pytest.raises(BlockingIOError):
            listener.accept()[0].close()
    assert done.stdout.splitlines() == [f"{name} {outcome}" for name in ATTEMPTS], done.stderr
    assert len(sandbox.noted("network")) == (0 if outcome == "tried" else len(ATTEMPTS))


def test_the_guard_would_notice_the_hub_and_a_write_elsewhere(sandbox):
    code = """
from pathlib import Path
from kd_helpers import hub

(Path.home() / "gone.txt").write_text("gone before anyone looks")
(Path.home() / "gone.txt").unlink()
try:
    hub.require_hub("someone/model")
except ConnectionError as error:
    print(error)
"""
    done = sandbox.python("-c", code)
    assert "the Hugging Face hub can't be reached" in done.stdout, done.stderr
    assert sandbox.noted("network")
    assert str(sandbox.root / "home" / "gone.txt") in sandbox.noted("write")


# The second run finds the teacher and its logits, and is saved where runs go that nobody named a folder for.
RUN = """
import dataclasses, os, sys
from kd_helpers import DistillConfig, distill, load_splits

assert "HF_HUB_OFFLINE" not in os.environ
config = DistillConfig(
    train_size=64, teacher_train_size=64, max_steps=2, teacher_epochs=1,
    max_length=24, precision="float32", device="cpu",
)
data = load_splits(config)
short = {split: getattr(data, split).select(range(40)) for split in ("validation", "test")}
for folder in (sys.argv[1], None):
    print(distill(config, data=dataclasses.replace(data, **short), output_dir=folder).folder)
"""


@dataclasses.dataclass(frozen=True)
class OfflineRun:
    """A sandbox in which `RUN` was run, what appeared in it, and where that belongs."""

    sandbox: Sandbox
    new: set[Path]

    @property
    def places(self) -> tuple[Path, Path]:
        return self.sandbox.root / "artifacts", self.sandbox.root / "output"

    def belongs(self, path: Path) -> bool:
        return any(path.is_relative_to(place) for place in self.places)


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory) -> OfflineRun:
    sandbox = Sandbox(tmp_path_factory.mktemp("offline").resolve())
    before = sandbox.tree()
    done = sandbox.python("-c", RUN, sandbox.root / "output")
    assert done.returncode == 0, done.stderr[-2000:]
    return OfflineRun(sandbox, sandbox.tree() - before)


def test_a_run_of_the_offline_preset_asks_nobody(offline_run):
    assert offline_run.sandbox.noted("guarded")
    assert offline_run.sandbox.noted("network") == []


OPINIONS = {"positive": "I love", "neutral": "This is", "negative": "I hate"}


@pytest.mark.longer
def test_a_notebook_of_the_offline_preset_asks_nobody(sandbox):
    texts = [(f"{word} tram number {n}", label) for n in range(60) for label, word in OPINIONS.items()]
    with (sandbox.root / "cwd" / "own.csv").open("w", newline="") as file:  # a few: the course's own take a minute
        csv.writer(file).writerows([("text", "label"), *texts])
    short = {"data": "own.csv", "output_dir": "run", "epochs": 1, "teacher_epochs": 1, "max_length": 24}
    parameters = [part for name, value in short.items() for part in ("-p", name, str(value))]
    notebook = NOTEBOOKS / "05_distill_and_evaluate.ipynb"
    command = ("-m", "papermill", "--no-progress-bar", notebook, "out.ipynb", *parameters)
    done = sandbox.python(*command, network="loopback")
    assert sandbox.noted("network") == []
    assert done.returncode == 0, done.stderr[-2000:]
    assert (sandbox.root / "cwd" / "run" / "metrics.json").exists()
    guarded = sandbox.noted("guarded")
    assert any("papermill" in command for command in guarded)
    assert any("ipykernel" in command for command in guarded)


# Nothing is written elsewhere


def is_known(path: Path, temporary: Path) -> bool:
    """What a library leaves behind outside, by name.

    torch makes the folder of its compiler's cache when `torch._dynamo` is imported, which importing transformers
    does (torch/_dynamo/package.py); nothing is compiled, so it stays empty. `TORCHINDUCTOR_CACHE_DIR` moves it.
    """
    return path.parent == temporary and path.name.startswith("torchinductor_") and not any(path.iterdir())


def test_new_files_are_in_the_artifacts_and_the_output_folder(offline_run):
    temporary = offline_run.sandbox.root / "tmp"
    outside = {path for path in offline_run.new if not offline_run.belongs(path) and not is_known(path, temporary)}
    assert outside == set()
    written = {path.relative_to(offline_run.sandbox.root).as_posix() for path in offline_run.new}
    assert {"output/metrics.json", "output/student/model.safetensors", "artifacts/teachers"} <= written


def test_nothing_is_written_elsewhere_even_for_a_moment(offline_run):
    writes = [Path(path) for path in offline_run.sandbox.noted("write")]
    temporary = offline_run.sandbox.root / "tmp"  # what is left of it is seen above
    elsewhere = [path for path in writes if not offline_run.belongs(path) and not path.is_relative_to(temporary)]
    assert set(elsewhere) <= {Path(os.devnull)}
    assert any(path.name == "metrics.json" for path in writes)


# Data stays data


def test_everything_that_is_kept_is_what_its_name_says(offline_run):
    files = [path for path in offline_run.new if path.is_file()]
    assert len(files) > 20
    for path in files:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as stored:
                assert stored.keys()
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".md", ".txt"):
            assert "\x00" not in path.read_text(encoding="utf-8")
        else:
            assert (path.suffix, path.stat().st_size) == (".lock", 0), path


@dataclasses.dataclass(frozen=True)
class Trap:
    """What leaves a file behind when it is unpickled."""

    marker: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer) -> Path:
    save_model(tmp_path / "model", tiny_bert(layers=1), tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize("role", ["teacher_checkpoint", "student_checkpoint"])
def test_pickled_weights_are_refused(role, model_folder, small_data, own_artifacts, tmp_path):
    marker, weights = tmp_path / "unpickled", model_folder / "pytorch_model.bin"
    (model_folder / "model.safetensors").unlink()
    torch.save(Trap(marker), weights)
    config = DistillConfig(**{role: str(model_folder)}, alpha=1.0 if role == "teacher_checkpoint" else 0.0)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        distill(config, data=small_data)
    assert not marker.exists()
    torch.load(weights, weights_only=False)
    assert marker.exists(), "the trap is no trap, so the test says nothing"


CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

Path({marker!r}).touch()


class XConfig(BertConfig):
    model_type = "homemade"


class XModel(BertForSequenceClassification):
    config_class = XConfig


class XTokenizer(BertTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "modeling_x.XConfig",
    "AutoModel": "modeling_x.XModel",
    "AutoModelForSequenceClassification": "modeling_x.XModel",
    "AutoTokenizer": [None, "modeling_x.XTokenizer"],
}


@pytest.mark.parametrize(
    ("model_type", "answer"),
    [
        ("bert", "y"),
        ("homemade", "n"),
        ("homemade", "y"),
    ],
)
def test_code_beside_a_model_does_not_run(model_type, answer, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which transformers adds that folder
    marker = tmp_path / "executed"
    (model_folder / "modeling_x.py").write_text(CODE.format(marker=str(marker)))
    for name, changes in {
        "config.json": {"model_type": model_type, "auto_map": AUTO_MAP},
        "tokenizer_config.json": {"tokenizer_class": "XTokenizer", "auto_map": AUTO_MAP},
    }.items():
        stored = json.loads((model_folder / name).read_text())
        (model_folder / name).write_text(json.dumps(stored | changes))
    both = DistillConfig(teacher_checkpoint=str(model_folder), student_checkpoint=str(model_folder))
    for load in (
        lambda: load_tokenizer(str(model_folder)),
        lambda: load_classifier(str(model_folder), LABEL_NAMES, seed=0),
        lambda: load_saved(model_folder),
        lambda: warn_if_swapped(both),
    ):
        with contextlib.suppress(ValueError, OSError):  # a refusal is as good as the library's own class
            load()
        assert not marker.exists()
    transformers.AutoConfig.from_pretrained(model_folder, trust_remote_code=True)
    assert marker.exists(), "the code would never run, so the test says nothing"


FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "_pickle"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "get_ipython().system", "get_ipython().getoutput", "subprocess.getoutput"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "joblib.load", "joblib.dump"),
    *("pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
}
FORBIDDEN_KEYWORDS = {"shell": "False", "trust_remote_code": "False", "allow_pickle": "False"}  # and what is allowed


def unsafe(code: str) -> Iterator[str]:
    """What in some source could run what is only data, or a shell."""
    tree = ast.parse(code)
    names: dict[str, str] = {}  # what a name in this source stands for
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                full = module + alias.name
                if alias.asname or module:
                    names[alias.asname or alias.name] = full
                if full.partition(".")[0] in FORBIDDEN_IMPORTS:
                    yield f"import of {full}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        called = names.get(first, first) + dot + rest
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FORBIDDEN_CALLS or called.endswith(".to_pickle"):
            yield called
        for name, allowed in FORBIDDEN_KEYWORDS.items():
            if keywords.get(name, allowed) != allowed:
                yield f"{called}({name}={keywords[name]})"
        owner, _, method = called.rpartition(".")
        model = method == "from_pretrained" and not owner.endswith(("Tokenizer", "TokenizerFast", "Config"))
        if model and keywords.get("use_safetensors") != "True":
            yield f"{called} without use_safetensors=True"
        # A pipeline takes a pickle where a folder has nothing better, which the student of one's own run never lacks.
        if called == "transformers.pipeline" and 'result.folder / "student"' not in ast.unparse(node).replace("'", '"'):
            yield f"{called} of something else than one's own run"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "def f():\n    import cloudpickle as c",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save(1, 'x')",
        "from torch import load as read\nread('x')",
        "import joblib\njoblib.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "frame.to_pickle('x')",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import yaml\nyaml.load('x')",
        "AutoConfig.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_config(config, trust_remote_code=trusted)",
        "AutoModel.from_pretrained('x')",
        "AutoModel.from_pretrained('x', use_safetensors=None)",
        "import transformers\ntransformers.pipeline('text-classification', 'x')",
        "get_ipython().system('ls')",
    ],
)
def test_the_search_finds(code):
    assert len(list(unsafe(code))) == 1


def test_the_search_lets_the_usual_pass():
    code = """
import joblib, transformers
from torch import nn
joblib.cpu_count(); model.eval(); ast.literal_eval("1"); torch.compile(model)
AutoConfig.from_pretrained("x", trust_remote_code=False); AutoTokenizer.from_pretrained("x")
AutoModel.from_pretrained("x", use_safetensors=True)
transformers.pipeline("text-classification", str(result.folder / "student"))
"""
    assert list(unsafe(code)) == []


PACKAGE = Path(kd_helpers.__file__).parent


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).with_suffix("").as_posix()
)
def test_modules_run_no_data(path):
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


def test_the_modules_of_every_folder_are_searched():
    folders = {path.parent.name for path in PACKAGE.rglob("*.py")}
    assert {"kd_helpers", "methods", "experiments", "course"} <= folders


@functools.cache
def read_notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


each_notebook = pytest.mark.parametrize("path", notebook_paths(), ids=lambda path: path.stem)


@each_notebook
def test_notebooks_run_no_data_and_no_commands(path):
    for cell in read_notebook(path).cells:
        if cell.cell_type == "code":
            code = TransformerManager().transform_cell(cell.source)
            assert list(unsafe(code)) == []
            magics = re.findall(r"get_ipython\(\)\.(\w+)\('(\w+)'", code)
            assert set(magics) <= ({("run_line_magic", "pip")} if "importlib.util.find_spec" in code else set())


# Paths that come from parameters


def with_parameter(name: str) -> Notebook:
    """A notebook that can be swept over a text."""
    types, defaults = {"output_dir": str, name: str}, {"output_dir": "", name: "default"}
    return Notebook("toy", nbformat.v4.new_notebook(), types, defaults, digest="0", made_by={})


def require_safe(name: str, out: Path) -> None:
    """Whether it names one folder in `out/runs`, also where it is lengthened: for its lock and while it is built."""
    assert set(name) <= set(string.ascii_letters + string.digits + "_.,=+-")
    assert name not in (".", "..")
    for derived in (name, f".{name}.lock", f".building-{name}-abcdefgh"):
        assert len(os.fsencode(derived)) <= 255
        assert Path(os.path.normpath(out / "runs" / derived)).parent == out / "runs"


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "a\x00b",
    "C:\\x",
    "..",
    ".",
    "",
    "~root",
    "a\nb\r\n",
    "x" * 300,
    "ü" * 300,
    "$(ls)",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_parameters_stay_in_the_sweeps_folder(value, tmp_path):
    (setting,) = plan(with_parameter("mode"), {"mode": [value]})
    assert setting.run.parameters["mode"] == value
    require_safe(setting.run.name, tmp_path)


# No names: an assignment can have any target, `x[".."] = 1` too. Of texts of one's own a sweep reads the file.
NAMES = st.text(min_size=1, max_size=300).filter(lambda name: name not in ("output_dir", *DATA_FILES))


@given(values=st.lists(st.text(max_size=300), min_size=1, unique=True), name=NAMES)
def test_any_text_makes_a_safe_folder_of_its_own(values, name):
    settings = plan(with_parameter(name), {name: values})
    for setting in settings:
        require_safe(setting.run.name, Path("/out"))
    assert len({setting.run.name for setting in settings}) == len(settings)


# What is opened does nothing


ACTIVE = re.compile(
    r"<\s*(script|iframe|frame|object|embed|form|base|meta|link|applet)\b|javascript:|vbscript:|srcdoc\s*=|"
    r"<[^>]*[\s/\"']on[a-z]+\s*=|url\(\s*[\"']?\s*(?!data:)|@import",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    ("text", "active"),
    [
        ("<script>alert(1)</script>", True),
        ("<IFRAME src=x>", True),
        ("[press](javascript:alert(1))", True),
        ('<img src="x" onerror="alert(1)">', True),
        ("<body\nonload=alert(1)>", True),
        ("<style>p { background: url(https://x.org/x.png) }</style>", True),
        ("<style scoped>th { text-align: right; }</style><b>on = 1</b> if a < b and on = 2", False),
        ("[read](https://arxiv.org/abs/1503.02531)", False),
    ],
)
def test_active_content_is_recognised(text, active):
    assert bool(ACTIVE.search(text)) == active


@each_notebook
def test_notebooks_store_nothing_that_runs_when_opened(path):
    for cell in read_notebook(path).cells:
        for attached in cell.get("attachments", {}).values():
            assert all(re.fullmatch(r"image/(png|jpeg|gif|webp)", kind) for kind in attached)
        if cell.cell_type != "code":
            assert cell.cell_type == "markdown", "a raw cell goes into a page as it is"
            assert not ACTIVE.search(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            assert set(data) <= {"text/plain", "text/markdown", "text/html", "image/png"}
            assert not any(ACTIVE.search(str(content)) for content in data.values())


@each_notebook
def test_notebooks_start_the_usual_kernel_and_no_widgets(path):
    metadata = read_notebook(path).metadata
    assert set(metadata) == {"kernelspec", "language_info"}
    assert (metadata.kernelspec.name, metadata.kernelspec.language) == ("python3", "python")
    assert set(metadata.kernelspec) == {"name", "language", "display_name"}


class Page(html.parser.HTMLParser):
    """What a page runs, loads by itself, and leads to."""

    LOADING = ("src", "srcset", "poster", "data", "background", "action", "formaction", "xlink:href", "srcdoc")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        self.tags.add(tag)
        if tag == "script":
            self.scripts.append("")
        for name, value in attrs:
            if name.startswith("on") or (tag, name) == ("meta", "http-equiv"):
                self.handlers.append(f"{tag} {name}={value}")
            elif name == "href" and tag in ("a", "area"):
                self.links.append(value or "")
            elif name in self.LOADING or name == "href":
                self.loads.append(value or "")
            elif name == "style":
                self._read_style(value or "")

    def handle_endtag(self, tag: str) -> None:
        self.tag = ""

    def handle_data(self, data: str) -> None:
        if self.tag == "script":
            self.scripts[-1] += data
        elif self.tag == "style":
            self._read_style(data)

    def _read_style(self, style: str) -> None:
        self.loads += re.findall(r"url\(\s*[\"']?([^\"')]*)", style) + re.findall(r"@import\s+(.*?);", style)


def test_a_page_is_read_for_all_that_it_loads():
    page = Page(
        '<link rel="stylesheet" href="https://x/a.css"><style>@import "b"; p { background: url("https://x/c") }</style>'
        '<img src="https://x/d" onerror="e()"><p style="background: url(f)"><script src="g">h()</script><a href="i">'
    )
    assert page.loads == ["https://x/a.css", "https://x/c", '"b"', "https://x/d", "f", "g"]
    assert (page.handlers, page.scripts, page.links) == (["img onerror=e()"], ["h()"], ["i"])


def test_the_site_loads_nothing_and_runs_only_what_sets_its_theme(tmp_path):
    site(notebook_paths(), tmp_path)
    shown = {path.name: Page(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.html")}
    assert len(shown) == len(notebook_paths()) + len(docs_paths()) + 1
    theme = (ROOT / "kd_helpers" / "course" / "templates" / "theme.js").read_text(encoding="utf-8")
    for name, page in shown.items():
        assert [script.strip() for script in page.scripts] == [theme.strip()], name
        assert page.handlers == [], name
        assert not page.tags & {"iframe", "frame", "object", "embed", "form", "base", "applet", "link"}, name
        assert all(load.startswith(("data:image/png;", "data:font/woff2;")) for load in page.loads), name
        assert all(re.match(r"https://|#|\w+\.html", link) for link in page.links), name
