"""What a command writes: its folder, metrics.json, scores.csv, and the table on the screen."""

import csv
import hashlib
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import nn

from datasets.registry import SPECS
from evaluation.metrics import Results
from evaluation.scoring import Scores
from utils.checkpoint import FILE as CHECKPOINT
from utils.config import Config
from utils.device import choose_device, versions
from utils.errors import DatasetError, RunError
from utils.files import printable, relative_to, write_json, write_text
from utils.runs import RESULTS, UNFINISHED, git_sha
from utils.yaml_io import Tree

LONGEST_NAME = 255  # bytes, of most file systems
SCORES = "scores.csv"
WATCH = "watch.json"  # of predict.py --watch: what its rows go with
WRITTEN = (  # by test.py and predict.py, below --output
    SCORES, "skipped.csv", "metrics.json", "report.html", "heatmaps.png", "clips.png", "heatmaps", "maps",
    "masks", "april-2025", WATCH, UNFINISHED,
)  # fmt: skip


def protocol_notes(config: Config, step: int | None = None) -> list[str]:
    """What a reader must know about the numbers of the table, of the state after `step` (None: the last)."""
    split, select = config.eval.split, config.eval.select
    text = [f"evaluated on: {split}; selection: {select}; nothing shared between images"]
    if select == "best":
        text.append("NOT A FAIR PROTOCOL: the best of several evaluations on the test set itself was kept")
    if split == "validation":
        real = SPECS[config.data.name].segmentation
        made = "images of their own" if real else "held-out training normals with synthetic defects"
        if config.model.setting == "supervised" and not real:
            made = "held-out training images, anomalous ones too where enough are known"
        text.append(f"validation: {made}, for choosing settings only")
    if step is not None and _stopped(config, step):
        text.append(f"NOT A FAIR PROTOCOL: the state of step {step} of {config.train.iterations}")
    return text


def _stopped(config: Config, step: int) -> bool:
    return step < config.train.iterations and config.eval.select == "last"


def protocol(config: Config, across_images: str, step: int) -> dict[str, object]:
    """What the numbers depend on besides the model, which is as of `step`."""
    return {
        "select": config.eval.select,
        "evaluated_on": config.eval.split,
        "across_images": across_images,
        "fair": config.eval.select == "last" and across_images == "none" and not _stopped(config, step),
        "image_size": list(config.data.image_size),
        "resize": config.data.resize,
        "center_crop": config.data.center_crop,
        "iterations": step,
        "seed": config.train.seed,
        "precision": config.train.precision,
        "scored_in": config.run.eval_precision,
        "score": asdict(config.score),
        "f1_and_acc_threshold": "best on the evaluated images",
    }


def write_results(
    folder: Path,
    config: Config,
    results: dict[str, Results],
    *,
    command: str,
    timing: Mapping[str, float | None],
    model: nn.Module,
    identity: Tree | None,
    step: int,
    across_images: str = "none",
    curve: Sequence[dict[str, object]] = (),
) -> None:
    """Write metrics.json in one step; metrics are fractions, null where undefined.

    model: as of `step`, of the run with this `identity`; its parameters are counted, those of its bottleneck,
    too (Table 9). curve: evaluations during training, each with its iteration, split and mean results.
    """
    parts = {"parameters": model, "bottleneck_parameters": getattr(model, "bottleneck", None)}
    tree = {
        "format": 1,
        "command": command,
        "protocol": protocol(config, across_images, step),
        "results": results,
        "timing": {key: round(value, 4) for key, value in timing.items() if value is not None},
        **{name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part},
        **({"curve": list(curve)} if curve else {}),
        "versions": {**versions(choose_device(config.run.device)), "code": git_sha()},
        "identity": identity,
    }
    write_json(folder / RESULTS, tree)


def write_scores(
    path: Path, scores: Scores, root: Path | None, *, p_values: np.ndarray | None = None, rate: float = 0.01
) -> None:
    """Write scores.csv, one line per image; paths below the dataset's root are relative to it.

    With p-values (N,) of a calibration, the columns p_value and is_anomalous (p-value at most `rate`) follow.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    extra = [] if p_values is None else ["p_value", "is_anomalous"]
    table.writerow(["path", "category", "label", "defect", "score", *extra])
    for i, s in enumerate(scores.samples):
        shown = relative_to(s.path, root)
        decision = [] if p_values is None else [f"{p_values[i]:.6g}", int(p_values[i] <= rate)]
        table.writerow([shown.as_posix(), s.category, s.label, s.defect, f"{scores.score[i]:.6g}", *decision])
    write_text(path, text.getvalue())


COLUMNS = {
    "image_auroc": "I-AUROC", "image_ap": "I-AP", "image_f1": "I-F1*",
    "pixel_auroc": "P-AUROC", "pixel_ap": "P-AP", "pixel_f1": "P-F1*",
    "pro": "PRO", "pro_05": "PRO@5%", "aupimo": "AUPIMO", "dsc_unias": "Dice (UniAS)*",
    "dsc": "DSC", "miou": "mIoU", "dsc_soft": "DSC†", "miou_soft": "mIoU†",
    "frame_auroc_micro": "micro", "frame_auroc_macro": "macro",
    "frame_auroc_micro_smoothed": "micro~", "frame_auroc_macro_smoothed": "macro~",
}  # fmt: skip
FOOTNOTES = {
    "*": "best threshold on these very images: an upper bound, not a working point",
    "~": "scores smoothed within each clip, which uses later frames",
    "†": "not a fair protocol: maps stretched per image and not thresholded, as in the public code",
}


def table_cells(results: Mapping[str, Results]) -> tuple[list[str], list[list[str]], list[str]]:
    """Head, rows and footnotes of a table in percent, one row per category; cells are empty where undefined.

    The mean is left out where it is of one category.
    """
    shown = {k: name for k, name in COLUMNS.items() if any(r.get(k) is not None for r in results.values())}
    rows = []
    for name, metrics in results.items():
        if name == "mean" and sum("/" not in other for other in results) == 2:
            continue
        values = [metrics.get(key) for key in shown]
        rows.append([name, *("" if v is None else f"{100 * v:.2f}" for v in values)])
    marks = [f"{mark} {text}" for mark, text in FOOTNOTES.items() if any(mark in n for n in shown.values())]
    return ["category", *shown.values()], rows, marks


def results_table(results: Mapping[str, Results], *, notes: Sequence[str] = ()) -> str:
    """`table_cells` as Markdown; then the footnotes and the notes, one per line."""
    head, rows, marks = table_cells(results)
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in (head, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join([*lines, "", *marks, *notes])


def short(mean: Results) -> str:
    """The headline metrics in one line."""
    names = ("dsc", "miou", "frame_auroc_micro", "image_auroc", "pixel_auroc", "pixel_ap", "pro")
    return ", ".join(f"{name} {100 * value:.2f}" for name in names if (value := mean.get(name)) is not None)


def names_of(images: Sequence[Path], suffix: str) -> list[Path]:
    """Relative paths of what is written about images, one per image: its own path with another ending.

    If two images differ in their ending alone, or a folder has such a name, every name keeps its ending
    before the new one. A name that is too long for file systems is cut, with a digest at its end. Raises
    DatasetError if a folder of images has that name, too.
    """
    inside = [path.relative_to(path.anchor) for path in images]
    names = [path.with_suffix(suffix) for path in inside]
    folders = {folder for path in inside for folder in path.parents}
    if len(set(names)) < len(names) or not folders.isdisjoint(names):
        names = [path.with_name(f"{path.name}{suffix}") for path in inside]
    if taken := folders.intersection(names):
        raise DatasetError(f"the folder {printable(min(taken))} has the name of a picture; rename the folder")
    return [_short(name, suffix) for name in names]


def _short(path: Path, suffix: str) -> Path:
    name = os.fsencode(path.name)
    if len(name) <= LONGEST_NAME:
        return path
    end = f"-{hashlib.sha256(name).hexdigest()[:8]}{suffix}"
    stem = name[: LONGEST_NAME - len(end)].decode(errors="ignore")  # a character may be cut
    return path.with_name(f"{stem}{end}")


def claim(folder: Path, *, overwrite: bool, images: Sequence[Path] = ()) -> list[Path]:
    """What an earlier call of test.py or predict.py wrote to `folder`, for `begin`; none if nothing did. A
    RunError if it may not be replaced, is not such a call's, or if one of `images` would go with it.
    """
    if (folder / CHECKPOINT).exists() or (folder / "train").is_dir():
        raise RunError(f"{printable(folder)} is the folder of a run or of a dataset; choose another --output")
    there = [folder / name for name in WRITTEN if (folder / name).exists()]
    if not there:
        return []
    names, places = ", ".join(path.name for path in there), [path.resolve() for path in there]
    lost = next((p for p in images if any(p.resolve().is_relative_to(place) for place in places)), None)
    if lost is not None:
        what = f"{printable(lost)} is where an output goes, and one of the images"
        raise RunError(f"{what}; choose another --output")
    stopped = folder / UNFINISHED in there
    if folder / SCORES not in there and not stopped:
        raise RunError(f"{printable(folder)} holds {names}, but no {SCORES}: choose another --output")
    if not overwrite:
        whose = "a stopped call" if stopped else "an earlier call"
        where = f"{printable(folder)} holds {names} of {whose}"
        raise RunError(f"{where}: choose another --output, or replace all of it with --overwrite")
    return there


def begin(folder: Path, earlier: Sequence[Path]) -> None:
    """Remove what `claim` found, and mark the folder as unfinished until `finish`."""
    # while one of these is there, --overwrite works again
    for path in sorted(earlier, key=lambda p: p.name in (SCORES, UNFINISHED)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_text(folder / UNFINISHED, "test.py or predict.py writes here, or was stopped; then --overwrite\n")


def finish(folder: Path) -> None:
    """Everything is written."""
    (folder / UNFINISHED).unlink()
