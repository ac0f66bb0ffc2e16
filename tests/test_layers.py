"""What the package may import: an import goes down, from the command line to the library, and never up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kd_helpers

PACKAGE = Path(kd_helpers.__file__).parent
LAYERS = ("library", "methods", "experiments", "course", "__main__")  # each may import itself and those before it
ANYWHERE = ("kd_helpers", "kd_helpers.provenance")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def layer(module: str) -> int:
    """How high a module stands; what lies in no folder of its own belongs to the library."""
    second = (*module.split("."), "")[1]
    return LAYERS.index(second) if second in LAYERS else 0


def imported(source: str) -> Iterator[str]:
    """The modules of this package that some source imports: at its top, within functions, and by `import_module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "kd_helpers")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not looked at here"
            if node.module.split(".")[0] == "kd_helpers":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    home = kd_helpers._HOME.get(alias.name) if node.module == "kd_helpers" else None
                    yield f"kd_helpers.{home}" if home else name if is_module(name) else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and str(argument.value).split(".")[0] == "kd_helpers":
                    yield argument.value


def upward(module: str, source: str) -> list[str]:
    """The imports of a module that go up."""
    names = [name for name in imported(source) if name not in ANYWHERE]
    return [name for name in names if layer(name) > layer(module)]


SOURCES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", SOURCES)
def test_no_import_goes_up(module):
    source = SOURCES[module].read_text(encoding="utf-8")
    assert upward(module, source) == []
    assert all(is_module(name) for name in imported(source))


def test_every_layer_is_there():
    assert {layer(module) for module in SOURCES} == set(range(len(LAYERS)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kd_helpers.loop", "from kd_helpers.methods.distilbert import triple_loss"),
        ("kd_helpers.loop", "from kd_helpers.methods import distilbert"),
        ("kd_helpers.loop", "def f():\n    from kd_helpers.experiments import study"),
        ("kd_helpers.models", "import kd_helpers.course.plots"),
        ("kd_helpers.methods.tinybert", "from kd_helpers.experiments import study as s"),
        ("kd_helpers.experiments.sweep", "from kd_helpers.course.run import SWEPT"),
        ("kd_helpers.experiments.sweep", "import importlib\nimportlib.import_module('kd_helpers.course.run')"),
        ("kd_helpers.course.run", "from kd_helpers.__main__ import main"),
    ],
)
def test_the_search_finds_an_import_that_goes_up(module, source):
    assert len(upward(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kd_helpers.loop", "from kd_helpers.models import freeze\nfrom kd_helpers import __version__, soft_loss"),
        ("kd_helpers.methods.tinybert", "from kd_helpers.methods import hidden_losses\nfrom kd_helpers import loop"),
        ("kd_helpers.course.explorers", "from kd_helpers.experiments import sweep\nimport torch.nn"),
        ("kd_helpers.__main__", "from kd_helpers.course import run"),
    ],
)
def test_the_search_lets_the_others_pass(module, source):
    assert upward(module, source) == []


def test_there_is_one_training_step():
    """Every loss is trained by `loop.training_step`; only the benchmark has loops of its own, to compare with."""
    found = {module: path.read_text(encoding="utf-8").count(".backward(") for module, path in SOURCES.items()}
    benchmark = found.pop("kd_helpers.experiments.benchmark")
    assert {module: count for module, count in found.items() if count} == {"kd_helpers.loop": 1}
    assert benchmark >= 1
