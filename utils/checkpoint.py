"""Checkpoints: plain types and tensors, written atomically, read with weights_only."""

import logging
import math
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.config import Config
from utils.errors import CheckpointError, ConfigError
from utils.files import write_atomically
from utils.yaml_io import CONFIGS, Tree, build, merge, read_yaml

FORMAT = 2
FILE, BEST = "last.pt", "best.pt"
RECALIBRATED = "recalibrated.pt"  # calibrate.py's
_log = logging.getLogger("uninet")


@dataclass
class Checkpoint:
    """A run's state after `iteration` steps; optimizer, schedule and rng are None in a finished run.

    identity: of the run, as `utils.runs.identity_of` gives it; None in files of older versions. seconds:
    training time so far. value: of a state kept by `select: best`, the metric that made it the best.
    calibration: fields of `model.detector.Calibration`, of a finished run that held normals out.
    """

    config: Config
    model: dict[str, Tensor]
    iteration: int
    identity: Tree | None = None
    seconds: float = 0.0
    optimizer: Tree | None = None
    schedule: Tree | None = None
    rng: dict[str, Tensor] | None = None
    value: float | None = None
    calibration: Tree | None = None

    @property
    def finished(self) -> bool:
        """Whether the training has ended, and this is the state that it kept."""
        return self.optimizer is None and self.value is None

    def resume(self, optimizer: Optimizer, schedule: LRScheduler) -> None:
        """Go on from what `training_state` gave, on any device; the model is restored by `restore_model`."""
        assert self.optimizer is not None and self.schedule is not None and self.rng is not None
        groups = []
        for saved, now in zip(self.optimizer["param_groups"], optimizer.param_groups, strict=True):
            lr = now["lr"]  # a tensor on a GPU
            lr = torch.full_like(lr, saved["lr"]) if isinstance(lr, Tensor) else saved["lr"]
            params = saved["params"][: len(now["params"])]  # older backbones end in stages that nothing reads
            own = {"lr": lr, "params": params, "fused": now["fused"], "capturable": now["capturable"]}
            groups.append(saved | own)
        optimizer.load_state_dict(self.optimizer | {"param_groups": groups})
        schedule.load_state_dict(self.schedule)
        torch.set_rng_state(self.rng["cpu"])
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in self.rng:
                torch.cuda.set_rng_state(self.rng[f"cuda{i}"], i)

    def save(self, path: Path) -> None:
        """Write in one step: a kill at any moment leaves the previous file or this one. Raises
        FloatingPointError if a value of the state is not finite; the previous file is kept; OSError if it
        cannot be written.
        """
        wrong = not_finite({"model": self.model, "optimizer": self.optimizer})
        if wrong is not None:
            found = f"{wrong} is not finite after step {self.iteration}, so the state is not saved"
            raise FloatingPointError(f"{found}; lower optim.lr, set optim.grad_clip, or use --precision fp32")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        config = self.config.to_dict() | {"run": asdict(self.config.run)}
        tree = values | {"format": FORMAT, "config": config}
        write_atomically(path, lambda file: _write(tree, file.name))


def not_finite(tree: object, name: str = "") -> str | None:
    """Dotted name of the first tensor or float of a tree that is not finite; None: all are."""
    if isinstance(tree, Tensor):
        wrong = tree.is_floating_point() and not tree.isfinite().all()
    elif isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        found = (not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)
        return next((inner for inner in found if inner is not None), None)
    else:
        wrong = isinstance(tree, float) and not math.isfinite(tree)
    return name if wrong else None


def _write(tree: Tree, path: str) -> None:
    """torch.save by name: into a file object of Python's a signal in the middle ends in an abort."""
    try:
        torch.save(tree, path)
    except RuntimeError as error:  # torch's for a disk that is full, among others
        folder = Path(path).parent
        room = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB are free"
        found = f"a checkpoint could not be written to {folder} ({str(error).splitlines()[0]})"
        way_out = "make room and --resume, or choose another --output"
        raise OSError(f"{found}; an earlier one stays. There {room}; {way_out}") from error


def find_checkpoint(run: str | Path) -> Path:
    """The checkpoint file of a run folder, or the file itself; a CheckpointError if there is none."""
    path = Path(run).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give a run folder that holds {FILE}, or the file")
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint on the CPU; nothing in the file is executed. A CheckpointError if it is damaged,
    holds anything but plain types and tensors, is of another program, or has values that are not finite.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and foreign files
        found = f"{path} is no checkpoint of this program, or is damaged ({type(error).__name__})"
        raise CheckpointError(f"{found}; nothing of it was run") from error
    if isinstance(tree, dict) and tree.get("format") == 1:
        raise CheckpointError(f"{path} was written by v0.1.0 (commit 4a74ab6); check that commit out")
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or not isinstance(tree.get("model"), dict):
        raise CheckpointError(f"{path} is no checkpoint of format {FORMAT} of this program")
    try:
        # settings that are younger than the file take base.yaml's value, which leaves things as they were
        config = build(Config, merge([read_yaml(CONFIGS / "base.yaml"), tree["config"]]))
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} was written by another version of this program: {error}") from error
    values: Tree = {f.name: tree.get(f.name) for f in fields(Checkpoint)} | {"config": config}
    state = Checkpoint(**values)
    wrong = not_finite({key: getattr(state, key) for key in ("model", "optimizer", "calibration")})
    if wrong is not None:
        raise CheckpointError(f"{path} is of no use: {wrong} has values that are not finite; train it again")
    return state


def load_trained(run: str | Path) -> tuple[Path, Checkpoint]:
    """The checkpoint of a run folder, or the file itself, and what it holds, to be used and not trained on.

    A warning tells that the training has not ended.
    """
    path = find_checkpoint(run)
    state = load_checkpoint(path)
    if not state.finished:
        _log.warning(
            "%s is not the end of its training but the state after step %d of %d",
            path, state.iteration, state.config.train.iterations,
        )  # fmt: skip
    return path, state


def restore_model(model: nn.Module, state: dict[str, Tensor], *, source: Path) -> None:
    """Load all of `state` into `model`; a CheckpointError if a tensor is missing or does not fit."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise CheckpointError(f"{source} does not fit this model: {first}") from error


def training_state(optimizer: Optimizer, schedule: LRScheduler) -> Tree:
    """Fields of a `Checkpoint` to go on from; the data order is a function of seed and iteration.

    Rates are numbers, as a GPU's are tensors.
    """
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    rng = {"cpu": torch.get_rng_state(), **{f"cuda{i}": state for i, state in enumerate(gpus)}}
    state, rates = optimizer.state_dict(), {"_last_lr": [float(rate) for rate in schedule.get_last_lr()]}
    state["param_groups"] = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return {"optimizer": state, "schedule": schedule.state_dict() | rates, "rng": rng}
