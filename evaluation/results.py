"""metrics.json: written once at the end of a run, and read to find finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from datasets.registry import SPECS
from evaluation.metrics import Results
from utils.config import Config, Tree
from utils.device import versions
from utils.files import write_json
from utils.runs import RESULTS


def protocol_notes(config: Config, step: int | None = None) -> list[str]:
    """What a reader must know about the numbers of the table; `step` as in `protocol`."""
    text = [
        f"evaluated on: {config.eval.split}; selection: {config.eval.select}; nothing shared between images"
    ]
    if config.eval.select == "best":
        text.append("NOT A FAIR PROTOCOL: the best of several evaluations on the test set itself was kept")
    if config.eval.split == "validation":
        real = SPECS[config.data.name].segmentation
        made = "images of their own" if real else "held-out training normals with synthetic defects"
        if config.model.setting == "supervised" and not real:
            made = "held-out training images, anomalous ones too where enough are known"
        text.append(f"validation: {made}, for choosing settings only")
    if _stopped(config, step):
        text.append(f"NOT A FAIR PROTOCOL: the state of step {step} of {config.train.iterations}")
    if _soft(config):
        text.append("NOT A FAIR PROTOCOL: soft DSC and mIoU, maps stretched by image and not thresholded")
    return text


def _soft(config: Config) -> bool:
    return config.model.head == "mask" and config.eval.segmentation == "soft"


def _stopped(config: Config, step: int | None) -> bool:
    return step is not None and step < config.train.iterations and config.eval.select == "last"


def protocol(config: Config, across_images: str, step: int | None = None) -> dict[str, object]:
    """What the numbers depend on besides the model.

    step: that the evaluated state is of; None: the last one.
    """
    return {
        "select": config.eval.select,
        "evaluated_on": config.eval.split,
        "across_images": across_images,
        "fair": config.eval.select == "last"
        and across_images == "none"
        and not _soft(config)
        and not _stopped(config, step),
        "image_size": list(config.data.image_size),
        "resize": config.data.resize,
        "center_crop": config.data.center_crop,
        "iterations": config.train.iterations if step is None else step,
        "seed": config.train.seed,
        "precision": config.train.precision,
        "scored_in": config.eval.precision,
        "score": asdict(config.score),
        "segmentation": config.eval.segmentation,
        "clip_sigma": config.eval.clip_sigma,
        "f1_and_acc_threshold": "best on the evaluated images",
    }


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of the whole model, and of its bottleneck if it has one (Table 9)."""
    parts = {"parameters": model, "bottleneck_parameters": getattr(model, "bottleneck", None)}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part}


def write_results(
    folder: Path,
    config: Config,
    results: dict[str, Results],
    *,
    command: str,
    timing: Mapping[str, float | None],
    parameters: Mapping[str, int],
    code: str,
    identity: Tree | None,
    step: int | None = None,
    across_images: str = "none",
    curve: Sequence[dict[str, object]] = (),
) -> None:
    """Write metrics.json in one step; metrics are fractions, null where undefined.

    parameters: as `parameter_counts` gives them.
    identity: of the run that the model is of, as `utils.runs.identity_of` gives it.
    step: that the evaluated state is of; None: the last one.
    curve: evaluations during training, each with its iteration, split and mean results.
    """
    tree = {
        "format": 1,
        "command": command,
        "protocol": protocol(config, across_images, step),
        "results": results,
        "timing": {key: round(value, 4) for key, value in timing.items() if value is not None},
        **parameters,
        **({"curve": list(curve)} if curve else {}),
        "versions": {**versions(), "code": code},
        "identity": identity,
    }
    write_json(folder / RESULTS, tree)
