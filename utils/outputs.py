"""The files of an evaluation for people: scores.csv, heatmaps.png, clips.png, report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets.build import dataset_root
from datasets.loader import ImageSet
from utils.calibration import Calibration
from utils.config import Config
from utils.device import versions
from utils.evaluation import Scores, write_scores
from utils.figures import Picture, clip_page, example_page, write_png
from utils.metrics import Results
from utils.report import Report, write_report
from utils.results import protocol_notes
from utils.runs import git_sha


def write_outputs(
    folder: Path,
    config: Config,
    data: ImageSet,
    scores: Scores,
    results: dict[str, Results],
    *,
    command: str,
    calibration: Calibration | None = None,
) -> Picture:
    """Write them, and give back the page of heatmaps."""
    p_values = calibration.p_values(scores.score) if calibration else None
    write_scores(folder / "scores.csv", scores, dataset_root(config.data), p_values=p_values)
    page = example_page(data, scores, 8)
    write_png(folder / "heatmaps.png", page)
    if scores.kind == "video":
        write_png(folder / "clips.png", clip_page(scores))
    write_report(folder / "report.html", _report(config, data, scores, results, command))
    return page


def names_of(images: Sequence[Path], suffix: str) -> list[Path]:
    """Relative paths of what is written about images, one an image: the image's own path, its ending changed.

    Where two images differ in their ending alone, every name keeps its ending before the new one.
    """
    inside = [path.relative_to(path.anchor) for path in images]
    names = [path.with_suffix(suffix) for path in inside]
    if len(set(names)) == len(names):
        return names
    return [path.with_name(f"{path.name}{suffix}") for path in inside]


def _report(
    config: Config, data: ImageSet, scores: Scores, results: dict[str, Results], command: str
) -> Report:
    model = config.model
    facts = {
        "command": command,
        "backbone": model.backbone,
        "training": f"{config.train.iterations} steps of {config.train.batch_size}, {config.train.precision}",
        "prediction": f"{scores.ms_per_image:.1f} ms an image",
        "code": git_sha(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    title = f"{model.name} ({model.flavor}) on {config.data.name}/{config.data.category}, {model.setting}"
    return Report(title, scores, data.pixels, results, protocol_notes(config), facts, config.to_dict())
