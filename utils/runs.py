"""Run folders: their names, their lock, and files that are never half-written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utils.config import REMOVED, Config, ConfigError
from utils.files import printable
from utils.yaml_io import CONFIGS, Tree, read_yaml

# settings that do not change a run's results, and why; all others are part of its identity
NO_EFFECT = {
    "data.cache_gb": "memory against time",
    "data.workers": "time: batches are the same",
    "train.device": "time: results agree up to rounding",
    "train.log_every": "how often losses are written",
    "train.save_every": "how often the state is written",
    "eval.batch_size": "time: results agree up to rounding",
    "eval.aupimo": "adds a metric, which test.py can add later",
    "eval.dsc_unias": "adds a metric, which test.py can add later",
}
SHOWN = 4  # differences in a message

# what train.py, test.py and export.py write into a run folder
WRITTEN = (
    "config.yaml", "log.jsonl", "last.pt", "best.pt", "metrics.json", "scores.csv", "skipped.csv",
    "report.html", "heatmaps.png", "clips.png", "events.out.tfevents.*", "model.onnx*", "model.ts",
)  # fmt: skip
LOCK = ".lock"
PARTIAL = ".partial"  # end of the names of temporary files


class RunError(RuntimeError):
    """A run folder is in use, finished or unfinished where it must not be; the message says what to do."""


# --- identity -----------------------------------------------------------------------------------------------


def config_hash(config: Config) -> str:
    """Six characters over every setting that changes the result (the seed stands beside them in the name)."""
    settings = _relevant(config)
    del settings["train.seed"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]


def identity_of(config: Config, data: Tree) -> Tree:
    """What a run is: every setting that changes its results, the seed, and its data.

    data: as `datasets.fingerprint.data_identity` gives it.
    """
    return {"settings": _relevant(config), "data": data}


def _relevant(config: Config) -> Tree:
    left_out = {*NO_EFFECT, "data.root"}  # which counts as a resolved path, see `data_identity`
    return {key: value for key, value in _dotted(config.to_dict()).items() if key not in left_out}


def _dotted(tree: Tree) -> Tree:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def differences(old: Tree, new: Tree) -> list[str]:
    """What differs between two identities, as "section.key (old, now new)"; none if they are the same.

    A setting that is younger than `old` had base.yaml's value, which leaves things as they were.
    """
    before = _dotted(read_yaml(CONFIGS / "base.yaml")) | old["settings"]
    found = [
        f"{key} ({before.get(key)}, now {value})"
        for key, value in new["settings"].items()
        if before.get(key) != value
    ]
    gone = [key for key in old["settings"] if key not in new["settings"] and key not in REMOVED]
    found += [f"{key} (no longer a setting)" for key in gone]
    ours, theirs = old["data"], new["data"]
    if str(Path(ours["root"]).resolve()) != theirs["root"]:  # a link to where the data went is the same root
        found.append(f"data.root ({ours['root']}, now {theirs['root']})")
    if ours["fingerprint"] != theirs["fingerprint"]:
        numbers = (", ".join(f"{n} {name}" for name, n in d["images"].items()) for d in (ours, theirs))
        found.append(f"the images, their labels or their masks ({', now '.join(numbers)})")
    if ours["weights"] != theirs["weights"]:
        found.append("the content of model.weights")
    return found


def check_same(found: Tree | None, own: Tree, source: Path) -> None:
    """Stop unless `source`, whose identity is `found`, was made by a run of the identity `own`.

    Raises:
        RunError: naming what differs and what to do, or if `source` holds no identity.
    """
    ways_out = "choose another --name or --output, or --overwrite to train again"
    if found is None:
        raise RunError(
            f"{source} is of a version that did not record what a run is of, so it cannot be compared with "
            f"this command; {ways_out}"
        )
    changed = differences(found, own)
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise RunError(
            f"{source} is of another run, which differs in {', '.join(changed[:SHOWN])}{more}; give what it "
            f"was made with, or {ways_out}"
        )


# --- folders ------------------------------------------------------------------------------------------------


def run_folder(config: Config, output: Path, name: str | None = None) -> Path:
    """<output>/<dataset>/<setting>/<category>/<model>-<flavor>-<backbone>-<hash>-s<seed>.

    Raises:
        ConfigError: for a name or category that is not the name of one folder.
    """
    model = config.model
    own = f"{model.name}-{model.flavor}-{model.backbone}-{config_hash(config)}-s{config.train.seed}"
    name = own.replace("/", "_") if name is None else name
    for flag, part in (("--name", name), ("--category", config.data.category)):
        if not part or part.startswith(".") or "/" in part or "\\" in part:
            raise ConfigError(
                f"{flag} is {part!r}; expected the name of one folder, without / or \\ and no dot at its "
                "start (--output says where)"
            )
    return output / config.data.name / model.setting / printable(config.data.category) / name


@contextmanager
def locked(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Hold the folder for this process; made if missing. Temporary files of a killed process are removed.

    overwrite: what is there is to be deleted, so a checkpoint (of a copied run) is no proof whose it is.

    Raises:
        RunError: if another process holds it, or if it holds files and was not made by this program.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unmarked = not (folder / LOCK).is_file() and any(p.suffix != PARTIAL for p in folder.iterdir())
    if unmarked and (overwrite or not (folder / "last.pt").is_file()):
        raise RunError(
            f"{folder} holds files and was not made by this program (it has no {LOCK}); choose another "
            "--name or --output"
        )
    with (folder / LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{folder} is in use by another process; wait for it or choose another --name"
            ) from error
        for left in folder.glob(f".*{PARTIAL}"):
            left.unlink()
        try:
            yield folder
        except BaseException:
            if unmarked:  # and still not known to be ours
                (folder / LOCK).unlink()
            raise


def clear_run(folder: Path) -> None:
    """Delete what this program wrote into a run folder that it made (see `locked`), and nothing else.

    That includes evaluations by test.py in sub-folders test*, with their maps.
    """
    tests = [p for p in folder.glob("test*") if p.is_dir() and not p.is_symlink()]
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


# --- files --------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[BinaryIO], None], *, flush: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk (a picture, which can be made again,
    need not be), then put it in place in one step.

    It may write to the file object, or to the file of its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name[:40]  # names have a limit
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{short}.", suffix=PARTIAL)
    os.close(handle)
    try:
        with Path(name).open("wb") as file:
            write(file)
            file.flush()
            if flush:
                os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes private files
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 in one step; bytes of file names that are no text become escapes."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, tree: Tree) -> None:
    """Write JSON in one step; NaN is refused."""
    write_text(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")


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
