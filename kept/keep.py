"""Keep the finished runs of studies that go on later: `KD_ARTIFACTS=… python kept/keep.py kd_helpers.experiments.patience …`.

Only runs that the code of this branch made are kept.
"""

import json
import shutil
import sys
from pathlib import Path

from kd_helpers import artifacts
from kd_helpers.provenance import made_by

kept = Path(__file__).parent / "runs"
sources = {made_by(module)["source"] for module in sys.argv[1:]}
for folder in (artifacts.artifacts_dir() / "studies").iterdir():
    if artifacts.is_intact(folder) and json.loads((folder / "provenance.json").read_text())["source"] in sources:
        (kept / folder.name).mkdir(parents=True, exist_ok=True)
        for name in ("measures.json", "provenance.json"):
            shutil.copy(folder / name, kept / folder.name)
print(len(list(kept.iterdir())), "runs are kept")
