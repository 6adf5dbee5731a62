"""results/measured/accuracy.csv: one row per run, their means and deviations, and measured times."""

from __future__ import annotations

import csv
import io
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from evaluation.results import COLUMNS
from scripts.tables.collect import portable
from scripts.text import markdown
from utils.config import Config
from utils.files import write_text
from utils.yaml_io import Tree

KEY = (
    "dataset", "category", "model", "flavor", "backbone", "setting", "image_size", "iterations", "options",
    "seed",
)  # fmt: skip
REST = (
    *COLUMNS, "ms_per_image", "train_s", "parameters", "batch_size", "precision", "device", "code", "command",
)  # fmt: skip
Row = dict[str, str]


def key_of(config: Config, options: Sequence[str]) -> Row:
    """What identifies a cell: what is trained on what, for how long, and any further options of train.py."""
    data, model = config.data, config.model
    steps = "" if model.name == "memory-bank" else str(config.train.iterations)
    size = "x".join(map(str, data.image_size))
    values = (data.name, data.category, model.name, model.flavor, model.backbone, model.setting, size, steps)
    return dict(zip(KEY, (*values, shlex.join(options), str(config.train.seed)), strict=True))


def row_of(key: Row, tree: Tree, batch_size: int) -> Row:
    """The row of a finished run: `tree` is its metrics.json. Metrics are fractions, empty where undefined."""
    values = tree["results"]["mean" if key["category"] == "all" else key["category"]]
    metrics = {name: values.get(name) for name in COLUMNS}
    timing = {name: tree["timing"].get(name) for name in ("ms_per_image", "train_s")}
    about = {
        "parameters": tree["parameters"],
        "batch_size": batch_size,
        "precision": tree["protocol"]["precision"],
        "device": tree["versions"]["device"],
        "code": tree["versions"]["code"],
        "command": portable(tree["command"]),
    }
    cells = metrics | timing | about
    return key | {
        k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in cells.items()
    }


def read_rows(path: Path) -> list[Row]:
    """All rows; none where there is no file yet.

    Raises:
        ValueError: if it is no such file.
    """
    if not path.is_file():
        return []
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    missing = [name for name in KEY if rows and name not in rows[0]]
    if missing:
        raise ValueError(
            f"{path} has no column '{missing[0]}'; it is not a file of scripts/tables/accuracy.py"
        )
    return rows


def append_row(path: Path, row: Row, *, lock: Path) -> None:
    """Add a row in one step; several commands may do so at once. Columns of an older file stay."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        rows = [*read_rows(path), row]
        names = list(dict.fromkeys([*KEY, *REST, *(name for r in rows for name in r)]))
        text = io.StringIO()
        table = csv.DictWriter(text, names, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(path, text.getvalue())


def identity(row: Row) -> tuple[str, ...]:
    """The values of KEY."""
    return tuple(row[name] for name in KEY)


# --- the table ----------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean and standard deviation over seeds, in percent, one row per category and model.

    Where a model has several categories of a dataset, a row of their mean follows: over the categories first,
    then over the seeds that have all of them.
    """
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in sorted(rows, key=identity):
        name = tuple(row[k] for k in KEY if k not in ("category", "seed"))
        groups.setdefault(name, {}).setdefault(row["category"], []).append(row)
    shown = [k for k in COLUMNS if any(row.get(k) for row in rows)]
    names = [COLUMNS[k] for k in shown]
    about = ["dataset", "category", "model", "backbone", "size", "steps", "seeds"]
    lines = [[*about, *names, "ms per image", "parameters, M"]]
    for name, by_category in groups.items():
        parts = dict(by_category)
        if len(parts) > 1:
            parts[f"mean of {len(parts)}"] = _means(by_category, (*shown, "ms_per_image", "parameters"))
        for category, part in parts.items():
            lines.append(_line(name, category, part, shown))
    return markdown(lines)


def _means(by_category: dict[str, list[Row]], columns: Sequence[str]) -> list[Row]:
    """One row per seed that every category has: means over the categories, empty where one has no value."""
    by_seed: dict[str, list[Row]] = {}
    for row in (row for part in by_category.values() for row in part):
        by_seed.setdefault(row["seed"], []).append(row)
    means = []
    for seed, part in by_seed.items():
        if len({row["category"] for row in part}) == len(by_category):
            values = {k: [row.get(k, "") for row in part] for k in columns}
            filled = {k: "" if "" in v else str(statistics.fmean(map(float, v))) for k, v in values.items()}
            means.append({"seed": seed} | filled)
    return means


def _line(name: tuple[str, ...], category: str, rows: Sequence[Row], shown: Sequence[str]) -> list[str]:
    dataset, model, flavor, backbone, setting, size, steps, options = name
    title = {"remind": "ReMIND (ours)"}.get(model, model) + ("" if flavor == "default" else f", {flavor}")
    title += "" if setting == "one-class" else f", {setting}"
    title += f", `{options}`" if options else ""
    values = [_spread([row.get(k, "") for row in rows], 100, 2) for k in shown]
    ms = _spread([row.get("ms_per_image", "") for row in rows], 1, 1)
    parameters = _spread([row.get("parameters", "") for row in rows[:1]], 1e-6, 1)
    seeds = ", ".join(sorted({row["seed"] for row in rows}, key=int))
    return [dataset, category, title, backbone, size, steps or "-", seeds, *values, ms, parameters]


def _spread(values: Sequence[str], factor: float, digits: int) -> str:
    numbers = [factor * float(v) for v in values if v]
    if not numbers:
        return ""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{deviation}"


# --- times --------------------------------------------------------------------------------------------------

Speed = tuple[str, str, str, str]  # model, backbone, size, device


def measured_steps(rows: Sequence[Row], folder: Path) -> dict[Speed, float]:
    """Median seconds per step by model, backbone, image size and device, of rows and metrics.json copies."""
    by_speed: dict[Speed, list[float]] = {}
    for row in rows:
        if row["iterations"] and row.get("train_s"):
            speed = (row["model"], row["backbone"], row["image_size"], row["device"])
            by_speed.setdefault(speed, []).append(float(row["train_s"]) / int(row["iterations"]))
    for path in sorted(folder.rglob("*.json")):
        tree = json.loads(path.read_text())
        seconds = tree.get("timing", {}).get("s_per_iteration")
        if seconds:
            words = tree["command"].split()
            model, backbone = (
                words[words.index(flag) + 1] if flag in words else default
                for flag, default in (("--model", "uninet"), ("--backbone", "wide_resnet50_2"))
            )
            size = "x".join(map(str, tree["protocol"]["image_size"]))
            by_speed.setdefault((model, backbone, size, tree["versions"]["device"]), []).append(seconds)
    return {speed: statistics.median(seconds) for speed, seconds in by_speed.items()}
