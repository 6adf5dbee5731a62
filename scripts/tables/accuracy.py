"""Fill the table of accuracy: datasets x models x seeds of accuracy.yaml, one command, resumable.

python -m scripts.tables.accuracy --data mvtec=DIR kolektor=DIR [--jobs 4] [--dry-run | --table]

Cells with a row in results/measured/accuracy.csv are skipped, finished run folders are only entered there,
unfinished ones go on from their last checkpoint. A cell that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import train as train_command
from datasets.registry import SPECS
from scripts import ROOT
from scripts.tables.accuracy_results import (
    Row,
    append_row,
    identity,
    key_of,
    measured_steps,
    read_rows,
    row_of,
    table,
)
from utils.cli import log, new_parser, overrides, print_result, run_command, user_path, when_stopped
from utils.config import Config
from utils.device import choose_device, choose_precision, versions
from utils.errors import ConfigError, DatasetError, RunError
from utils.layers import load_config
from utils.runs import finished_results, place_of
from utils.yaml_io import Tree, read_yaml

SPEC = ROOT / "scripts/tables/accuracy.yaml"
MEASURED = ROOT / "results/measured"
SAVE_EVERY = 200  # steps between checkpoints: what a kill can cost


@dataclass(frozen=True)
class Cell:
    """One run: the words of its train.py command, its configuration, and what identifies its row."""

    words: tuple[str, ...]
    config: Config
    key: Row
    folder: Path


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=DIR", help="folders of the datasets")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the cells and their time, train nothing")
    what.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--spec", type=user_path, default=SPEC, metavar="FILE", help="the cells")
    parser.add_argument(
        "--csv", type=user_path, default=MEASURED / "accuracy.csv", metavar="FILE", help="results"
    )
    parser.add_argument(
        "--runs", type=user_path, default=ROOT / "checkpoints", metavar="DIR", help="run folders"
    )
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these of --spec (default: all)")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these of --spec (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="S", help="one run each (default: those of --spec)"
    )
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", metavar="NAME", help="of every cell")
    parser.add_argument("--iterations", type=int, metavar="N", help="of each run (default: as --spec says)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="cells at once (default: 4 on a GPU, 1 on a CPU)"
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="where to compute")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of training")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every cell"
    )
    return parser.parse_args(argv)


@when_stopped("the same command goes on from the last checkpoint")
def main(argv: Sequence[str]) -> None:
    """Run what is missing, then print the table.

    Raises:
        ConfigError: for an unknown name, a folder that is not NAME=DIR, or rows of another precision.
        RunError: if a cell failed, after the others were run.
    """
    args = parse_arguments(argv)
    roots = dict(_root(text) for text in args.data)
    rows = read_rows(args.csv)
    if args.table:
        print_result(table(rows))
        return
    if not roots and not args.dry_run:
        raise ConfigError("where are the datasets? Give each folder as --data NAME=DIR; --dry-run needs none")
    planned = list(cells(read_yaml(args.spec), roots, args))
    if args.precision != "auto":
        _check_precision(planned, rows, args.csv)
    there = {identity(row) for row in rows}
    missing = [cell for cell in planned if identity(cell.key) not in there]
    log.info("%d cells, %d of them finished before", len(planned), len(planned) - len(missing))
    if planned and not missing:
        log.warning(
            "nothing to train: all rows are in %s; --csv NEW.csv starts a table of your own", args.csv
        )
    if args.dry_run:
        print_result(listing(missing, rows, device=args.device))
        return
    failed = run_all(missing, args)
    print_result(table(read_rows(args.csv)))
    if failed:
        raise RunError(f"{len(failed)} of {len(missing)} cells failed; to see why: {failed[0]}")


def _check_precision(planned: Sequence[Cell], rows: Sequence[Row], path: Path) -> None:
    """A row does not stand for a run of another precision."""
    asked = {identity(cell.key): cell.config.train.precision for cell in planned}
    for row in rows:
        if (precision := asked.get(identity(row), row["precision"])) != row["precision"]:
            same = f"{path} has this run of {row['category']} in {row['precision']}"
            raise ConfigError(f"{same}, and {precision} is asked for; --csv NEW.csv starts another table")


def _root(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder or name not in SPECS:
        raise ConfigError(f"--data takes NAME=DIR with a name of {', '.join(SPECS)}; found '{text}'")
    return name, Path(folder).expanduser().resolve()


# --- cells --------------------------------------------------------------------------------------------------


def cells(spec: Tree, roots: dict[str, Path], args: argparse.Namespace) -> Iterator[Cell]:
    """Every cell of the file that the command line asks for and whose data is there, seed by seed."""
    # decided once here: the probe behind `auto` could differ from run to run
    args.machine = choose_precision("auto", choose_device(args.device))
    chosen = _chosen(spec["datasets"], args.datasets, "dataset")
    models = _chosen(spec["models"], args.models, "model")
    places = [(entry, c) for name, entry in _entries(chosen) for c in _categories(name, entry, roots, args)]
    if lacking := set(args.categories or ()) - {c for _, c in places}:
        message = f"no category to run is named {', '.join(sorted(lacking))}"
        if not places:
            raise ConfigError(f"{message}; --dry-run without --categories lists those that there are")
        log.warning("%s", message)
    for seed in args.seeds or spec["seeds"]:
        for entry, category in places:
            for name, flags in models.items():
                if name in entry.get("models", models):
                    yield _cell(entry, category, flags, seed, roots=roots, args=args)


def _chosen(entries: Tree, names: Sequence[str] | None, kind: str) -> Tree:
    unknown = [name for name in names or [] if name not in entries]
    if unknown:
        raise ConfigError(f"no {kind} '{unknown[0]}' in the file; there are {', '.join(entries)}")
    return {name: entry for name, entry in entries.items() if not names or name in names}


def _entries(datasets: Tree) -> Iterator[tuple[str, Tree]]:
    for title, entry in datasets.items():
        name = (entry or {}).get("config", title)
        yield name, {"config": name, **(entry or {})}


def _categories(name: str, entry: Tree, roots: dict[str, Path], args: argparse.Namespace) -> list[str]:
    """The categories to run; those without data are left out with a line."""
    names = [str(c) for c in entry.get("categories", SPECS[name].counts)]
    names = [c for c in names if not args.categories or c in args.categories]
    if args.dry_run and not roots:
        return names
    if name not in roots:
        log.info("%s is skipped: no --data %s=DIR", name, name)
        return []
    present = SPECS[name].list_categories(roots[name])
    lacking = [c for c in names if c != "all" and c not in present]
    if lacking:
        log.info("%s: not in %s and skipped: %s", name, roots[name], ", ".join(lacking))
    return [c for c in names if c not in lacking]


def _cell(
    entry: Tree,
    category: str,
    flags: Sequence[str],
    seed: int,
    *,
    roots: dict[str, Path],
    args: argparse.Namespace,
) -> Cell:
    name = entry["config"]
    options = [*map(str, entry.get("flags", [])), *(w for s in args.set for w in ("--set", s))]
    words = ["--dataset", name, "--data-root", str(roots.get(name, "DIR"))]
    words += ["--category", category, *map(str, flags), "--backbone", args.backbone, "--seed", str(seed)]
    words += ["--iterations", str(args.iterations or entry["iterations"]), *options]
    # AUPIMO costs little, and tells models apart where the other metrics are saturated
    words += ["--extra-metrics", "aupimo", *(["dsc_unias"] if "unias" in flags else [])]
    words += ["--device", args.device]
    open_choice = _config(words).train.precision == "auto"
    asked = [*words, "--precision", args.precision] if open_choice else words
    config, folder = place_of(_config(asked), args.runs.resolve(), machine=args.machine)
    words += ["--precision", config.train.precision] if open_choice else []
    return Cell(tuple(words), config, key_of(config, options), folder)


def _config(words: Sequence[str]) -> Config:
    parsed = train_command.parse_arguments(words)
    return load_config(ROOT / parsed.config, overrides(parsed), category=parsed.category)


def listing(missing: Sequence[Cell], rows: Sequence[Row], *, device: str) -> str:
    """What --dry-run says: one line per cell, with minutes where this machine has measured such a step."""
    speeds, machine = measured_steps(rows, MEASURED), versions(choose_device(device))["device"]
    lines, known, unknown = [], 0.0, 0
    for cell in missing:
        key, shown = cell.key, "no steps"
        if key["iterations"]:
            step = speeds.get((key["model"], key["backbone"], key["image_size"], machine))
            seconds = (step or 0) * int(key["iterations"])
            shown = f"{seconds / 60:.0f} min" if step else "time unknown"
            known, unknown = known + seconds, unknown + (step is None)
        lines.append(f"{shown}: python train.py {shlex.join(cell.words)}")
    total = f"about {known / 3600:.1f} hours of training on {machine}, one at a time"
    return "\n".join([*lines, f"{len(missing)} cells to run: {total}; {unknown} of unknown time"])


# --- running ------------------------------------------------------------------------------------------------


def run_all(missing: Sequence[Cell], args: argparse.Namespace) -> list[str]:
    """Run the cells, several at once; enter each as it ends. Returns the commands of those that failed."""
    jobs = args.jobs or (4 if choose_device(args.device).type == "cuda" else 1)
    running: list[subprocess.Popen] = []
    failed = []
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(run_cell, cell, running, jobs, args.quiet): cell for cell in missing}
    try:
        for future in as_completed(futures):
            cell = futures[future]
            problem = future.result()
            if problem:
                failed.append(f"python train.py {shlex.join(cell.words)}")
                log.error("failed: %s (%s)", cell.folder, problem)
                continue
            tree = json.loads((cell.folder / "metrics.json").read_text())
            row = row_of(cell.key, tree, cell.config.train.batch_size)
            append_row(args.csv, row, lock=args.runs / ".accuracy.lock")
            log.info("done: %s", cell.folder)
    finally:
        for future in futures:
            future.cancel()
        for process in running:
            if process.poll() is None:
                process.terminate()  # train.py keeps its last checkpoint
        pool.shutdown()
    return failed


def run_cell(cell: Cell, running: list[subprocess.Popen], jobs: int, quiet: bool) -> str:
    """Train and evaluate a cell, or go on with it; returns the last line of what went wrong, or nothing."""
    if (cell.folder / "metrics.json").is_file():
        try:
            finished_results(cell.folder, train_command.contents(cell.config)[2])
        except (RunError, DatasetError) as error:
            return str(error)
        return ""
    words = [sys.executable, "train.py", *cell.words, "--output", str(cell.folder.parents[3]), "--resume"]
    words += ["--save-every", str(SAVE_EVERY), *(["--quiet"] if quiet or jobs > 1 else [])]
    env = dict(os.environ)
    if jobs > 1:  # each process would otherwise take all cores
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    process = subprocess.Popen(  # noqa: S603 (our own)
        words,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if jobs > 1 else None,
    )
    running.append(process)
    _, errors = process.communicate()
    if process.returncode == 0:
        return ""
    return (errors or "").strip().rpartition("\n")[2] or f"exit code {process.returncode}"


if __name__ == "__main__":
    sys.exit(run_command(main))
