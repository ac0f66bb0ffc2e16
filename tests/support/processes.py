"""Starting other processes, and what some of them do. A process that is spawned imports it, so it stands here."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from kd_helpers import artifacts

TESTS = Path(__file__).resolve().parent.parent
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def path_with_tests() -> dict[str, str]:
    """The environment variable that lets a new process, or a kernel, import `support`."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(TESTS), *([before] if before else [])])}


def build_slowly(root: Path) -> None:
    """Make sure that `root` holds a folder `thing`, and note in `root` when it is built."""

    def build(target: Path) -> None:
        time.sleep(0.3)
        with (root / "builds.log").open("a") as log:
            log.write("built\n")
        (target / "a.txt").write_text("whole")

    artifacts.get_or_build(root / "thing", build)
