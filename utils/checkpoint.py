"""Checkpoints: plain types and tensors, written atomically, read with weights_only."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.config import REMOVED, Config, ConfigError, Tree, build, merge
from utils.plain_yaml import CONFIGS, read_yaml
from utils.runs import differences, write_atomically

FORMAT = 1
FILE = "last.pt"
_log = logging.getLogger("uninet")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, foreign, or does not fit; the message says which."""


@dataclass
class Checkpoint:
    """A run's state after `iteration` steps; optimizer, schedule and rng are None in a finished run.

    seconds: training time so far. value: of a state kept by `select: best`, the metric that made it the best.
    calibration: fields of `utils.calibration.Calibration`, of a finished run that held normals out for it.
    """

    config: Config
    model: dict[str, Tensor]
    iteration: int
    seconds: float = 0.0
    optimizer: Tree | None = None
    schedule: Tree | None = None
    rng: dict[str, Tensor] | None = None
    value: float | None = None
    calibration: Tree | None = None

    def save(self, path: Path) -> None:
        """Write in one step: a kill at any moment leaves the previous file or this one."""
        tree = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "model": self.model,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "rng": self.rng,
            "value": self.value,
            "calibration": self.calibration,
        }
        write_atomically(path, lambda file: _write(tree, file.name))


def _write(tree: Tree, path: str) -> None:
    """torch.save by name: into a file object of Python's a signal in the middle ends in an abort.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        torch.save(tree, path)
    except RuntimeError as error:  # torch's for a disk that is full, among others
        folder = Path(path).parent
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            f"a checkpoint could not be written to {folder}, where {free:.0f} MB are free; the one before is "
            f"kept. Make room and --resume, or choose another --output (torch: {str(error).splitlines()[0]})"
        ) from error


def find_checkpoint(run: str | Path) -> Path:
    """The checkpoint file of a run folder, or the file itself.

    Raises:
        CheckpointError: if there is none.
    """
    path = Path(run).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give a run folder that holds {FILE}, or the file")
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: if it is truncated, holds anything but plain types and tensors, or is of another
            program.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and foreign files
        raise CheckpointError(
            f"{path} is no checkpoint of this program, or is damaged ({type(error).__name__}); "
            "nothing of it was run"
        ) from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or not isinstance(tree.get("model"), dict):
        raise CheckpointError(f"{path} is no checkpoint of format {FORMAT} of this program")
    try:
        # settings that are younger than the file take base.yaml's value, which leaves things as they were
        config = build(Config, merge([read_yaml(CONFIGS / "base.yaml"), _without_removed(tree["config"])]))
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} was written by another version of this program: {error}") from error
    keys = ("model", "iteration", "seconds", "optimizer", "schedule", "rng", "value", "calibration")
    return Checkpoint(config, **{key: tree.get(key) for key in keys})


def _without_removed(config: Tree) -> Tree:
    """A stored configuration without the settings that the program has no more."""
    kept = {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" not in REMOVED}
        for section, keys in config.items()
    }
    if kept != config:
        _log.debug("settings of an older version are left out: %s", ", ".join(REMOVED))
    if kept["model"].get("setting") == "cross-dataset":  # one model for what it was trained on
        kept["model"]["setting"] = "multi-class"
    return kept


def restore_model(model: nn.Module, state: dict[str, Tensor], *, source: Path) -> None:
    """Load all of `state` into `model`.

    Raises:
        CheckpointError: if a tensor is missing, left over, or has another shape.
    """
    try:
        model.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise CheckpointError(f"{source} does not fit this model: {first}") from error


def save_training(
    path: Path,
    config: Config,
    model: nn.Module,
    iteration: int,
    seconds: float,
    optimizer: Optimizer,
    schedule: LRScheduler,
) -> None:
    """Write all that `resume_training` needs; the data order is a function of seed and iteration."""
    states = (optimizer.state_dict(), schedule.state_dict(), _rng_state())
    Checkpoint(config, model.state_dict(), iteration, seconds, *states).save(path)


def resume_training(
    path: Path, config: Config, *, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler
) -> tuple[int, float]:
    """Load a run's state if there is one; return its finished steps and the seconds they took.

    Raises:
        CheckpointError: as `load_checkpoint`, or if the state is of other settings than `config`.
    """
    if not path.is_file():
        return 0, 0.0
    state = load_checkpoint(path)
    changed = differences(state.config, config)
    if changed:
        raise CheckpointError(
            f"{path} was trained with other settings: {', '.join(changed)}; "
            "go on with the same ones, or choose another --name, or --overwrite"
        )
    restore_model(model, state.model, source=path)
    if state.optimizer is not None and state.schedule is not None and state.rng is not None:
        optimizer.load_state_dict(state.optimizer)
        schedule.load_state_dict(state.schedule)
        _restore_rng(state.rng)
    return state.iteration, state.seconds


def _rng_state() -> dict[str, Tensor]:
    """States of torch's generators, CPU and all GPUs; the data order needs none (see TrainingOrder)."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda{i}": s for i, s in enumerate(gpus)}}


def _restore_rng(state: dict[str, Tensor]) -> None:
    """Set the states that `_rng_state` took, as far as the devices are there."""
    torch.set_rng_state(state["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda{i}"], i)
