"""Run folders: what a run is, its folder's name and lock, and what is there of it already."""

import hashlib
import json
import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from utils import distributed
from utils.checkpoint import BEST, FILE, RECALIBRATED, Checkpoint, load_checkpoint
from utils.config import Config
from utils.device import choose_device, choose_precision
from utils.errors import ConfigError, RunError
from utils.files import PARTIAL, printable
from utils.yaml_io import CONFIGS, Tree, read_yaml

Results = dict[str, float | int | None]
SHOWN = 4  # differences in a message
RESULTS = "metrics.json"
UNFINISHED = "unfinished"  # this file is there while test.py or predict.py writes
# what train.py, test.py, export.py and calibrate.py write into a run folder
WRITTEN = (
    "config.yaml", "log.jsonl", FILE, BEST, RECALIBRATED, RESULTS, "scores.csv", "skipped.csv", "report.html",
    "heatmaps.png", "clips.png", "events.out.tfevents.*", "model.onnx*", "model.ts", UNFINISHED,
)  # fmt: skip
LOCK = ".lock"
_log = logging.getLogger("uninet")


def config_hash(config: Config) -> str:
    """Six characters over every setting that changes the result (the seed stands beside them in the name)."""
    settings = _relevant(config)
    del settings["train.seed"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]


def identity_of(config: Config, data: Tree) -> Tree:
    """What a run is: every setting that changes its results, the seed, and its data.

    data: as `datasets.build.data_identity` gives it.
    """
    return {"settings": _relevant(config), "data": data}


def _relevant(config: Config) -> Tree:
    return _dotted(config.to_dict()) | {"run.eval_precision": config.run.eval_precision}


def _dotted(tree: Tree) -> Tree:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def differences(old: Tree, new: Tree) -> list[str]:
    """What differs between two identities, as "section.key (old, now new)"; none if they are the same.

    A setting that is younger than `old` had base.yaml's value, which leaves things as they were.
    """
    before = _dotted(read_yaml(CONFIGS / "base.yaml")) | old["settings"]
    pairs = ((key, before.get(key), value) for key, value in new["settings"].items())
    found = [f"{key} ({old_value}, now {value})" for key, old_value, value in pairs if old_value != value]
    found += [f"{key} (no longer a setting)" for key in old["settings"] if key not in new["settings"]]
    ours, theirs = old["data"], new["data"]
    if str(Path(ours["root"]).resolve()) != theirs["root"]:  # a link to where the data went is the same root
        found.append(f"the folder of the data ({ours['root']}, now {theirs['root']})")
    if ours["fingerprint"] != theirs["fingerprint"]:
        numbers = (", ".join(f"{n} {name}" for name, n in d["images"].items()) for d in (ours, theirs))
        found.append(f"the images, their labels or their masks ({', now '.join(numbers)})")
    if ours["weights"] != theirs["weights"]:
        found.append("the content of model.weights")
    return found


def check_same(found: Tree | None, own: Tree, source: Path) -> None:
    """Stop unless `source`, whose identity is `found`, was made by a run of the identity `own`. Raises
    RunError naming what differs and what to do, or if `source` holds no identity.
    """
    ways_out = "choose another --name or --output, or --overwrite to train again"
    if found is None or "settings" not in found:  # converted weights have none
        raise RunError(f"{source} does not record which run it is of, so nothing of it is used; {ways_out}")
    changed = differences(found, own)
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        other = f"{source} is of another run, which differs in {', '.join(changed[:SHOWN])}{more}"
        raise RunError(f"{other}; give what it was made with, or {ways_out}")


def run_folder(config: Config, output: Path, name: str | None = None) -> Path:
    """<output>/<dataset>/<setting>/<category>/<model>-<flavor>-<backbone>-<hash>-s<seed>."""
    model = config.model
    own = f"{model.name}-{model.flavor}-{model.backbone}-{config_hash(config)}-s{config.train.seed}"
    name = own.replace("/", "_") if name is None else name
    for flag, part in (("--name", name), ("--category", config.data.category)):
        if not part or part.startswith(".") or "/" in part or "\\" in part:
            expected = "the name of one folder, without / or \\ and no dot at its start (--output says where)"
            raise ConfigError(f"{flag} is {part!r}; expected {expected}")
    return output / config.data.name / model.setting / printable(config.data.category) / name


def place_of(
    config: Config, output: Path, name: str | None = None, *, machine: str | None = None, anew: bool = False
) -> tuple[Config, Path]:
    """Fix what precision `auto` stands for, as it is part of a run, and name the run's folder.

    A run that is there keeps the precision it began with; another one, or one that starts anew, takes that of
    this machine (`machine`; None: tried out).
    """
    device = choose_device(config.run.device)
    if machine is None and "auto" in (config.train.precision, config.run.eval_precision):
        machine = distributed.broadcast_object(choose_precision("auto", device))
    places = []
    for precision in ("fp32", "bf16") if machine == "fp32" else ("bf16", "fp32"):  # this machine's first
        fixed = config
        if config.train.precision == "auto":
            fixed = replace(fixed, train=replace(config.train, precision=precision))
        if config.run.eval_precision == "auto":
            fixed = replace(fixed, run=replace(config.run, eval_precision=precision))
        places.append((fixed, run_folder(fixed, output, name)))
    began = [] if anew else [place for place in places if _began_with(*place)]
    config, folder = distributed.broadcast_object((began or places)[0])
    if began and config != places[0][0]:
        _log.info("%s goes on in its own precision, %s", folder, config.train.precision)
    return config, folder


def _began_with(config: Config, folder: Path) -> bool:
    """Whether results or a state are in the folder, of a run with the precision of `config`."""
    path = folder / "config.yaml"
    if not path.is_file() or not any((folder / name).is_file() for name in (FILE, BEST, RESULTS)):
        return False
    try:
        return read_yaml(path)["train"]["precision"] == config.train.precision
    except (ConfigError, KeyError, TypeError):  # of another program
        return False


@contextmanager
def locked(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Hold the folder for this process; made if missing. Temporary files of a killed process are removed.

    overwrite: what is there is to be deleted, so a checkpoint (of a copied run) is no proof whose it is.
    Raises RunError if another process holds it, or if it holds files and was not made by this program.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / LOCK
    unmarked = not mark.is_file() and any(p.suffix != PARTIAL for p in folder.iterdir())
    if unmarked and (overwrite or not (folder / FILE).is_file()):
        found = f"{folder} holds files and was not made by this program (it has no {LOCK})"
        raise RunError(f"{found}; choose another --name or --output")
    try:
        with FileLock(mark, timeout=0):
            for left in folder.glob(f".*{PARTIAL}"):
                left.unlink()
            yield folder
    except Timeout as error:
        raise RunError(f"{folder} is in use by another process; wait, or choose another --name") from error
    except BaseException:
        if unmarked:  # and still not known to be ours
            mark.unlink(missing_ok=True)
        raise
    mark.touch()  # on Windows the lock's file goes with the lock


def clear_run(folder: Path) -> None:
    """Delete what this program wrote into a run folder that it made (see `locked`), and nothing else.

    That includes evaluations by test.py in sub-folders test*, with their maps.
    """
    marks = RESULTS, UNFINISHED  # one of them is in each
    tests = [p for p in folder.glob("test*") if any((p / m).is_file() for m in marks) and not p.is_symlink()]
    inside = [folder, *tests, *(p / "april-2025" for p in tests)]
    files = [path for place in inside for name in WRITTEN for path in place.glob(name)]
    files += [path for place in inside for path in (place / "maps").rglob("*.tiff")]
    for path in files:
        if path.is_file() or path.is_symlink():
            path.unlink()
    empty = [p for top in (*tests, folder / "maps") for p in (top, *top.rglob("*")) if p.is_dir()]
    for path in sorted(empty, reverse=True):  # the innermost first
        if not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def finished_results(folder: Path, identity: Tree) -> dict[str, Results] | None:
    """Results of a finished run, None if it is not finished; a RunError if they are of another."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    tree = json.loads(path.read_text())
    check_same(tree.get("identity"), identity, path)
    return tree["results"]


def earlier(
    folder: Path, identity: Tree, *, resume: bool, anew: bool = False
) -> tuple[dict[str, Results] | None, Checkpoint | None, float | None]:
    """What the folder holds of this very run: its results if it is finished; else the state to go on from if
    there is one, whatever the model; and the value of the best state that was kept. If `anew`, nothing.

    Raises RunError if what is there is of another run, or unfinished without `resume`.
    """
    if anew:
        return None, None, None
    done = distributed.broadcast_object(finished_results(folder, identity))
    if done is not None:
        return done, None, None
    there = distributed.broadcast_object([name for name in (FILE, BEST) if (folder / name).is_file()])
    if there and not resume:
        raise RunError(f"{folder} holds an unfinished run; --resume goes on with it, --overwrite starts anew")
    states = {name: load_checkpoint(folder / name) for name in there}
    for name, state in states.items():
        check_same(state.identity, identity, folder / name)
    return None, states.get(FILE), states[BEST].value if BEST in states else None


def git_sha() -> str:
    """The commit of the code, with '+' if files differ from it; 'unknown' outside a checkout."""
    folder = Path(__file__).resolve().parent

    def ask(*args: str) -> str:
        call = ["git", "-C", str(folder), *args]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        return ask("rev-parse", "--short", "HEAD") + ("+" if ask("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
