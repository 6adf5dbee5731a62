"""Write the tables of README.md and docs/ that show files of results/measured, between their markers.

python -m scripts.tables.pages            # tests/test_pages.py fails where a page and its files differ
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.results import COLUMNS
from scripts.tables.accuracy_results import Row, read_rows
from scripts.text import markdown
from utils.cli import new_parser, print_result, run_command
from utils.files import write_text
from utils.yaml_io import read_yaml

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "results/measured"
PUBLISHED = ROOT / "results/published"
PAGES = ("README.md", "docs/RESULTS.md", "docs/RESULTS_MORE.md", "docs/RECIPE.md", "docs/ABLATIONS.md",
         "docs/LOG.md")  # fmt: skip
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
GROUP = ("category", "model", "flavor", "image_size", "iterations", "options")
Rows = list[Row]
Table = list[list[str]]

MODELS = {  # in the order of every table
    ("memory-bank", "default"): "memory bank",
    ("uninet", "paper"): "UniNet, paper",
    ("uninet", "released"): "UniNet, released",
    ("recontrast", "default"): "ReContrast",
    ("unias", "default"): "UniAS",
    ("remind", "default"): "**ReMIND (ours)**",
}
TITLES = {"bottle": "bottle", "screw": "screw", "kolektor": "KolektorSDD", "ped2": "Ped2"}
IN_COLUMNS = r"--set '?data\.image_size=\S+|--setting \w+|--set|'"  # options that have a column or table
IMAGE = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pro")
FRAME = ("frame_auroc_micro", "frame_auroc_macro", "pixel_auroc", "pixel_ap", "pro")
STRICT = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pro", "pro_05", "aupimo")
ALL_KINDS = "data.synthetic_kinds=[texture,scratch,stain,cut]"


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of fractions, in percent."""
    deviation = f"±{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def options_of(row: Row) -> str:
    """The options of train.py that neither a column nor a table's title says, by the names of today."""
    options = re.sub(IN_COLUMNS, "", row["options"]).replace("data.motion", "data.stack_frames")
    return " ".join(options.split())


def grouped(rows: Rows) -> list[Rows]:
    """The rows that are equal but for the seed; datasets as in the file, models as in MODELS."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in GROUP), []).append(row)
    categories, models = list(dict.fromkeys(row["category"] for row in rows)), list(MODELS)

    def place(key: tuple[str, ...]) -> tuple[object, ...]:
        category, model, flavor, size, iterations, options = key
        return categories.index(category), models.index((model, flavor)), size, int(iterations or 0), options

    return [groups[key] for key in sorted(groups, key=place)]


def accuracy(rows: Rows, metrics: Sequence[str]) -> Table:
    """One row per group: what was trained for how long and where, and the metrics over its seeds."""
    table = [["data", "size", "model", "steps", "seeds", "on", *(COLUMNS[m] for m in metrics)]]
    for group in grouped(rows):
        first = group[0]
        options = options_of(first)
        title = MODELS[first["model"], first["flavor"]] + (f", `{options}`" if options else "")
        on = "+".join(sorted({"GPU" if "NVIDIA" in row["device"] else "CPU" for row in group}))
        about = [
            TITLES.get(first["category"], first["category"]),
            first["image_size"],
            title,
            first["iterations"] or "-",
        ]
        table.append([*about, str(len(group)), on, *(_cell(group, m) for m in metrics)])
    return table


def _cell(group: Rows, metric: str) -> str:
    values = [row[metric] for row in group]
    return "" if "" in values else spread([float(v) for v in values])


def shipped(rows: Rows, category: str, pair: tuple[str, str]) -> Rows:
    """The seeds of one cell of README.md: the configuration as it ships, of its runs the longest."""
    groups = [
        g
        for g in grouped(rows)
        if g[0]["category"] == category
        and (g[0]["model"], g[0]["flavor"]) == pair
        and not options_of(g[0]).startswith(ALL_KINDS)
        and len(g) >= 3
    ]
    return min(groups, key=lambda g: (len(g[0]["options"]), -int(g[0]["iterations"] or 0)), default=[])


def small(rows: Rows) -> Table:
    """README.md's table: image AUROC / PRO of each model, on Ped2 the frame AUROC; published values below."""
    table = [["model", *TITLES.values()]]
    for pair, name in MODELS.items():
        if name == "UniAS":
            continue
        cells = []
        for category in TITLES:
            seeds = shipped(rows, category, pair)
            metrics = ("frame_auroc_micro",) if category == "ped2" else ("image_auroc", "pro")
            cells.append(" / ".join(_cell(seeds, m) for m in metrics) if seeds else "")
        table.append([name, *cells])
    options = f"{ALL_KINDS} loss.terms=[adapt]"
    not_told = [row for row in rows if row["category"] == "kolektor" and options_of(row) == options]
    values = " / ".join(_cell(not_told, m) for m in ("image_auroc", "pro"))
    table.append(["ReMIND, not told, `adapt`", "", "", values, ""])
    mvtec = read_yaml(PUBLISHED / "table06a_mvtec_per_category.yaml")["rows"]["UniNet"]
    cells = [f"{mvtec[c][0]} / {mvtec[c][2]}" for c in ("Bottle", "Screw")]
    ped2 = read_yaml(PUBLISHED / "table02b_ped2.yaml")["rows"]["UniNet"]["Ped2"][0]
    table.append(["UniNet, published", *cells, "", str(ped2)])
    rerun = read_yaml(PUBLISHED / "anomalib_uninet_mvtec.yaml")["rows"]["anomalib UniNet"]
    cells = [f"{100 * rerun[c][0]:.1f}" for c in ("Bottle", "Screw")]
    return [*table, ["UniNet, rerun by anomalib", *cells, "", ""]]


# --- of other files than accuracy.csv -----------------------------------------------------------------------


def of_runs(rows: Sequence[tuple[str, str, Sequence[str]]], metrics: Sequence[str]) -> Table:
    """One row per (data, model, names of settings/NAME.json); of several files the mean."""
    table = [["data", "model", *(COLUMNS[m] for m in metrics)]]
    for data, model, names in rows:
        trees = [json.loads((MEASURED / f"settings/{n}.json").read_text())["results"]["mean"] for n in names]
        cells = [f"{100 * statistics.fmean(t[m] for t in trees):.1f}" for m in metrics]
        table.append([data, model, *cells])
    return table


def supervised(rows: Rows) -> Table:
    """KolektorSDD at 320x128 with 20 of its defects in training; `rows` are those of accuracy.csv."""
    names = {
        "memory bank, not supervised": "kolektor-320x128-memory-bank-32",
        "UniNet, released": "kolektor-supervised-320x128-uninet-released",
    }
    table = of_runs([("KolektorSDD", model, [name]) for model, name in names.items()], IMAGE)
    seeds = [row for row in rows if row["setting"] == "supervised"]
    return [*table, ["KolektorSDD", "**ReMIND (ours)**", *(_cell(seeds, m) for m in IMAGE)]]


def polyps() -> Table:
    """Supervised segmentation of CVC-ClinicDB."""
    splits = {"random frames": "random", "whole sequences held out": "sequence"}
    models = {"UniNet, paper": "paper", "UniNet, paper, teacher learns": "paper-teacher"}
    rows = [
        (data, title, [f"clinicdb-supervised-{split}-uninet-{name}"])
        for data, split in splits.items()
        for title, name in models.items()
    ]
    return of_runs(rows, ("dsc", "miou"))


def several() -> Table:
    """One model for bottle, screw and KolektorSDD beside one each."""
    names = {"UniNet, released": "uninet-released", "memory bank": "memory-bank"}
    rows: list[tuple[str, str, list[str]]] = []
    for model, name in names.items():
        each = [f"mixed-one-class-{category}-{name}" for category in ("bottle", "screw", "kolektor")]
        rows += [("one each", model, each), ("one for all", model, [f"mixed-multi-class-{name}"])]
    return of_runs(rows, ("image_auroc", "pixel_auroc", "pixel_ap", "pro"))


def steps() -> Table:
    """From the paper's variant to ReMIND, each row with all changes above it."""
    metrics = ("image_auroc", "pixel_auroc", "pixel_ap", "pro")
    validation = read_rows(MEASURED / "remind/steps.csv")
    table = [["each row adds", "validation", "test", "training"]]
    for test, row in zip(read_csv("remind/steps-test.csv"), validation, strict=True):
        first = " / ".join(f"{100 * float(row[m]):.1f}" for m in metrics)
        second = " / ".join(test[m] for m in metrics)
        table.append([test["row"], first, second, f"{float(row['train_s']):.0f} s"])
    return table


def robustness() -> Table:
    """Training on few images, and with defects among them: image AUROC / pixel AUROC / pixel AP / PRO."""
    metrics = ("image_auroc", "pixel_auroc", "pixel_ap", "pro")
    models = {"remind": "ReMIND", "no bank": "ReMIND without its bank", "memory-bank": "memory bank"}
    found: dict[str, dict[str, str]] = {}
    for row in read_rows(MEASURED / "remind/robustness.csv"):
        limit = re.search(r"train_limit=(\d+)", row["options"])
        category, _, percent = row["category"].partition("-")
        what = f"{limit[1]} images" if limit else f"{int(percent)} % of the images show a defect"
        values = " / ".join(f"{100 * float(row[m]):.1f}" for m in metrics)
        model = "no bank" if "model.bank_fraction=0" in row["options"].split() else row["model"]
        found.setdefault(f"{category}, {what}", {})[model] = values
    lines = [[data, *(cells.get(model, "") for model in models)] for data, cells in found.items()]
    return [["trained on", *models.values()], *lines]


def ablation(*numbers: str) -> Table:
    """The paper's tables of these numbers beside ours on bottle and screw: slice/CATEGORY/tableNUMBER.csv."""
    titles = ("published", "bottle", "screw")
    table = [["table", "variant", *titles]]
    for number in numbers:
        cells: dict[str, dict[str, list[str]]] = {}
        for category in ("bottle", "screw"):
            for row in read_csv(f"slice/{category}/table{number}.csv"):
                *_, published, ours = row.values()
                if "AUROC" in row["metric"] or row["metric"] == "PRO":
                    cell = cells.setdefault(row["method"], {title: [] for title in titles})
                    cell[category].append(f"{float(ours.split()[0]):.1f}")
                    if category == "screw" and published:
                        cell["published"].append(f"{float(published):.1f}")
        for method, cell in cells.items():
            table.append([number.lstrip("0"), method, *(" / ".join(values) for values in cell.values())])
    empty = all(row[2] == "" for row in table[1:])  # the paper has Tables 5 and 12 for other datasets
    return [[*row[:2], *row[3:]] for row in table] if empty else table


def speed() -> Table:
    """README.md's rows of benchmarks/: fp32, in the peer's shape.

    Times are of each file's first table, ratios from the lowest to the highest of all its tables.
    """
    shown = {"training step, batch 8": "training step", "one image, batch 1": "one image"}
    table = [["what", "ours", "anomalib", "ratio"]]
    for name, device in (("RESULTS.md", "CPU"), ("GPU.md", "GPU")):
        text = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
        found: dict[str, list[list[float]]] = {}
        for row in (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")):
            if row[0] in shown and row[1:3] == ["peer", "fp32"] and row[4]:
                found.setdefault(row[0], []).append([float(cell) for cell in row[3:6]])
        for what, measured in found.items():
            (ours, peer, _), ratios = measured[0], sorted({f"{ratio:.1f}" for *_, ratio in measured})
            span = " to ".join(ratios[:: max(1, len(ratios) - 1)])
            table.append([f"{shown[what]}, {device}", _time(ours), _time(peer), span])
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds > 0.1 else f"{1000 * seconds:.3g} ms"


def read_csv(name: str) -> Rows:
    """The rows of a file of results/measured."""
    with (MEASURED / name).open(newline="") as file:
        return list(csv.DictReader(file))


# --- pages --------------------------------------------------------------------------------------------------


def tables(rows: Rows) -> dict[str, Callable[[], Table]]:
    """Every table by the name in its marker; `rows` are those of accuracy.csv."""
    one_class = [row for row in rows if row["setting"] == "one-class"]
    short = [row for row in one_class if row["image_size"] in ("128x128", "320x128")]
    full = [row for row in one_class if row not in short]
    video = [row for row in full if row["dataset"] == "ped2"]
    transistor = [row for row in full if row["category"] == "transistor"]
    large = [row for row in full if row["image_size"] == "384x384"]
    others = [row for row in full if row not in (*video, *transistor, *large)]
    no_bank = [row for row in others if "model.bank_fraction=0" in row["options"].split()]
    images = [row for row in others if row not in no_bank]
    return {
        "small": lambda: small(full),
        "images": lambda: accuracy(images, IMAGE),
        "large": lambda: accuracy(large, IMAGE),
        "no_bank": lambda: accuracy(no_bank, IMAGE),
        "video": lambda: accuracy(video, FRAME),
        "transistor": lambda: accuracy(transistor, IMAGE),
        "short": lambda: accuracy(short, STRICT),
        "supervised": lambda: supervised(rows),
        "polyps": polyps,
        "several": several,
        "steps": steps,
        "robustness": robustness,
        "speed": speed,
        "parts": lambda: ablation("04", "10", "09"),
        "decisions": lambda: ablation("05", "12"),
    }


def filled(text: str, rows: Rows) -> str:
    """The page with each marked table written anew.

    Raises:
        ValueError: if a marker names no table.
    """
    known = tables(rows)

    def table_of(match: re.Match[str]) -> str:
        if match[2] not in known:
            raise ValueError(f"no table is called '{match[2]}'; there are {', '.join(known)}")
        lines = (line.strip("| ") for line in markdown(known[match[2]]()).splitlines())
        return "\n".join([match[1], *lines, "", match[3]])

    return MARKED.sub(table_of, text)


def main(argv: Sequence[str]) -> None:
    """Write all pages."""
    new_parser(__doc__.split("\n")[0]).parse_args(argv)
    rows = read_rows(MEASURED / "accuracy.csv")
    for name in PAGES:
        write_text(ROOT / name, filled((ROOT / name).read_text(encoding="utf-8"), rows))
    print_result(f"written: {', '.join(PAGES)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
