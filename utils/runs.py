"""Run folders: their names, their lock, and files that are never half-written."""

from __future__ import annotations

import copy
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

from datasets.files import printable
from utils.config import Config, Tree

# settings that change where, how fast or how often, or add a metric, but not the result
IRRELEVANT = {
    "data": ("root", "cache_gb", "workers"),
    "train": ("device", "seed", "log_every", "save_every"),
    "eval": ("batch_size", "aupimo", "dsc_unias"),
}


PARTIAL = ".partial"  # end of the names of temporary files


class RunError(RuntimeError):
    """A run folder is in use, finished or unfinished where it must not be; the message says what to do."""


def config_hash(config: Config) -> str:
    """Six characters over every setting that changes the result (the seed stands beside them in the name)."""
    return hashlib.sha256(json.dumps(_relevant(config), sort_keys=True).encode()).hexdigest()[:6]


def differences(old: Config, new: Config) -> list[str]:
    """Settings that change the result, seed included, and differ, as "section.key (old, now new)"."""
    before, after = _relevant(old, seed=True), _relevant(new, seed=True)
    return [
        f"{section}.{key} ({before[section][key]}, now {value})"
        for section, values in after.items()
        for key, value in values.items()
        if before[section][key] != value
    ]


def _relevant(config: Config, *, seed: bool = False) -> Tree:
    tree = copy.deepcopy(config.to_dict())
    for section, keys in IRRELEVANT.items():
        for key in keys:
            if not (seed and key == "seed"):
                del tree[section][key]
    return tree


def run_folder(config: Config, output: Path, name: str | None = None) -> Path:
    """<output>/<dataset>/<setting>/<category>/<model>-<flavor>-<backbone>-<hash>-s<seed>."""
    model = config.model
    own = f"{model.name}-{model.flavor}-{model.backbone}-{config_hash(config)}-s{config.train.seed}"
    return output / config.data.name / model.setting / printable(config.data.category) / (name or own)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Hold the folder for this process; made if missing. Temporary files of a killed process are removed.

    Raises:
        RunError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{folder} is in use by another process; wait for it or choose another --name"
            ) from error
        for left in folder.glob(f".*{PARTIAL}"):
            left.unlink()
        yield folder


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
