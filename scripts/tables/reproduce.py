"""Reproduce a table of the paper: train what is missing, then print published numbers and ours.

python -m scripts.tables.reproduce 01 --data DIR     # DIR/mvtec, DIR/btad, ...; parts 01a, 01b, 01c

Finished runs are found and reused. Cells that were not run stay empty. --dry-run needs no data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import train as train_command
from datasets.loader import batches_per_epoch
from datasets.registry import SPECS
from evaluation.results import COLUMNS
from scripts import ROOT
from scripts.tables.spec import SPECS_DIR, Column, Table, load_table, printed, reported
from scripts.text import csv_text, markdown
from utils.cli import (
    EXTRA,
    SKIP,
    log,
    new_parser,
    overrides,
    print_result,
    run_command,
    user_path,
    when_stopped,
)
from utils.config import Config
from utils.errors import ConfigError, RunError
from utils.files import write_text
from utils.layers import load_config
from utils.runs import place_of
from utils.yaml_io import Tree

NAMES = COLUMNS | {
    "image_acc": "ACC*",
    "parameters_1024e6": "parameters / 1.024e9",
    "bottleneck_1024e6": "bottleneck / 1.024e9",
    "images_per_s": "images/s",
    "test_seconds": "test set, s",
}
SIZES = ("parameters_1024e6", "bottleneck_1024e6")
AS_THEY_ARE = (*SIZES, "images_per_s", "test_seconds")  # no percentages
UNSATURATED = ("pro_05", "aupimo")  # --extra-metrics aupimo adds both to every column that has regions
FAIR, APRIL = "ours, fair protocol", "ours, april-2025 protocol (not a fair protocol)"


@dataclass(frozen=True)
class Run:
    """One training: flags of train.py, and settings of the score that are applied afterwards."""

    dataset: str
    category: str
    flags: tuple[str, ...]
    seed: int
    score: tuple[str, ...] = ()


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what is not known here goes to train.py."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="+", help="01 to 12, unias or library; 01a for one part")
    add_run_flags(parser)
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="only these, from 1 (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="S", help="one run each")
    parser.add_argument(
        "--step-seconds", type=float, default=0.5, metavar="S", help="for the estimate of time"
    )
    parser.add_argument("--april", action="store_true", help="also the column of the unfair protocol")
    parser.add_argument(
        "--output", type=user_path, metavar="DIR", help="write <table>.md and .csv there (default: nowhere)"
    )
    return parser.parse_args(argv)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which runs, where they are, and how they are trained; figures have them, too."""
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="DIR",
        help="folder that holds the datasets by name (default: none; needed without --dry-run)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, train nothing, need no data")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--backbone", metavar="NAME", help="for every run (default: the published one)")
    parser.add_argument("--iterations", type=int, metavar="N", help="for every run (default: as published)")
    parser.add_argument(
        "--runs", type=user_path, default=ROOT / "checkpoints", metavar="DIR", help="run folders"
    )
    SKIP.add(parser, "skip-unreadable")
    EXTRA.add(parser, "extra-metrics", default="none")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every run"
    )


@when_stopped("the same command goes on from the last checkpoint")
def main(argv: Sequence[str]) -> None:
    """Run and print every part of the tables.

    Raises:
        ConfigError: for a table that does not exist, --data missing, or if no run is asked for.
    """
    args = parse_arguments(argv)
    known = [p.stem for p in sorted(SPECS_DIR.glob("*.yaml"))]
    for name in args.tables:
        if not any(stem.startswith(name) for stem in known):
            raise ConfigError(f"no table '{name}'; there are {', '.join(known)}")
    names = [stem for name in args.tables for stem in known if stem.startswith(name)]
    if args.data is None and not args.dry_run:
        raise ConfigError("where are the datasets? Give the folder that holds them with --data DIR")
    tables = [load_table(name) for name in names]
    planned = [list(dict.fromkeys(run for _, _, run in runs_of(table, args))) for table in tables]
    if not any(planned):
        raise ConfigError(f"no run of {', '.join(names)} is of these --datasets, --categories and --rows")
    for table, runs in zip(tables, planned, strict=True):
        if args.dry_run:
            print_result(listing(table, runs, args))
            continue
        for run in runs:
            train(run, args)
        text, rows = filled(table, args)
        print_result(text + "\n")
        if args.output is not None:
            write_text(args.output / f"table{table.name}.md", text + "\n")
            write_text(args.output / f"table{table.name}.csv", csv_text(rows))


# --- runs ---------------------------------------------------------------------------------------------------


def runs_of(table: Table, args: argparse.Namespace) -> Iterator[tuple[int, int, Run]]:
    """(row, column, run) for every run that the table needs, as far as the command line asks for it."""
    for i, row in enumerate(table.rows):
        if row.get("flags") is None or (args.rows and i + 1 not in args.rows):
            continue
        for j, column in enumerate(table.columns):
            if args.datasets and column.dataset not in args.datasets:
                continue
            flags = (*table.flags, *column.flags, *map(str, row["flags"]))
            one_model = "multi-class" in flags or "unias" in flags
            names = [c for c in column.categories if not args.categories or c in args.categories]
            for category in ["all"] if one_model and names else names:
                for seed in args.seeds:
                    yield i, j, Run(column.dataset, category, flags, seed, tuple(row.get("score", ())))


def command_of(run: Run, args: argparse.Namespace) -> list[str]:
    """The training command, without the score settings that are applied afterwards."""
    words = [sys.executable, str(ROOT / "train.py"), "--dataset", run.dataset]
    words += ["--data-root", str((args.data or Path("DIR")) / run.dataset), "--category", run.category]
    words += [*run.flags, "--seed", str(run.seed), "--output", str(args.runs)]
    words += ["--backbone", args.backbone] if args.backbone else []
    words += ["--iterations", str(args.iterations)] if args.iterations else []
    words += ["--skip-unreadable"] if args.skip_unreadable else []
    words += ["--extra-metrics", *args.extra_metrics] if args.extra_metrics else []
    return words + [word for setting in args.set for word in ("--set", setting)]


def train(run: Run, args: argparse.Namespace) -> None:
    """Train one run, or go on with it; a finished one is only reported by train.py.

    Raises:
        RunError: if it fails.
    """
    words = [*command_of(run, args), "--resume", *(["--quiet"] if args.quiet else [])]
    log.info("%s %s, seed %d: %s", run.dataset, run.category, run.seed, " ".join(run.flags))
    if subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode != 0:  # noqa: S603 (our own)
        raise RunError(f"this run failed; to see why: {' '.join(words)}")


def listing(table: Table, runs: Sequence[Run], args: argparse.Namespace) -> str:
    """What --dry-run says: the commands, and how long they take."""
    unique = dict.fromkeys(tuple(command_of(run, args)) for run in runs)
    steps = sum(_steps(command) for command in unique)
    hours = steps * args.step_seconds / 3600
    total = f"table {table.name}: {len(unique)} runs, {steps} steps, about {hours:.1f} hours"
    return "\n".join([*commands(runs, args), f"{total} at {args.step_seconds:g} s per step"])


def commands(runs: Sequence[Run], args: argparse.Namespace) -> list[str]:
    """The training commands as text, each once."""
    words = (["python train.py", *command_of(run, args)[2:]] for run in runs)
    return list(dict.fromkeys(" ".join(w) for w in words))


def _steps(command: Sequence[str]) -> int:
    config = _resolved(tuple(command))
    if config.model.name == "memory-bank":
        return 0
    if config.train.epochs is None:
        return config.train.iterations
    counts = SPECS[config.data.name].counts
    names = [config.data.category] if config.data.category in counts else list(counts)
    images = sum(c[0] or c[3] for c in (counts[n] for n in names))
    per_epoch = batches_per_epoch(images, config.train.batch_size, config.train.last_batch)
    return round(config.train.epochs * per_epoch) * len(config.train.scales)


@cache
def _resolved(command: tuple[str, ...]) -> Config:
    args = train_command.parse_arguments(command[2:])
    return load_config(args.config, overrides(args), category=args.category)


def folder_of(run: Run, args: argparse.Namespace) -> Path:
    """Where train.py keeps the run."""
    return place_of(_resolved(tuple(command_of(run, args))), args.runs)[1]


def _with_aupimo(args: argparse.Namespace) -> bool:
    return "aupimo" in (args.extra_metrics or ())


def results_of(run: Run, args: argparse.Namespace, protocol: str) -> Tree | None:
    """metrics.json of a finished run, evaluated with its score settings; None if there is none."""
    folder = folder_of(run, args)
    if not (folder / "metrics.json").is_file():
        return None
    tree = json.loads((folder / "metrics.json").read_text())
    extra = ["aupimo"] if _with_aupimo(args) and "aupimo" not in tree["results"]["mean"] else []
    if not run.score and not extra and protocol == "fair":
        return tree
    changed = [s.partition(".")[2].replace("=", "") for s in run.score]
    name = "-".join(["test-tables", *changed, *extra])
    path = folder / name / ("april-2025/metrics.json" if protocol != "fair" else "metrics.json")
    if not _evaluates(path, tree, folder):
        words = [sys.executable, str(ROOT / "test.py"), "--checkpoint", str(folder), "--quiet"]
        words += ["--overwrite", "--output", str(folder / name), "--protocol", protocol]
        words += [word for setting in run.score for word in ("--set", setting)]
        words += ["--extra-metrics", *extra] if extra else []
        subprocess.run(words, stdout=subprocess.DEVNULL, check=True)  # noqa: S603 (our own)
    return json.loads(path.read_text())


def _evaluates(path: Path, run: Tree, folder: Path) -> bool:
    """Whether metrics.json of an evaluation is there and of the model that is now in the run's folder."""
    if not path.is_file() or path.stat().st_mtime_ns < (folder / "last.pt").stat().st_mtime_ns:
        return False
    return json.loads(path.read_text()).get("identity") == run.get("identity")


# --- the table ----------------------------------------------------------------------------------------------


def _backbone(table: Table, args: argparse.Namespace) -> str:
    """The backbone of a table's runs."""
    first = next((run for _, _, run in runs_of(table, args)), None)
    if args.backbone or first is None:
        return args.backbone or "no run"
    return _resolved(tuple(command_of(first, args))).model.backbone


def filled(table: Table, args: argparse.Namespace) -> tuple[str, list[list[str]]]:
    """The table as Markdown, and as rows of text."""
    protocols = ["fair", *(["april-2025"] if args.april else [])]
    kinds = [
        "published",
        *(["reported by others"] if table.others else []),
        f"{FAIR} ({_backbone(table, args)}, seeds {', '.join(map(str, args.seeds))})",
        *([APRIL] if args.april else []),
    ]
    head = ["method", "column", "metric", *kinds]
    by_cell: dict[tuple[int, int], list[Run]] = {}
    for i, j, run in runs_of(table, args):
        by_cell.setdefault((i, j), []).append(run)
    lines = []
    for i, row in enumerate(table.rows):
        for j, column in enumerate(table.columns):
            if args.datasets and column.dataset not in args.datasets:
                continue
            runs = by_cell.get((i, j), [])
            by_protocol = [[results_of(run, args, protocol) for run in runs] for protocol in protocols]
            extra = UNSATURATED if _with_aupimo(args) and "pro" in column.metrics else ()
            blank = [None] * len(extra)  # nobody published these
            published, others = printed(table, row["name"], j) + blank, reported(table, row, j) + blank
            for k, metric in enumerate([*column.metrics, *extra]):
                cells = [_text(published[k])]
                cells += [_text(others[k])] if table.others else []
                cells += [_cell(runs, trees, column, metric, spread=table.spread) for trees in by_protocol]
                lines.append(
                    [str(row.get("ours") or row["name"]), column.title, NAMES.get(metric, metric), *cells]
                )
    others_rows = _methods_of_others(table, len(kinds) - 1)
    rows = [head, *others_rows, *lines]
    about = [f"{table.published['title']} ({table.published['source_table']}). Percent. Ours: "]
    about[0] += f"{args.iterations} steps" if args.iterations else "length as in the configs"
    about[0] += f", {', '.join(args.set)}" if args.set else ""
    sources = [f"Reported by others: {table.others['source']}."] if table.others else []
    notes = [f"- {note}" for note in [*sources, *table.notes]]
    return "\n\n".join([*about, markdown(rows), "\n".join(notes)]), rows


def _methods_of_others(table: Table, blanks: int) -> list[list[str]]:
    """Published rows of methods that we have no row for, with empty cells for the other kinds of numbers."""
    rows, ours, lines = table.published["rows"], {row["name"] for row in table.rows}, []
    for name in [] if isinstance(rows, list) else rows:
        for j, column in enumerate(table.columns if name not in ours else []):
            for k, metric in enumerate(column.metrics):
                value = printed(table, name, j)[k]
                if value is not None:
                    lines.append(
                        [name, column.title, NAMES.get(metric, metric), _text(value), *[""] * blanks]
                    )
    return lines


def _cell(
    runs: Sequence[Run], trees: Sequence[Tree | None], column: Column, metric: str, *, spread: bool
) -> str:
    """Mean over categories, then mean and spread over seeds; empty unless every run of a seed is there."""
    by_seed: dict[int, list[float | None]] = {}
    for run, tree in zip(runs, trees, strict=True):
        names = column.categories if run.category == "all" else (run.category,)
        for name in names:
            by_seed.setdefault(run.seed, []).append(None if tree is None else _value(tree, name, metric))
    means = [statistics.fmean(x for x in v if x is not None) for v in by_seed.values() if None not in v]
    if not means:
        return ""
    missing = len(column.categories) - len(next(iter(by_seed.values())))
    part = f" ({len(column.categories) - missing} of {len(column.categories)})" if missing else ""
    deviation = statistics.stdev(means) if len(means) > 1 else None
    if spread:
        return ("" if deviation is None else f"{deviation:.2f}") + part
    digits = 4 if metric in SIZES else 2  # a small backbone's bottleneck is some thousandths
    spread_text = "" if deviation is None else f" ± {deviation:.2f}"
    return f"{statistics.fmean(means):.{digits}f}{spread_text}{part}"


def _value(tree: Tree, category: str, metric: str) -> float | None:
    timing, values = tree["timing"], tree["results"].get(category, {})
    if metric not in AS_THEY_ARE:
        value = values.get(metric)
        return None if value is None else 100 * value
    images = values.get("n_normal", 0) + values.get("n_anomalous", 0)
    return {
        "parameters_1024e6": tree["parameters"] / 1.024e9,
        "bottleneck_1024e6": tree.get("bottleneck_parameters", 0) / 1.024e9 or None,
        "images_per_s": 1000 / timing["ms_per_image"],
        "test_seconds": images * timing["ms_per_image"] / 1000,
    }[metric]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


if __name__ == "__main__":
    sys.exit(run_command(main))
