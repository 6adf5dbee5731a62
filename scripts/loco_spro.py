"""AU-sPRO and AUROC of runs on MVTec LOCO AD, for structural and for logical anomalies.

python -m scripts.loco_spro --data-root DIR RUN [RUN ...]

A missing object may be anywhere in a large region, so it is enough to mark a part of it: defects_config.json
gives the area at which a kind of defect saturates, in pixels of the image or as a share of the region. Each
mask file is one region. sPRO is min(found area / saturation area, 1), averaged over the regions, and is
integrated over false positive rates up to 0.05 (Bergmann et al., IJCV 2022). AUROC is of whole images.
Structural and logical anomalies are measured apart, each with all good images; then their mean.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.build import image_set
from datasets.images import upright_size
from datasets.registry import collect, spec_of
from datasets.samples import Sample
from datasets.transforms import Decode
from evaluation.metrics import MAX_LEVELS, area_up_to, image_metrics
from model import load_detector
from model.detector import Detector
from scripts.text import markdown
from utils.cli import add_device_flags, log, new_parser, print_result, run_command, user_path
from utils.errors import ConfigError, DatasetError

DATASET, GOOD = "mvtec_loco", "good"
KINDS = ("structural_anomalies", "logical_anomalies")
COLUMNS = [f"{what}, {of}" for what in ("AU-sPRO", "AUROC") for of in ("structural", "logical", "mean")]
LIMIT = 0.05  # of the false positive rate
KEYS = ("pixel_value", "saturation_threshold", "relative_saturation")
Saturation = Mapping[int, tuple[float, bool]]  # of a mask's value: the threshold, and whether it is a share


class Region(NamedTuple):
    """A region of an image: drawn (H, W) bool, and the found area in pixels from which it counts as found."""

    drawn: np.ndarray
    saturation: float


MapAndRegions = tuple[np.ndarray, Sequence[Region]]


@dataclass(frozen=True)
class Measured:
    """Maps (H, W) of the images' own size with their regions, made when asked for: all would fill memory."""

    samples: Sequence[Sample]
    maps: Sequence[np.ndarray]  # of the working size
    decode: Decode
    saturation: Saturation

    def __iter__(self) -> Iterator[MapAndRegions]:
        for sample, a_map in zip(self.samples, self.maps, strict=True):
            width, height = upright_size(sample.path)
            regions = [region_of(path, self.saturation) for path in sample.masks]
            for path, region in zip(sample.masks, regions, strict=True):
                if region.drawn.shape != (height, width):
                    raise DatasetError(f"{path} has another size than {sample.path}; get the files again")
            yield self.decode.to_image(a_map, width, height), regions


def main(argv: Sequence[str]) -> None:
    """Print the metrics of each run and category, in percent.

    Raises:
        ConfigError: if a run is of another dataset.
        DatasetError: as `collect`, and if masks or defects_config.json are not as released.
    """
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--data-root", required=True, type=user_path, metavar="DIR", help="of the dataset")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    rows = [["run", "category", *COLUMNS]]
    for run in args.runs:
        detector = load_detector(
            run, device=args.device, precision=args.precision, batch_size=args.eval_batch_size
        )
        data = detector.config.data
        if data.name != DATASET:
            raise ConfigError(f"{run} was trained on {data.name}; give runs of {DATASET}")
        listed = collect(spec_of(DATASET), args.data_root, data.category)
        tested = [s for s in listed if s.split == "test"]
        scores, maps = predicted(detector, tested, args.quiet)
        for category in dict.fromkeys(s.category for s in tested):
            log.info("measuring %s ...", category)
            chosen = [i for i, s in enumerate(tested) if s.category == category]
            samples = [tested[i] for i in chosen]
            values = spro_by_kind(samples, [maps[i] for i in chosen], detector, args.data_root)
            values += auroc_by_kind(samples, scores[chosen])
            rows.append([Path(run).name, category, *("" if v is None else f"{100 * v:.2f}" for v in values)])
    print_result(markdown(rows))


def predicted(
    detector: Detector, samples: Sequence[Sample], quiet: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Score and map of each sample, the maps of the working size."""
    data = image_set(detector.config, detector.normalise, samples)
    found = ((part.score, part.maps) for part in detector.predictions(data, quiet=quiet))
    scores, maps = zip(*found, strict=True)
    return np.concatenate(scores), [a_map for part in maps for a_map in part]


def of_kind(samples: Sequence[Sample], kind: str) -> list[int]:
    """Which samples a kind of anomaly is measured on: its own, and the good ones."""
    return [i for i, s in enumerate(samples) if s.defect in (GOOD, kind)]


def with_mean(values: Sequence[float | None]) -> list[float | None]:
    """The values, and their mean, if there are all."""
    known = [value for value in values if value is not None]
    return [*values, float(np.mean(known)) if len(known) == len(values) else None]


def auroc_by_kind(samples: Sequence[Sample], scores: np.ndarray) -> list[float | None]:
    """AUROC of structural and of logical anomalies, and their mean."""
    labels, parts = np.array([s.label for s in samples]), [of_kind(samples, kind) for kind in KINDS]
    return with_mean([image_metrics(scores[part], labels[part])["image_auroc"] for part in parts])


def spro_by_kind(
    samples: Sequence[Sample], maps: Sequence[np.ndarray], detector: Detector, root: Path
) -> list[float | None]:
    """AU-sPRO of structural and of logical anomalies, and their mean."""
    saturation = read_saturation(root / samples[0].category / "defects_config.json")
    decode = image_set(detector.config, detector.normalise, samples).decode
    parts = [of_kind(samples, kind) for kind in KINDS]
    measured = [Measured([samples[i] for i in p], [maps[i] for i in p], decode, saturation) for p in parts]
    return with_mean([au_spro(images) for images in measured])


def read_saturation(path: Path) -> Saturation:
    """The saturation of each value that masks of a category have. Raises DatasetError for another form."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            int(value): (float(at), bool(share))
            for value, at, share in ([e[k] for k in KEYS] for e in entries)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = f"expected a list of objects with {', '.join(KEYS)}, as released"
        raise DatasetError(f"{path} cannot be used ({error!r}); {expected}") from error


def region_of(path: Path, saturation: Saturation) -> Region:
    """A mask file's region; its value tells the kind of defect. Raises DatasetError for other values."""
    values = np.asarray(Image.open(path).convert("L"))
    found = np.unique(values[values > 0]).tolist()
    if len(found) != 1 or found[0] not in saturation:
        expected = f"expected one of {sorted(saturation)} beside 0, as defects_config.json says"
        raise DatasetError(f"{path} has the values {found[:4]}; {expected}")
    return saturated(values > 0, *saturation[found[0]])


def saturated(drawn: np.ndarray, threshold: float, share: bool) -> Region:
    """A region that is found at `threshold` pixels, or at that share of its own area, rounded down."""
    area = int(np.count_nonzero(drawn))
    return Region(drawn, max(1, int(threshold * area)) if share else min(threshold, area))


def au_spro(images: Measured | Sequence[MapAndRegions], limit: float = LIMIT) -> float | None:
    """Area under the mean sPRO of all regions over the false positive rate up to `limit`, divided by it.

    The false positive rate is over the pixels of all images that lie in no region. Exact up to 2^20 distinct
    scores, of more neighbours count as tied; straight over ties. None without a region or without such a
    pixel. images: maps (H, W) and their regions, gone through twice.
    """
    gains = [gain(a_map[r.drawn], r.saturation) for a_map, regions in images for r in regions]
    if not gains:
        return None
    scores, shares = (np.concatenate(parts) for parts in zip(*gains, strict=True))
    order = np.argsort(-scores, kind="stable")
    scores, overlap = scores[order], np.cumsum(shares[order]) / len(gains)
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of each run of ties
    step = -(-last.size // MAX_LEVELS)
    last = last[::-step][::-1]
    normal, fp, before = false_positives(images, scores[last])
    if not normal:
        return None
    before = before if step == 1 else np.append(0, fp[:-1])
    fpr = np.stack([np.append(0, fp), np.append(before, normal)], axis=1).reshape(-1) / normal
    return area_up_to(fpr, np.repeat(np.append(0, overlap[last]), 2), limit)


def gain(scores: np.ndarray, saturation: float) -> tuple[np.ndarray, np.ndarray]:
    """A region's scores, descending, and what each adds to min(area / saturation, 1); those that add."""
    found = np.sort(scores)[::-1]
    added = np.diff(np.minimum(np.arange(1, found.size + 1) / saturation, 1), prepend=0)
    return found[added > 0], added[added > 0]


def false_positives(
    images: Measured | Sequence[MapAndRegions], levels: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    """How many pixels lie in no region; how many of them are not below each level, and how many above it."""
    count, reached, above = 0, np.zeros(levels.size, np.int64), np.zeros(levels.size, np.int64)
    for a_map, regions in images:
        normal = np.ones(a_map.shape, bool)
        for region in regions:
            normal &= ~region.drawn
        scores = np.sort(a_map[normal])
        count += scores.size
        reached += scores.size - np.searchsorted(scores, levels, "left")
        above += scores.size - np.searchsorted(scores, levels, "right")
    return count, reached, above


if __name__ == "__main__":
    sys.exit(run_command(main))
