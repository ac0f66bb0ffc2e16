"""What each of the two processes of `test_causal_trainer` does: `torchrun … -m support.causal_process`."""

from __future__ import annotations

import json
from pathlib import Path

from accelerate import PartialState

from support.causal_trainer import DATASET, trained


def train_and_log() -> None:
    """Ends with its Trainer let go: one that lives on keeps gloo's threads alive, and they may stop an exit midway."""
    trainer = trained(Path("two"), per_device_train_batch_size=4)
    trainer.save_model("two")
    trainer.evaluate(DATASET.select(range(30)))
    if trainer.is_world_process_zero():
        Path("two.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    train_and_log()
    PartialState().destroy_process_group()
