"""From a resolved configuration to the sets of a run: training, calibration, and what is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets.demo import write_demo
from datasets.folder import FOLDER
from datasets.industrial import BTAD, MVTEC, MVTEC3D, VAD, VISA, list_categories, list_mvtec
from datasets.kolektor import KOLEKTOR
from datasets.loader import ImageSet, SyntheticValidation
from datasets.medical import APTOS, ISIC2018, OCT2017
from datasets.samples import (
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
from utils.config import Config, DataConfig

DEMO = DatasetSpec("demo", list_categories, list_mvtec, counts={})
INDUSTRIAL = (MVTEC, BTAD, VISA, MVTEC3D, VAD, KOLEKTOR)
MEDICAL = (APTOS, OCT2017, ISIC2018)
SPECS = {spec.name: spec for spec in (*INDUSTRIAL, *MEDICAL, FOLDER, DEMO)}
DEMO_ROOT = Path(__file__).resolve().parent.parent / "data" / "demo"


@dataclass
class RunData:
    """The disjoint sets of a run.

    `validation` is built only where it is asked for, as it costs training images.
    """

    train: ImageSet
    calibration: ImageSet
    test: ImageSet
    validation: SyntheticValidation | None

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


def build_data(config: Config, normalise: Normalise) -> RunData:
    """List, check and split the samples of a run; nothing is decoded yet.

    Raises:
        DatasetError: as `collect`, or if a held-out part would be empty.
    """
    data, seed = config.data, config.train.seed
    spec = SPECS[data.name]
    samples = collect(spec, dataset_root(data), data.category)
    train = [s for s in samples if s.split == "train" and s.label == NORMAL]
    test = [s for s in samples if s.split == "test"]
    if spec.drops_copies:
        train = without_copies(train, test)
    check_disjoint(train, test)
    train, calibration = hold_out(train, data.calibration_fraction, seed=seed)
    held_out: list[Sample] = []
    watched = config.eval.every > 0 and config.eval.select == "last"
    if config.eval.split == "validation" or watched:
        train, held_out = hold_out(train, data.validation_fraction, seed=seed)
        if not held_out:
            raise DatasetError(f"{len(train)} training images leave none for data.validation_fraction")
    train = limit(train, data.train_limit, seed=seed)
    decode = Decode(data.image_size, data.resize, data.center_crop, data.mask_threshold)

    def images(part: list[Sample], cache_gb: float = 0) -> ImageSet:
        return ImageSet(part, decode, normalise, cache_gb=cache_gb)

    validation = SyntheticValidation(images(held_out, data.cache_gb), seed=seed) if held_out else None
    return RunData(images(train, data.cache_gb), images(calibration), images(test), validation)
