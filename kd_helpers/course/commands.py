"""The commands `kd-helpers course …`: run, store, show and publish the notebooks.

The module behind a command is loaded when the command is called: the help neither waits for it nor needs the packages
that it imports.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kd_helpers.artifacts import artifacts_dir
from kd_helpers.course.notebooks import is_checkout, notebook_paths

DESCRIPTION = (
    "Run, store and publish the notebooks of the course. All of these commands need a checkout of the repository and "
    "the extra packages of kd-helpers[course]."
)
EXAMPLE = (
    "Example: {prog} run 03 05 executes two notebooks. Exit status: 0 if all is done, 1 if a notebook fails, 2 for a "
    "request that cannot be met, 130 after Ctrl-C."
)
FIRST_ADVANCED = "10"  # the chapters before it are the main ones, which `run` executes by default


class RefusedError(Exception):
    """A request that can't be met; one sentence says why."""


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers course") -> int:
    """Carry out one of the course's commands.

    Returns:
        Exit status: 0, or 2 for a request that can't be met. A notebook that fails raises its error.
    """
    chosen = _parser(prog).parse_args(arguments)
    try:
        if not is_checkout():
            raise RefusedError(without_checkout(chosen.command))
        chosen.carry_out(chosen)
    except RefusedError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0


def without_checkout(command: str) -> str:
    """The sentence for a reader who installed the package without the notebooks."""
    return (
        f"this command needs a checkout of the repository, which holds the notebooks: run `git clone {_address()}`, "
        f"then `python -m kd_helpers course {command}` in that folder."
    )


def _address() -> str:
    """The address of the repository, from the installed package."""
    try:
        urls = importlib.metadata.metadata("kd-helpers").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:  # the folder kd_helpers was copied, not installed
        urls = []
    return dict(url.split(", ", 1) for url in urls).get("Repository", "ADDRESS")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, epilog=EXAMPLE.format(prog=prog))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, carry_out: Callable[[argparse.Namespace], None], summary: str, details: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=f"{summary} {details}")
        command.set_defaults(carry_out=carry_out)
        return command

    running, storing = (
        add(
            "run",
            _run,
            "Execute notebooks and make pages of them.",
            "The executed copies, the HTML pages and an index go to artifacts/course; the notebooks themselves are not "
            "changed. Prints the comparison of chapter 06, if it was run, beside the full one that is stored.",
        ),
        add(
            "store",
            _store,
            "Execute notebooks in place and keep their outputs.",
            "Removes from the outputs what differs between two runs, and stores the time and the memory that each "
            "notebook took.",
        ),
    )
    for command, default in ((running, "the main chapters, 00 to 08"), (storing, "all")):
        numbers = f"number of a notebook, such as 03 (default: {default})"
        command.add_argument("numbers", nargs="*", metavar="NN", help=numbers)
    running.add_argument("--all", action="store_true", help="run every notebook, also the advanced chapters from 10 on")
    add(
        "site",
        _site,
        "Make pages of the notebooks as they are stored.",
        "Executes nothing. The pages and an index go to artifacts/site and load nothing from the network.",
    )
    add(
        "demo",
        _demo,
        "Make the page in which teacher and students answer in a browser (chapter 08).",
        "Trains the models if they are not there, and fetches transformers.js and ONNX Runtime with npm. The page goes "
        "to artifacts/site, and needs a server: the command says how to start one.",
    )
    add(
        "readme",
        _readme,
        "Write the stored results into the README.",
        "Draws the figures of the stored comparison and benchmark, and writes the tables of chapters, results, speed.",
    )
    add(
        "sweep",
        _sweep,
        "Store the finished full sweep of chapter 07 in the package.",
        "Reads artifacts/sweeps/temperature_and_alpha, which `make sweep` fills.",
    )
    publishing = add(
        "publish",
        _publish,
        "Write the repository's address and tag into every badge and set-up cell.",
        "Colab and Binder then open that repository at that tag.",
    )
    publishing.add_argument("repository", metavar="OWNER/NAME", help="the repository on GitHub")
    publishing.add_argument("ref", metavar="TAG", help="a tag such as v0.6.0, a branch or a commit")
    return parser


def _run(chosen: argparse.Namespace) -> None:
    if chosen.all and chosen.numbers:
        raise RefusedError("give numbers of notebooks or --all, not both.")
    paths = _numbered(chosen.numbers)
    if not (chosen.all or chosen.numbers):
        paths = [path for path in paths if path.name < FIRST_ADVANCED]
    from kd_helpers.course.run import run_and_report

    run_and_report(paths)


def _store(chosen: argparse.Namespace) -> None:
    paths = _numbered(chosen.numbers)
    from kd_helpers.course.store import store

    store(paths)


def _numbered(numbers: Sequence[str]) -> list[Path]:
    """The notebooks with these numbers, in order; all of them if no number is given."""
    paths = {path.name[:2]: path for path in notebook_paths()}
    if unknown := sorted(set(numbers) - set(paths)):
        raise RefusedError(f"no notebook is numbered {', '.join(unknown)}; there are {', '.join(paths)}.")
    return [path for number, path in paths.items() if number in (numbers or paths)]


def _site(chosen: argparse.Namespace) -> None:
    from kd_helpers.course.site import site

    folder = artifacts_dir() / "site"
    site(notebook_paths(), folder)
    print(f"The course as pages: {folder / 'index.html'}")


def _demo(chosen: argparse.Namespace) -> None:
    from kd_helpers.course.demo import demo

    try:
        path = demo(artifacts_dir() / "site")
    except ValueError as error:
        raise RefusedError(str(error)) from error
    print(
        f"The page: {path}\nStart a server with "
        f"`.venv/bin/python -m http.server --bind 127.0.0.1 --directory {path.parent}`"
    )
    print(f"and open http://127.0.0.1:8000/{path.name}.")


def _readme(chosen: argparse.Namespace) -> None:
    from kd_helpers.course.readme import write_readme

    write_readme()


def _sweep(chosen: argparse.Namespace) -> None:
    from kd_helpers.course.full_sweep import store_sweep

    try:
        store_sweep()
    except (OSError, ValueError) as error:
        raise RefusedError(str(error)) from error


def _publish(chosen: argparse.Namespace) -> None:
    from kd_helpers.course.publish import publish

    try:
        publish(chosen.repository, chosen.ref)
    except ValueError as error:
        raise RefusedError(str(error)) from error
