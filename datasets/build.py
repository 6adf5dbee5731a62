"""From a resolved configuration to the sets of a run: training, calibration, and what is evaluated."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from datasets.demo import write_demo
from datasets.folder import FOLDER
from datasets.industrial import BTAD, MVTEC, MVTEC3D, VAD, VISA, list_categories, list_mvtec
from datasets.kolektor import KOLEKTOR
from datasets.loader import ImageSet, SyntheticValidation
from datasets.medical import APTOS, ISIC2018, OCT2017
from datasets.polyp import CLINICDB, COLONDB, KVASIR
from datasets.samples import (
    ANOMALOUS,
    NORMAL,
    DatasetError,
    DatasetSpec,
    Sample,
    check_disjoint,
    collect,
    hold_out,
    limit,
    without_copies,
)
from datasets.transforms import Decode, Normalise
from datasets.video import PED2, FrameSet
from utils.config import CONFIGS, Config, ConfigError, DataConfig, load_config

DEMO = DatasetSpec("demo", list_categories, list_mvtec, counts={})
INDUSTRIAL = (MVTEC, BTAD, VISA, MVTEC3D, VAD, KOLEKTOR)
MEDICAL = (APTOS, OCT2017, ISIC2018)
POLYP = (KVASIR, CLINICDB, COLONDB)
SPECS = {spec.name: spec for spec in (*INDUSTRIAL, *MEDICAL, *POLYP, PED2, FOLDER, DEMO)}
DEMO_ROOT = Path(__file__).resolve().parent.parent / "data" / "demo"


@dataclass
class RunData:
    """The disjoint sets of a run.

    `validation` is built only where it is asked for, as it costs training images. `trained_defects` are the
    kinds of anomaly that training sees.
    """

    train: ImageSet
    calibration: ImageSet
    test: ImageSet
    validation: ImageSet | None
    trained_defects: frozenset[str]

    def evaluated(self, split: str) -> ImageSet:
        """The set that `eval.split` names."""
        if split == "validation":
            assert self.validation is not None
            return self.validation
        return self.test


def dataset_root(data: DataConfig) -> Path | None:
    """The dataset's folder; the demo is written where it is missing.

    Raises:
        DatasetError: for an unknown dataset name.
    """
    if data.name not in SPECS:
        raise DatasetError(f"unknown dataset '{data.name}'; choose one of {', '.join(SPECS)}")
    if data.name == "demo":
        return write_demo(Path(data.root) if data.root else DEMO_ROOT)
    return Path(data.root) if data.root else None


def categories_of(data: DataConfig) -> list[str]:
    """Names of the categories that `data.category` stands for, in order."""
    samples = collect(SPECS[data.name], dataset_root(data), data.category, warn=False)  # build_data warns
    return list(dict.fromkeys(s.category for s in samples))


@dataclass
class Parts:
    """The samples of a run, disjoint; `synthetic`: validation is of normals that are to be given defects."""

    train: list[Sample]
    calibration: list[Sample]
    validation: list[Sample]
    synthetic: bool
    test: list[Sample]


def build_data(config: Config, normalise: Normalise) -> RunData:
    """List, check and split the samples of a run; nothing is decoded yet.

    Raises:
        DatasetError: as `collect`, or if a part would be empty, or without the masks that the loss needs.
        ConfigError: if settings of the data do not go together.
    """
    data, parts = config.data, split_samples(config)
    images = partial(_images, config, normalise)
    train = images(parts.train, cached=True)
    if "mask" in (config.loss.anomalous, config.model.head) and not train.has_masks:
        raise DatasetError(f"{data.name} has no masks for its anomalous training images; the loss needs them")
    test, of_test = images(parts.test), test_config(data)
    if of_test is not data:  # cross-dataset
        samples = collect(SPECS[of_test.name], dataset_root(of_test), of_test.category)
        test = images([s for s in samples if s.split == "test"], of_test)
    validation = images(parts.validation, cached=True) if parts.validation else None
    if parts.synthetic:
        validation = SyntheticValidation(validation, seed=config.train.seed)
    defects = frozenset(s.defect for s in parts.train if s.label == ANOMALOUS)
    return RunData(train, images(parts.calibration), test, validation, trained_defects=defects)


def split_samples(config: Config) -> Parts:
    """The parts of the dataset that is trained on."""
    data, seed, spec = config.data, config.train.seed, SPECS[config.data.name]
    if data.train_limit and data.time_step:
        raise ConfigError("data.train_limit leaves gaps between frames; it needs data.time_step=0")
    samples = collect(spec, dataset_root(data), data.category)
    test, moved = move_anomalies([s for s in samples if s.split == "test"], data.moved_anomalies, seed=seed)
    normal = [s for s in samples if s.split == "train" and s.label == NORMAL]
    anomalous = [s for s in [*samples, *moved] if s.split == "train" and s.label == ANOMALOUS]
    if spec.drops_copies:
        normal = without_copies(normal, test)
    check_disjoint([*normal, *anomalous], test)
    normal, calibration = hold_out(normal, data.calibration_fraction, seed=seed)
    validation = [s for s in samples if s.split == "validation"]
    synthetic = _wants_validation(config) and not validation
    if synthetic:
        if spec.segmentation or config.model.head == "frame":
            raise ConfigError(f"{spec.name} has no validation images: no eval.every, no --eval validation")
        normal, validation = hold_out(normal, data.validation_fraction, seed=seed)
        if not validation:
            raise DatasetError(f"{len(normal)} training images leave none for data.validation_fraction")
    train = [*normal, *anomalous] if config.model.setting == "supervised" else normal
    if not train:
        raise DatasetError(f"{spec.name} has no normal training image; it is for --setting supervised")
    return Parts(limit(train, data.train_limit, seed=seed), calibration, validation, synthetic, test)


def _wants_validation(config: Config) -> bool:
    watched = config.eval.every > 0 and config.eval.select == "last"
    return config.eval.split == "validation" or watched


def _images(
    config: Config,
    normalise: Normalise,
    samples: list[Sample],
    data: DataConfig | None = None,
    *,
    cached: bool = False,
) -> ImageSet:
    """The samples as a set, read as `data` says (default: as the training images are)."""
    data = data or config.data
    decode = Decode(data.image_size, data.resize, data.center_crop, data.mask_threshold)
    cache_gb = data.cache_gb if cached else 0
    if config.model.head == "frame":
        images = FrameSet(samples, decode, normalise, time_step=data.time_step, cache_gb=cache_gb)
    else:
        images = ImageSet(samples, decode, normalise, cache_gb=cache_gb)
    if SPECS[data.name].video:
        images.kind = "video"
    elif config.model.head == "mask":
        images.kind = "segmentation"
    return images


def test_config(data: DataConfig) -> DataConfig:
    """How the test images are read: as the training images, or as the config of `data.test_name` says.

    Raises:
        DatasetError: for an unknown dataset name.
    """
    if data.test_name is None:
        return data
    if data.test_name not in SPECS:
        raise DatasetError(f"unknown dataset '{data.test_name}'; choose one of {', '.join(SPECS)}")
    chosen = {"data.root": data.test_root, "data.category": data.test_category or "all"}
    category = data.test_category
    return load_config(CONFIGS / f"{data.test_name}.yaml", chosen, category=category).data


def move_anomalies(test: list[Sample], number: int, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """The test samples without `number` of the anomalous ones, and those, now of the training set.

    Whole groups of anomalous images are drawn until the number is reached, first of those of which nothing
    normal is tested, so that an item is on one side where that is possible.

    Raises:
        DatasetError: if none would be left to test on.
    """
    if number == 0:
        return test, []
    tested = {s.group for s in test if s.label == NORMAL}
    groups = sorted({s.group for s in test if s.label == ANOMALOUS})
    random.Random(f"{seed}-moved").shuffle(groups)  # noqa: S311 (a split, no secret)
    groups.sort(key=tested.__contains__)
    chosen: set[str] = set()
    for group in groups:
        if sum(s.label == ANOMALOUS and s.group in chosen for s in test) >= number:
            break
        chosen.add(group)
    moved = [s for s in test if s.label == ANOMALOUS and s.group in chosen]
    rest = [s for s in test if not (s.label == ANOMALOUS and s.group in chosen)]
    if not any(s.label == ANOMALOUS for s in rest):
        raise DatasetError(f"data.moved_anomalies {number} leaves no anomalous test image")
    return rest, [replace(s, split="train") for s in moved]
