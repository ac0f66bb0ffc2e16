"""Put the runs that `keep.py` kept back into the folder of artifacts, where their study finds them again.

`KD_ARTIFACTS=… python kept/restore.py`; only with the code of this branch, and where "auto" means the same precision (the
name of each folder is the fingerprint of what made the run).
"""

import shutil
from pathlib import Path

from kd_helpers import artifacts

for kept in sorted((Path(__file__).parent / "runs").iterdir()):
    folder = artifacts.artifacts_dir() / "studies" / kept.name
    if not artifacts.is_intact(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in kept.iterdir():
            shutil.copy(file, folder)
        artifacts.seal(folder, ["measures.json", "provenance.json"])
