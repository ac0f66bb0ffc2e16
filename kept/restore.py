"""Put finished runs of TinyBERT's study back into the folder of artifacts, where `study tinybert` finds them again.

Until the study is stored: `KD_ARTIFACTS=… python kept/restore.py`. Only machines whose "auto" is bfloat16 can use them,
with the code of this branch (the name of each folder is the fingerprint of what made the run).
"""

import shutil
from pathlib import Path

from kd_helpers import artifacts

for kept in sorted((Path(__file__).parent / "tinybert_bfloat16").iterdir()):
    folder = artifacts.artifacts_dir() / "studies" / kept.name
    if not artifacts.is_intact(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in kept.iterdir():
            shutil.copy(file, folder)
        artifacts.seal(folder, ["measures.json", "provenance.json"])
