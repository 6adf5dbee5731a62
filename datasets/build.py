"""From a resolved configuration to the sets of a run: training, calibration, and what is evaluated."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from datasets.demo import write_demo
from datasets.files import unused_files
from datasets.folder import FOLDER
from datasets.industrial import BTAD, MVTEC, MVTEC3D, VAD, VISA, list_categories, list_mvtec
from datasets.kolektor import KOLEKTOR
from datasets.loader import ImageSet
from datasets.masks import check_masks
from datasets.medical import APTOS, ISIC2018, OCT2017
from datasets.polyp import CLINICDB, COLONDB, KVASIR
from datasets.readable import Skipped, readable
from datasets.samples import (
    ANOMALOUS,
    IMAGE_SUFFIXES,
    NORMAL,
    UNKNOWN,
    DatasetSpec,
    Sample,
    check_disjoint,
    check_splits,
    collect,
    find_images,
    first_copies,
    hold_out,
    limit,
    tied_groups,
    with_unused,
    without_copies,
)
from datasets.synthetic import DEFECT_KINDS
from datasets.synthetic_sets import SyntheticTraining, SyntheticValidation
from datasets.transforms import Decode, Normalise
from datasets.video import PED2, FrameSet, natural_order, with_motion
from utils.config import CONFIGS, Config, ConfigError, DataConfig, load_config
from utils.errors import DatasetError

DEMO = DatasetSpec("demo", list_categories, list_mvtec, counts={})
INDUSTRIAL = (MVTEC, BTAD, VISA, MVTEC3D, VAD, KOLEKTOR)
MEDICAL = (APTOS, OCT2017, ISIC2018)
POLYP = (KVASIR, CLINICDB, COLONDB)
SPECS = {spec.name: spec for spec in (*INDUSTRIAL, *MEDICAL, *POLYP, PED2, FOLDER, DEMO)}
_log = logging.getLogger("uninet")
DEMO_ROOT = Path(__file__).resolve().parent.parent / "data" / "demo"


@dataclass
class RunData:
    """The disjoint sets of a run.

    `validation` is built only where it is asked for, as it costs training images. `trained_defects` are the
    kinds of anomaly that training sees. `skipped`: unreadable files that were left out, with the reason.
    """

    train: ImageSet
    calibration: ImageSet
    test: ImageSet
    validation: ImageSet | None
    trained_defects: frozenset[str]
    skipped: Skipped

    def evaluated(self, split: str) -> ImageSet:
        """The set that `eval.split` names."""
        if split == "validation":
            assert self.validation is not None
            return self.validation
        return self.test


def dataset_root(data: DataConfig) -> Path | None:
    """The dataset's folder, resolved; the demo is written where it is missing.

    Raises:
        DatasetError: for an unknown dataset name.
    """
    spec_of(data.name)
    if data.name == "demo":
        return write_demo(Path(data.root).expanduser().resolve() if data.root else DEMO_ROOT)
    return Path(data.root).expanduser().resolve() if data.root else None


def spec_of(name: str) -> DatasetSpec:
    """The dataset of that name.

    Raises:
        DatasetError: for an unknown one.
    """
    if name not in SPECS:
        raise DatasetError(f"unknown dataset '{name}'; choose one of {', '.join(SPECS)}")
    return SPECS[name]


def categories_of(data: DataConfig) -> list[str]:
    """Names of the categories that `data.category` stands for, in order."""
    samples = _collect(data, warn=False)  # build_data warns
    return list(dict.fromkeys(s.category for s in samples))


@dataclass
class Parts:
    """The samples of a run, disjoint; `synthetic`: validation is of normals that are to be given defects."""

    train: list[Sample]
    calibration: list[Sample]
    validation: list[Sample]
    synthetic: bool
    test: list[Sample]
    skipped: Skipped

    @property
    def seen(self) -> list[Sample]:
        """All that the model, its calibration or its settings depend on: none may be tested on."""
        return [*self.train, *self.calibration, *self.validation]

    @property
    def defects(self) -> frozenset[str]:
        """The kinds of anomaly that training sees."""
        return frozenset(s.defect for s in self.train if s.label == ANOMALOUS)


def build_data(config: Config, normalise: Normalise) -> RunData:
    """List, check and split the samples of a run; of the files only masks are decoded yet, to look at them.

    Raises:
        DatasetError: as `collect` and `check_masks`, or if a part would be empty, the loss lacks masks that
            it needs, or a test image is trained on.
        ConfigError: if settings of the data do not go together.
    """
    data, parts = config.data, split_samples(config)
    images = partial(_images, config, normalise)
    train = images(parts.train, cache_gb=data.cache_gb, training=True)
    masked_head = config.model.head in ("mask", "discrepancy")
    if (masked_head or config.loss.anomalous == "mask") and not train.has_masks:
        lacking = next(s.path for s in train.samples if s.label == ANOMALOUS and s.mask_path is None)
        raise DatasetError(
            f"{data.name} lacks masks of anomalous training images, which the loss needs (of {lacking}, for "
            "one); add them, or learn from labels alone: --set loss.anomalous=label"
            + (" --set model.head=label --set loss.supervised=bce" if masked_head else "")
        )
    if data.tile and parts.defects and not train.has_masks:
        raise DatasetError(
            f"{data.name} lacks masks of anomalous training images, so which of their tiles are is unknown"
        )
    check_disjoint(parts.seen, parts.test)
    left = data.cache_gb - train.cached * train.image_bytes / 2**30
    validation = images(parts.validation, cache_gb=left) if parts.validation else None
    if parts.synthetic:
        validation = SyntheticValidation(validation, seed=config.train.seed, kinds=validation_kinds(data))
    calibration, test = images(parts.calibration), images(parts.test)
    _look_at_masks(data, [*parts.train, *parts.validation, *parts.test], test.decode)
    return RunData(train, calibration, test, validation, parts.defects, parts.skipped)


def build_test(
    config: Config, trained: Config, normalise: Normalise
) -> tuple[ImageSet, frozenset[str], Skipped]:
    """The test set of `config` for a model that was trained as `trained` says, the defects it has seen, and
    the unreadable files that were left out.

    Raises:
        DatasetError: as `collect`, or if a test image was trained on.
    """
    data = config.data
    keys = ("name", "category", "moved_anomalies")
    same = all(getattr(data, key) == getattr(trained.data, key) for key in keys)
    root, tested_root = dataset_root(trained.data), dataset_root(data)
    if trained.data.name == data.name and not root.is_dir():  # the dataset has moved
        trained, root = replace(trained, data=replace(trained.data, root=data.root)), tested_root
    parts = split_samples(trained) if root.is_dir() else None
    if parts is None:
        _log.warning("the training images are not at %s: overlap with them is not checked", root)
    if same and parts is not None and root == tested_root:
        test, skipped = parts.test, parts.skipped
        if data.skip_unreadable and not trained.data.skip_unreadable:
            test, skipped = _without_unreadable(data, test)
    else:
        samples, skipped = list_samples(data)
        test, _ = move_anomalies([s for s in samples if s.split == "test"], data.moved_anomalies)
    if parts is not None:
        check_disjoint(parts.seen, test)
    defects = parts.defects if same and parts is not None else frozenset()
    images = _images(config, normalise, test)
    _look_at_masks(data, test, images.decode)
    return images, defects, skipped


def _look_at_masks(data: DataConfig, samples: Sequence[Sample], decode: Decode) -> None:
    for warning in check_masks(data.name, samples, decode):
        _log.warning("%s", warning)


def list_samples(data: DataConfig) -> tuple[list[Sample], Skipped]:
    """The dataset's samples, and with `skip_unreadable` the files that were left out of them.

    Raises:
        DatasetError: as `collect`, or if nothing readable is left to train or to test on.
    """
    samples = _collect(data)
    if data.motion:
        samples = with_motion(samples, data.motion)
    return _without_unreadable(data, samples) if data.skip_unreadable else (samples, {})


def _collect(data: DataConfig, *, warn: bool = True) -> list[Sample]:
    return collect(
        spec_of(data.name),
        dataset_root(data),
        data.category,
        warn=warn,
        incomplete=data.skip_unreadable,
        others=SPECS.values(),
    )


def _without_unreadable(data: DataConfig, samples: list[Sample]) -> tuple[list[Sample], Skipped]:
    spec = spec_of(data.name)
    kept, skipped = readable(samples, data.mask_threshold)
    for category in dict.fromkeys(s.category for s in samples) if skipped else ():
        if any(s.split == "train" for s in samples):  # else only the test set is asked for
            check_splits(spec, category, [s for s in kept if s.category == category])
    if skipped and spec.counts:
        _log.warning(
            "%d unreadable files are left out: this is not the official split of %s, its numbers are not "
            "comparable",
            len(skipped), spec.name,
        )  # fmt: skip
    return kept, skipped


def images_below(where: Path, config: Config, normalise: Normalise) -> ImageSet:
    """The image at `where`, or all below that folder, decoded as in training.

    Raises:
        DatasetError: if there is none.
    """
    return new_images(new_samples(find_images(where), where, config), config, normalise)


def new_samples(found: Sequence[Path], where: Path, config: Config) -> list[Sample]:
    """Images that were found at `where`, as samples of unknown label.

    Raises:
        DatasetError: if there is none.
    """
    if not found:
        message = f"no image at {where}; images end in {', '.join(IMAGE_SUFFIXES)}"
        raise DatasetError(with_unused(message, unused_files(where, ())) if where.is_dir() else message)
    motion = config.data.motion  # a folder is a clip
    if motion:
        found = sorted(found, key=lambda path: (path.parent, natural_order(path)))
    samples = [
        Sample(p, UNKNOWN, None, config.data.category, "predict", "", str(p.parent if motion else p))
        for p in found
    ]
    return with_motion(samples, motion) if motion else samples


def new_images(samples: Sequence[Sample], config: Config, normalise: Normalise) -> ImageSet:
    """Samples of unknown label, decoded as in training."""
    return _images(config, normalise, list(samples))


def split_samples(config: Config) -> Parts:
    """The parts of the dataset that is trained on."""
    data, seed, spec = config.data, config.train.seed, spec_of(config.data.name)
    if data.time_step and (data.train_limit or data.moved_anomalies or data.skip_unreadable):
        raise ConfigError(
            "data.train_limit, data.moved_anomalies and --skip-unreadable leave gaps between frames; they "
            "need data.time_step=0"
        )
    if data.motion and not spec.video:
        raise ConfigError(f"data.motion needs the frames of a video; {spec.name} has single images")
    samples, skipped = list_samples(data)
    test, moved = move_anomalies([s for s in samples if s.split == "test"], data.moved_anomalies)
    normal = [s for s in samples if s.split == "train" and s.label == NORMAL]
    anomalous = [s for s in [*samples, *moved] if s.split == "train" and s.label == ANOMALOUS]
    if spec.drops_copies:
        normal, anomalous = (without_copies(part, test) for part in (normal, anomalous))
    normal, calibration = hold_out(normal, data.calibration_fraction, seed=seed)
    if calibration:
        tied = tied_groups([*calibration, *anomalous])
        apart = {tied[s.group] for s in calibration}
        anomalous = [s for s in anomalous if tied[s.group] not in apart]  # items that are held out stay out
        first = first_copies(s.path for s in calibration)
        calibration = [s for s in calibration if first[s.path] == s.path]  # copies say nothing new
    supervised = config.model.setting == "supervised"
    train = [*normal, *anomalous] if supervised else normal
    validation = [s for s in samples if s.split == "validation"]
    synthetic = False
    if _wants_validation(config) and not validation:
        if spec.segmentation or config.model.head == "frame":
            raise ConfigError(f"{spec.name} has no validation images: no eval.every, no --eval validation")
        train, validation = hold_out(train, data.validation_fraction, seed=seed)
        if not validation:
            raise DatasetError(f"{len(train)} training images leave none for data.validation_fraction")
        synthetic = all(s.label == NORMAL for s in validation)  # real ones where they are known
    if supervised and all(s.label == NORMAL for s in train):
        raise DatasetError(
            f"{spec.name} has no anomalous training image for --setting supervised; "
            "data.moved_anomalies=N moves some of the test set's there"
        )
    if not train:
        raise DatasetError(f"{spec.name} has no normal training image; it is for --setting supervised")
    train = limit(train, data.train_limit, seed=seed)
    train += [s for s in train if s.label == ANOMALOUS] * (data.anomaly_repeats - 1)
    return Parts(train, calibration, validation, synthetic, test, skipped)


def validation_kinds(data: DataConfig) -> tuple[str, ...]:
    """Kinds of synthetic defects to validate on: those that are not trained on, all if that leaves none."""
    if data.validation_kinds is not None:
        return data.validation_kinds
    trained = data.synthetic_kinds if data.synthetic else ()
    return tuple(kind for kind in DEFECT_KINDS if kind not in trained) or DEFECT_KINDS


def _wants_validation(config: Config) -> bool:
    watched = config.eval.every > 0 and config.eval.select == "last"
    return config.eval.split == "validation" or watched


def _images(
    config: Config,
    normalise: Normalise,
    samples: list[Sample],
    *,
    cache_gb: float = 0,
    training: bool = False,
) -> ImageSet:
    """The samples as a set, read as the configuration says."""
    data = config.data
    decode = Decode(data.image_size, data.resize, data.center_crop, data.mask_threshold)
    if config.model.head == "frame":
        images = FrameSet(samples, decode, normalise, time_step=data.time_step, cache_gb=cache_gb)
    elif training and data.synthetic:
        seed, kinds = config.train.seed, data.synthetic_kinds
        images = SyntheticTraining(
            samples, decode, normalise, cache_gb=cache_gb, share=data.synthetic, kinds=kinds, seed=seed
        )
    else:
        images = ImageSet(samples, decode, normalise, cache_gb=cache_gb)
    if SPECS[data.name].video:
        images.kind = "video"
    elif config.model.head == "mask":
        images.kind = "segmentation"
    return images


def read_as(name: str, category: str, config: Config) -> DataConfig:
    """How a model that was trained as `config` says reads another dataset: as that one's own file says.

    Raises:
        DatasetError: for an unknown dataset name.
    """
    data, model = config.data, config.model
    chosen = {f"data.{key}": getattr(data, key) for key in ("skip_unreadable", "tile")}
    chosen |= {"data.category": category, "model.name": model.name, "model.backbone": model.backbone}
    if model.flavor != "default":
        chosen["model.flavor"] = model.flavor
    return load_config(CONFIGS / f"{spec_of(name).name}.yaml", chosen, category=category).data


def move_anomalies(test: list[Sample], number: int) -> tuple[list[Sample], list[Sample]]:
    """The test samples without `number` of the anomalous ones, and those, now of the training set.

    Whole groups of anomalous images are drawn until the number is reached, first of those of which nothing
    normal is tested, so that an item is on one side where that is possible. Always the same ones: the test
    set does not change with the seed.

    Raises:
        DatasetError: if none would be left to test on.
    """
    if number == 0:
        return test, []
    tied = tied_groups(test)
    tested = {tied[s.group] for s in test if s.label == NORMAL}
    sizes = Counter(tied[s.group] for s in test if s.label == ANOMALOUS)
    groups = sorted(sizes)
    random.Random("moved").shuffle(groups)  # noqa: S311 (a split, no secret)
    groups.sort(key=tested.__contains__)
    chosen: set[str] = set()
    reached = 0
    for group in groups:
        if reached >= number:
            break
        chosen.add(group)
        reached += sizes[group]
    moved = [s for s in test if s.label == ANOMALOUS and tied[s.group] in chosen]
    rest = [s for s in test if not (s.label == ANOMALOUS and tied[s.group] in chosen)]
    if not any(s.label == ANOMALOUS for s in rest):
        raise DatasetError(f"data.moved_anomalies {number} leaves no anomalous test image")
    return rest, [replace(s, split="train") for s in moved]
