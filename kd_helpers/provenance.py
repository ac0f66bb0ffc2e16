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
ROOT = Path(__file__).resolve().parent
PRESENTATION = f"{PACKAGE}.course"  # figures, pages and the running of notebooks: no result depends on them
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")  # whose versions can change a result


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

    Comments, docstrings and empty lines are left out, and so are the modules under `kd_helpers.course`. Files are read
    once per process.
    """
    digest = hashlib.sha256()
    for name in sorted(imported_modules(modules)):
        digest.update(f"{name}\n{code_only(_path(name).read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def imported_modules(modules: Iterable[str]) -> set[str]:
    """These modules and every module of this package that they import, directly or through others."""
    found: set[str] = set()
    waiting = [name for name in modules if not name.startswith(PRESENTATION)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports_of(_path(name).read_text(encoding="utf-8"))
    return found


def imports_of(source: str) -> list[str]:
    """The modules of this package that some source imports anywhere in it, `kd_helpers.course` left out."""
    named = dict.fromkeys(_named_in(ast.parse(source)))
    return [name for name in named if not name.startswith(PRESENTATION)]


def _named_in(tree: ast.AST) -> Iterator[str]:
    from kd_helpers import _HOME

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE}."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if _path(submodule).is_file():
                    yield submodule
                elif node.module != PACKAGE:
                    yield node.module
                elif alias.name in _HOME:  # a name that the package itself offers
                    yield f"{PACKAGE}.{_HOME[alias.name]}"


def _path(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")


def code_only(source: str) -> str:
    """Source without its comments, docstrings and empty lines; the same text on every version of Python."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    }
    lines = source.splitlines()
    removed = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.start in docstrings)
    ]
    for token in reversed(removed):  # from the end, so that the earlier positions stay valid
        (first, start), (last, end) = token.start, token.end
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return "\n".join(line.rstrip() for line in lines if line.strip())
