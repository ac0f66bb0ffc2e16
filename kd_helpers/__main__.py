"""The command line: `python -m kd_helpers COMMAND`, also installed as `kd-helpers`.

A command's module is loaded when the command is called, so that the list of commands appears at once and a command
needs only the packages that it uses.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kd_helpers import __version__


class Command(NamedTuple):
    """A command: the module whose `main(arguments, prog=…)` carries it out, and what it does."""

    module: str
    summary: str


COMMANDS = {
    "train": Command(
        "kd_helpers.train", "Distil a student with the Hugging Face Trainer, in one process or in many (chapter 16)."
    ),
    "sweep": Command(
        "kd_helpers.experiments.sweep", "Run a notebook with every combination of some parameters (chapter 07)."
    ),
    "export": Command("kd_helpers.export", "Write a student as ONNX, also with weights of eight bits (chapter 08)."),
    "study": Command(
        "kd_helpers.experiments.studies",
        "Make one of the course's studies again: the comparison of chapter 06, or a paper's.",
    ),
    "again": Command(
        "kd_helpers.experiments.again", "Make one run of each stored study again, and compare it with what is stored."
    ),
    "stories": Command(
        "kd_helpers.experiments.written_stories",
        "Let a language model write the stories again that come with the package.",
    ),
    "explanations": Command(
        "kd_helpers.experiments.explained_tweets",
        "Let a language model explain the tweets again whose explanations come with the package.",
    ),
    "verdict": Command(
        "kd_helpers.course.verdict_page", "Ask whether distillation pays on your own texts, within a time budget."
    ),
    "benchmark": Command("kd_helpers.experiments.benchmark", "Measure how fast the training loop is on this machine."),
    "conformance": Command(
        "kd_helpers.experiments.conformance", "Run the losses of other toolkits on the same logits (chapter 03)."
    ),
    "course": Command("kd_helpers.course.commands", "Run, store and publish the notebooks of the course."),
}
DESCRIPTION = "Knowledge distillation of BERT-class models. `{prog} COMMAND --help` explains a command."
EXAMPLE = (
    "Example: {prog} sweep --help. Exit status of every command: 0 if all is done, 1 if something failed while it ran, "
    "2 for a request that cannot be met, 130 after Ctrl-C."
)
INTERRUPTED = "Stopped. What was finished is kept, and the same command finds it again."


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command.

    Returns:
        Exit status: 0, 1 if something failed, or 2 for a request that can't be met. Ctrl-C exits with 130.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    prog = "python -m kd_helpers" if Path(sys.argv[0]).name == "__main__.py" else "kd-helpers"
    parser = _parser(prog)
    if not given:
        parser.print_help()
        return 0
    name, *rest = given
    if name.startswith("-"):
        parser.parse_args(given)  # --help and --version print and exit
        parser.error("name a command first, then its arguments.")
    if name not in COMMANDS:
        print(f"{prog}: there is no command {name!r}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return _call(name, rest, f"{prog} {name}")


def _call(name: str, arguments: Sequence[str], prog: str) -> int:
    """Load a command's module and carry the command out."""
    try:
        return importlib.import_module(COMMANDS[name].module).main(arguments, prog=prog) or 0
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "kd_helpers"):  # a mistake in this package, not in the installation
            raise
        print(
            f"{prog} needs the package {missing}, which is not installed: run `pip install "
            f"'kd-helpers[{'deploy' if missing.startswith('onnx') else 'course'}]'`.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\n{INTERRUPTED}", flush=True)
        sys.stderr.flush()
        # A normal exit would wait for threads that wait for notebooks; their kernels end when this process does.
        os._exit(130)


def _parser(prog: str) -> argparse.ArgumentParser:
    """The parser for what is no command. Each command reads its own arguments."""
    lines = shutil.get_terminal_size().columns - 2  # as argparse does it for other texts
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description=f"{textwrap.fill(DESCRIPTION.format(prog=prog), lines)}\n\ncommands:\n{table}",
        epilog=textwrap.fill(EXAMPLE.format(prog=prog), lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kd-helpers {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
