"""Chapter 05: resuming a run that was interrupted.

A checkpoint holds everything that the next step depends on: the weights that are trained and the buffers, the state of
optimiser and scheduler, torch's random state, and how far the run has come. On a CPU, a run that is resumed from a
checkpoint ends in the same weights, bit by bit, as one that was never interrupted, unless its loss or its batches draw
from NumPy's or Python's generators, whose state is not kept. What is not trained but long, as a teacher's pass over
many texts, is made part by part (`build_parts`).
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from kd_helpers import artifacts

KEPT = 2  # the newest, and one before it in case that is damaged


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps made.
        history: one entry for each epoch that is finished (see `loop.fit`).
        losses: of each step of the unfinished epoch, by name.
        seconds: spent on training and validation so far, in all processes that took part.
    """

    step: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Count one more step of the epoch, with its losses, scalars by name."""
        values = torch.stack(list(losses.values())).tolist()  # one transfer from a GPU, not one for each
        for name, value in zip(losses, values, strict=True):
            self.losses.setdefault(name, []).append(value)
        self.step += 1

    def finish_epoch(self, validation: dict[str, float]) -> None:
        """Make the epoch an entry of the history."""
        number = len(self.history) + 1
        self.history.append({"epoch": number, "step": self.step, "losses": self.losses, "validation": validation})
        self.losses = {}

    def curve(self, name: str) -> torch.Tensor:
        """One of the losses at every step of all finished epochs: a float32 tensor `[steps]`."""
        return torch.tensor([value for epoch in self.history for value in epoch["losses"][name]])


def checkpoints_dir(key: str) -> Path:
    """Where the checkpoints of a run are: named after its provenance, so another run never finds them."""
    return artifacts.artifacts_dir() / "checkpoints" / key


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    progress: Progress,
    generator: torch.Generator | None = None,
) -> None:
    """Write a checkpoint beside the earlier ones, whole or not at all, and keep the last two.

    Args:
        folder: of the run's checkpoints.
        model: everything that is trained.
        optimizer: of it.
        scheduler: of the optimiser.
        progress: how far the run has come.
        generator: that the batches draw from, if they draw.

    Raises:
        OSError: it can't be written; earlier checkpoints still stand.
    """
    state = optimizer.state_dict()
    tensors = {f"model.{name}": kept.detach() for name, kept in _kept(model)}
    for index, values in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors |= {f"random.{name}": value for name, value in _random_state(model).items()}
    if generator is not None:
        tensors["random.batches"] = generator.get_state()
    described = {
        "progress": dataclasses.asdict(progress),
        "optimizer": state["param_groups"],
        "scheduler": scheduler.state_dict(),
    }

    def write(target: Path) -> None:
        safetensors.torch.save_file(tensors, target / "state.safetensors")
        artifacts.save_json(target / "state.json", described)

    artifacts.write_folder(folder / f"step-{progress.step:08d}", write)
    for old in _found(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    generator: torch.Generator | None = None,
) -> Progress:
    """Restore model, optimiser, scheduler and the random state from the newest intact checkpoint.

    Args:
        folder: of the run's checkpoints.
        model: everything that is trained.
        optimizer: of it.
        scheduler: of the optimiser.
        generator: that the batches draw from, if they draw.

    Returns:
        How far that was; nothing is changed and `step` is 0 where there is no checkpoint.

    Raises:
        ValueError: it is of another model.
    """
    newest = last_checkpoint(folder)
    if newest is None:
        return Progress()
    described = artifacts.load_json(newest / "state.json")
    # Read into memory: what is mapped from a file changes with it.
    tensors = safetensors.torch.load((newest / "state.safetensors").read_bytes())
    kept = {f"model.{name}": tensor for name, tensor in _kept(model)}
    stored = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")}
    if stored != {name: tensor.shape for name, tensor in kept.items()}:
        raise ValueError(f"the checkpoints in {folder} are of another model; choose another folder, or delete it.")
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(tensors[name])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": described["optimizer"]})
    scheduler.load_state_dict(described["scheduler"])
    torch.set_rng_state(tensors["random.cpu"])
    if (device := _device_type(model)) != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[f"random.{device}"])
    if generator is not None:
        generator.set_state(tensors["random.batches"])
    return Progress(**described["progress"])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is intact, if there is one; a damaged one is reported."""
    for checkpoint in _found(folder):
        if artifacts.is_intact(checkpoint):
            return checkpoint
        warnings.warn(f"the checkpoint {checkpoint} is damaged; an earlier one is taken.", stacklevel=3)
    return None


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _kept(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What training changes: parameters with a gradient, and buffers, such as the running means of a BatchNorm.

    Frozen parameters are the same in every run. So are buffers that the model leaves out of its state dict.
    """
    in_state = model.state_dict().keys()
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in in_state)


def _random_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of torch's generators. The order of the batches needs none: it follows from the epoch."""
    state = {"cpu": torch.get_rng_state()}
    if (device := _device_type(model)) != "cpu":
        state[device] = torch.get_device_module(device).get_rng_state()
    return state


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def build_parts(
    folder: Path,
    items: Sequence[Any],
    build: Callable[[int, Any, tqdm, Path], None],
    *,
    size: int,
    description: str,
    unit: str,
) -> list[Path]:
    """Make something long part by part; an interrupted process loses one part at most.

    Args:
        folder: holds the parts until the whole is stored; the caller removes it then.
        items: what the whole is made of.
        build: `build(number, part, bar, target)` fills the folder of one part, and may move the progress bar on.
        size: items in a part; the last one may be smaller.
        description: of the progress bar.
        unit: what an item is, for the progress bar.

    Returns:
        The folder of each part, in order; those that were there already are found again.
    """
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    folders = [folder / f"{number:06d}" for number in range(len(parts))]
    with tqdm(total=len(items), desc=description, unit=unit, leave=False) as bar:
        done = 0
        for number, (part, target) in enumerate(zip(parts, folders, strict=True)):
            artifacts.get_or_build(target, functools.partial(build, number, part, bar))
            done += len(part)
            bar.update(done - bar.n)  # of a part that was found
    return folders
