"""What a stored result depends on beside its settings and its data: the code that made it.

Every teacher, cache, run and study is stored under a fingerprint of its provenance. `made_by` is the part of that
provenance which changes when the code does: a digest of the source of the modules involved, and the versions of the
packages that compute. A changed formula therefore never finds an old result. Comments, docstrings, plots, notebooks,
documentation and tests are not part of it, so rewording them invalidates nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import io
import platform
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "kd_helpers"
PRESENTATION = f"{PACKAGE}.course"  # figures, pages and the running of notebooks: no result depends on them
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")  # whose versions can change a result
_FORMATTED = getattr(tokenize, "FSTRING_MIDDLE", None)  # the text of an f-string, a token since Python 3.12


def _read_sources() -> dict[str, str]:
    """The source of every module of this package, by its dotted name."""
    folder = Path(__file__).resolve().parent
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


# Read when this module is imported, since that is the code which runs: what is edited later has not run yet.
SOURCES = _read_sources()


def made_by(*modules: str) -> dict[str, str]:
    """The part of a provenance that names the code.

    Args:
        modules: dotted names of the modules that compute the result; what they import is found from there.

    Returns:
        `source`, see `source_digest`, and the version of each of `PACKAGES`.
    """
    return {"source": source_digest(*modules)} | {name: importlib.metadata.version(name) for name in PACKAGES}


def versions() -> dict[str, str]:
    """The versions of this package, of Python and of the packages that compute, for people who read a result."""
    from kd_helpers import __version__

    packages = ("torch", "transformers", "datasets", "numpy", "scikit-learn")
    return {
        PACKAGE: __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


@functools.cache
def source_digest(*modules: str) -> str:
    """16 hexadecimal digits of the source of some modules and of all modules of this package that they import.

    Comments, docstrings and empty lines are left out, and so are the modules under `kd_helpers.course`.
    """
    digest = hashlib.sha256()
    for name in sorted(imported_modules(modules)):
        digest.update(f"{name}\n{code_only(SOURCES[name])}\n".encode())
    return digest.hexdigest()[:16]


def imported_modules(modules: Iterable[str]) -> set[str]:
    """These modules and every module of this package that they import, directly or through others."""
    found: set[str] = set()
    waiting = [name for name in modules if not name.startswith(PRESENTATION)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports_of(SOURCES[name])
    return found


def imports_of(source: str) -> list[str]:
    """The modules of this package that some source imports anywhere in it, `kd_helpers.course` left out."""
    named = dict.fromkeys(_named_in(ast.parse(source)))
    return [name for name in named if not name.startswith(PRESENTATION)]


def _named_in(tree: ast.AST) -> Iterator[str]:
    from kd_helpers import _HOME

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == PACKAGE:  # any of the names that it offers may be used
                    yield from (f"{PACKAGE}.{module}" for module in _HOME.values())
                elif alias.name in SOURCES:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in SOURCES:
                    yield submodule
                elif node.module != PACKAGE:
                    yield node.module
                elif alias.name == "*":
                    yield from (f"{PACKAGE}.{module}" for module in _HOME.values())
                elif alias.name in _HOME:  # a name that the package itself offers
                    yield f"{PACKAGE}.{_HOME[alias.name]}"


def code_only(source: str) -> str:
    """Source without its comments, docstrings and empty lines; the same text on every version of Python.

    Empty lines within other strings are part of a value, so they stay.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    }
    lines: list[str | None] = [*source.split("\n")]  # as tokenize counts them
    removed, in_strings = [], set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.start in docstrings):
            removed.append(token)
        elif token.type == tokenize.STRING or token.type == _FORMATTED:
            in_strings.update(range(token.start[0], token.end[0]))  # the end of its last line is code again
    for token in reversed(removed):  # from the end, so that the earlier positions stay valid
        (first, start), (last, end) = token.start, token.end
        rest = [None] * (last - first)  # the numbers of the other lines must not change
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:], *rest]
    kept = ((line, number in in_strings) for number, line in enumerate(lines, start=1) if line is not None)
    return "\n".join(line if quoted else line.rstrip() for line, quoted in kept if quoted or line.strip())
