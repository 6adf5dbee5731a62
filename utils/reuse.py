"""Which folder a run has, and what is there of it already: results, a state to go on from, a best state."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

from datasets.build import dataset_root
from evaluation.metrics import Results
from evaluation.results import FILE as RESULTS
from evaluation.results import finished_results
from utils import distributed
from utils.checkpoint import BEST, FILE, Checkpoint, load_checkpoint
from utils.config import Config, ConfigError, Tree
from utils.device import choose_device, choose_precision
from utils.runs import RunError, check_same, run_folder
from utils.yaml_io import read_yaml

PRECISIONS = ("fp32", "bf16")
_log = logging.getLogger("uninet")


def place_of(
    config: Config, output: Path, name: str | None = None, *, machine: str | None = None, anew: bool = False
) -> tuple[Config, Path]:
    """Fix what `auto` and a relative root stand for, as they are part of a run, and name the run's folder.

    A run that is there keeps the precision it began with; another one, or one that starts anew, takes that of
    this machine (`machine`; None: tried out).

    Raises:
        ConfigError: if `select: best` has nothing to select from, or as `run_folder`.
        ValueError: for a device that is not there.
    """
    if config.eval.select == "best" and config.eval.every == 0:
        raise ConfigError("--select best needs a cadence: add --set eval.every=N (iterations)")
    if config.data.root:
        config = replace(config, data=replace(config.data, root=str(dataset_root(config.data))))
    given, device = (config.train.precision, config.eval.precision), choose_device(config.train.device)
    if machine is None and "auto" in given:
        machine = distributed.agreed(choose_precision("auto", device))
    ways = [sorted(PRECISIONS, key=lambda p: p != machine) if p == "auto" else (p,) for p in given]
    places = []
    for train, scoring in itertools.product(*ways):  # this machine's choice first
        fixed = replace(config, train=replace(config.train, precision=train))
        fixed = replace(fixed, eval=replace(config.eval, precision=scoring))
        places.append((fixed, run_folder(fixed, output, name)))
    began = [] if anew else [place for place in places if _began_with(*place)]
    config, folder = distributed.agreed((began or places)[0])
    if began and config != places[0][0]:
        _log.info("%s goes on in its own precision, %s", folder, config.train.precision)
    return config, folder


def _began_with(config: Config, folder: Path) -> bool:
    """Whether results or a state are in the folder, of a run with the precisions of `config`."""
    path = folder / "config.yaml"
    if not path.is_file() or not any((folder / name).is_file() for name in (FILE, BEST, RESULTS)):
        return False
    try:
        tree = read_yaml(path)
        return all(tree[part]["precision"] == getattr(config, part).precision for part in ("train", "eval"))
    except (ConfigError, KeyError, TypeError):  # of another program
        return False


def earlier(
    folder: Path, identity: Tree, *, resume: bool
) -> tuple[dict[str, Results] | None, Checkpoint | None, float | None]:
    """What the folder holds of this very run.

    Returns:
        Its results if it is finished; else the state to go on from if there is one, whatever the model; and
        the value of the best state that `select: best` has kept.

    Raises:
        RunError: if what is there is of another run, or unfinished without `resume`.
    """
    done = distributed.agreed(finished_results(folder, identity))
    if done is not None:
        return done, None, None
    there = distributed.agreed([name for name in (FILE, BEST) if (folder / name).is_file()])
    if there and not resume:
        raise RunError(
            f"{folder} holds an unfinished run; --resume goes on with it, --overwrite starts again"
        )
    states = {name: load_checkpoint(folder / name) for name in there}
    for name, state in states.items():
        check_same(state.identity, identity, folder / name)
    return None, states.get(FILE), states[BEST].value if BEST in states else None
