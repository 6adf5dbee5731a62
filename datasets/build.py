"""From a configuration to the sets of a run: training, calibration, validation and test."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from datasets import splits
from datasets.check import Skipped, check_masks, filter_unreadable
from datasets.demo import write_demo
from datasets.files import IMAGE_SUFFIXES, find_images, natural_order, unused_files
from datasets.loader import ImageSet
from datasets.registry import collect, spec_of
from datasets.samples import ANOMALOUS, NORMAL, UNKNOWN, Sample, check_splits, with_unused
from datasets.synthetic import DEFECT_KINDS, SyntheticTraining, SyntheticValidation
from datasets.transforms import Decode, Normalise
from datasets.video import FrameSet, with_earlier_frames
from utils.config import Config, DataConfig
from utils.errors import ConfigError, DatasetError
from utils.files import relative_to
from utils.layers import config_file, load_config
from utils.yaml_io import Tree

DEMO_ROOT = Path(__file__).resolve().parent.parent / "data" / "demo"
_log = logging.getLogger("uninet")


@dataclass
class RunData:
    """The disjoint sets of a run.

    scale: normals that a score's unit is measured on, if not on those of training. validation: None unless
    it is asked for, as it costs training images. trained_defects: the kinds of anomaly that training sees.
    skipped: unreadable files that were left out, with the reason.
    """

    train: ImageSet
    scale: ImageSet
    calibration: ImageSet
    test: ImageSet
    validation: ImageSet | None
    trained_defects: frozenset[str]
    skipped: Skipped

    def evaluated(self, split: str) -> ImageSet:
        """The set that `eval.split` names."""
        assert split != "validation" or self.validation is not None
        return self.validation if split == "validation" and self.validation else self.test


@dataclass
class Parts:
    """The disjoint samples of a run. synthetic: validation is of normals that are to be given defects."""

    train: list[Sample]
    scale: list[Sample]
    calibration: list[Sample]
    validation: list[Sample]
    synthetic: bool
    test: list[Sample]
    skipped: Skipped

    @property
    def trained(self) -> list[Sample]:
        """What the model, its calibration or its settings depend on."""
        return [*self.train, *self.scale, *self.calibration, *self.validation]

    @property
    def defects(self) -> frozenset[str]:
        """The kinds of anomaly that training sees."""
        return frozenset(s.defect for s in self.train if s.label == ANOMALOUS)


def dataset_root(config: Config) -> Path | None:
    """The dataset's folder, resolved; the demo is written where it is missing."""
    root = Path(config.run.data_root).expanduser().resolve() if config.run.data_root else None
    return write_demo(root or DEMO_ROOT) if spec_of(config.data.name).name == "demo" else root


def categories_of(config: Config) -> list[str]:
    """Names of the categories that `data.category` stands for, in order; all are checked."""
    samples = _collect(config, warn=False)  # build_data warns
    return list(dict.fromkeys(s.category for s in samples))


def list_samples(config: Config) -> tuple[list[Sample], Skipped]:
    """The dataset's samples, and with `run.skip_unreadable` the files that were left out of them."""
    data, samples = config.data, _collect(config)
    if data.stack_frames:
        samples = with_earlier_frames(samples, data.stack_frames)
    return _readable(data, samples) if config.run.skip_unreadable else (samples, {})


def _collect(config: Config, *, warn: bool = True) -> list[Sample]:
    data, root, incomplete = config.data, dataset_root(config), config.run.skip_unreadable
    return collect(spec_of(data.name), root, data.category, warn=warn, incomplete=incomplete)


def _readable(data: DataConfig, samples: list[Sample]) -> tuple[list[Sample], Skipped]:
    spec, (kept, skipped) = spec_of(data.name), filter_unreadable(samples, data.mask_threshold)
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


def new_samples(paths: Sequence[Path], where: Path, config: Config) -> list[Sample]:
    """Images found at `where`, as samples of unknown label. Raises DatasetError if there is none."""
    data = config.data
    if not paths:
        message = f"no image at {where}; images end in {', '.join(IMAGE_SUFFIXES)}"
        raise DatasetError(with_unused(message, unused_files(where, ())) if where.is_dir() else message)
    if not data.stack_frames:
        return [Sample(p, UNKNOWN, None, data.category, "predict", "", str(p)) for p in paths]
    frames = sorted(paths, key=lambda path: (path.parent, natural_order(path)))  # a folder is a clip
    clip, number = Counter(p.parent for p in frames).most_common()[-1]
    if number < 3 * data.stack_frames:  # of which the judged frame would be its own earlier one
        least = f"{3 * data.stack_frames} frames that this model needs of a clip"
        raise DatasetError(f"the folder {clip} has {number} of the {least}")
    clips = [Sample(p, UNKNOWN, None, data.category, "predict", "", str(p.parent)) for p in frames]
    return with_earlier_frames(clips, data.stack_frames)


def split_samples(config: Config) -> Parts:
    """The parts of the dataset that is trained on.

    Raises DatasetError if there is nothing to train or to validate with; ConfigError for settings that clash.
    """
    data, seed, spec = config.data, config.train.seed, spec_of(config.data.name)
    if data.frame_offset and (data.train_limit or data.num_train_anomalies or config.run.skip_unreadable):
        keys = "data.train_limit, data.num_train_anomalies and --skip-unreadable"
        raise ConfigError(f"{keys} leave gaps between frames; they need data.frame_offset=0")
    if data.stack_frames and data.num_train_anomalies:
        raise ConfigError("data.num_train_anomalies takes frames out of test clips: set data.stack_frames=0")
    if data.stack_frames and not spec.video:
        raise ConfigError(f"data.stack_frames needs the frames of a video; {spec.name} has single images")
    samples, skipped = list_samples(config)
    known = {*spec.counts} | {s.category for s in samples}
    odd = data.augment_by_category.keys() - known if spec.counts or data.category == "all" else ()
    if odd:
        names = f"{', '.join(sorted(odd))}, found: {', '.join(sorted(known))}"
        raise ConfigError(f"data.augment_by_category names no category of {spec.name}: {names}")
    test, moved = splits.move_anomalies([s for s in samples if s.split == "test"], data.num_train_anomalies)
    normal = [s for s in samples if s.split == "train" and s.label == NORMAL]
    anomalous = [s for s in [*samples, *moved] if s.split == "train" and s.label == ANOMALOUS]
    if spec.drops_copies:
        normal, anomalous = (splits.without_copies(part, test) for part in (normal, anomalous))
    normal, calibration = splits.hold_out(normal, data.calibration_fraction, seed=seed)
    if data.calibration_fraction and normal and not calibration:
        _log.warning("the training images (%d) leave none to hold out, so there are no p-values", len(normal))
    if calibration:
        tied = splits.tied_groups([*calibration, *anomalous])
        apart = {tied[s.group] for s in calibration}
        anomalous = [s for s in anomalous if tied[s.group] not in apart]  # items that are held out stay out
        first = splits.first_copies(s.path for s in calibration)
        calibration = [s for s in calibration if first[s.path] == s.path]  # copies say nothing new
    scale: list[Sample] = []
    if config.model.head == "speed":  # on frames of the training the maps' score spreads less
        normal, scale = splits.hold_out(normal, data.validation_fraction, seed=seed)
        if not scale:
            way_out = "two clips that share no frame, data.validation_fraction above 0, or model.head=none"
            raise DatasetError(f"model.head=speed holds a clip out, and found none to spare; take {way_out}")
    supervised = config.model.setting == "supervised"
    train = [*normal, *anomalous] if supervised else normal
    validation = [s for s in samples if s.split == "validation"]
    synthetic = False
    during_training = config.eval.every > 0 and config.eval.select == "last"
    if (config.eval.split == "validation" or during_training) and not validation:
        if spec.segmentation or config.model.head == "frame":
            raise ConfigError(f"{spec.name} has no validation images: no eval.every, no --eval validation")
        train, validation = splits.hold_out(train, data.validation_fraction, seed=seed)
        if not validation:
            raise DatasetError(f"{len(train)} training images leave none for data.validation_fraction")
        synthetic = all(s.label == NORMAL for s in validation)  # real ones where they are known
    train = splits.limit(train, data.train_limit, seed=seed)
    if supervised and all(s.label == NORMAL for s in train):
        way_out = "data.num_train_anomalies=N moves some there, and data.train_limit may leave all out"
        raise DatasetError(f"{spec.name} has no anomalous training image for --setting supervised; {way_out}")
    if not train:
        raise DatasetError(f"{spec.name} has no normal training image; it is for --setting supervised")
    train += [s for s in train if s.label == ANOMALOUS] * (data.anomaly_oversampling - 1)
    return Parts(train, scale, calibration, validation, synthetic, test, skipped)


def build_data(config: Config, normalise: Normalise) -> RunData:
    """List, check and split the samples of a run; of the files only masks are decoded yet, to look at them.

    Raises as `split_samples`, and DatasetError if masks are missing or empty, or a test image is trained on.
    """
    data, parts = config.data, split_samples(config)
    images = partial(image_set, config, normalise)
    steps = config.train.iterations if config.train.epochs is None else None
    once = steps is not None and steps * config.train.batch_size <= len(parts.train)
    cache_gb = 0.0 if once else config.run.cache_gb  # what is read once is not kept
    train = images(parts.train, cache_gb=cache_gb, training=True)
    _check_masks_are_there(config, train)
    splits.check_disjoint(parts.trained, parts.test)
    left = cache_gb - train.cached * train.image_bytes / 2**30
    validation = images(parts.validation, cache_gb=left) if parts.validation else None
    if validation is not None and parts.synthetic:
        validation = SyntheticValidation(validation, seed=config.train.seed, kinds=validation_kinds(data))
    scale, calibration, test = map(images, (parts.scale, parts.calibration, parts.test))
    _look_at_masks(data, [*parts.train, *parts.validation, *parts.test], test.decode)
    return RunData(train, scale, calibration, test, validation, parts.defects, parts.skipped)


def _check_masks_are_there(config: Config, train: ImageSet) -> None:
    lacking = [s.path for s in train.samples if s.label == ANOMALOUS and s.mask_path is None]
    masked_head = config.model.head == "mask"
    if not lacking:
        return
    if config.model.name == "remind":
        use, way_out = "its head needs", "leave these images out: --setting one-class"
    elif masked_head or config.loss.anomaly_source == "mask":
        use, way_out = "the loss needs", "learn from labels alone: --set loss.anomaly_source=label"
        way_out += " --set model.head=label --set loss.supervised=bce" if masked_head else ""
    elif config.data.tile:
        use, way_out = "tell which tiles are anomalous", "train without data.tile"
    else:
        return
    lacks = f"{config.data.name} lacks masks of anomalous training images (of {lacking[0]}, for one)"
    raise DatasetError(f"{lacks}, which {use}; add them, or {way_out}")


def trained_parts(config: Config, identity: Tree | None) -> Parts | None:
    """What a model depends on, or None; a warning tells if it is gone, or is not as the run's `identity`."""
    root, text = dataset_root(config), "the training images %s %s: overlap with them is not checked"
    parts = split_samples(config) if root and root.is_dir() else None
    then = (identity or {}).get("data", {}).get("trained")
    if parts is None:
        _log.warning(text, "are not at", root)
    elif then and then != splits.names_and_sizes(parts.trained, root):
        _log.warning(text, "are no longer those at", root)
    return parts


def build_test(
    config: Config, trained: Config, normalise: Normalise, *, identity: Tree | None = None
) -> tuple[ImageSet, frozenset[str], Skipped]:
    """The test set of `config` for a model that was trained as `trained` says, the defects it has seen, and
    the unreadable files that were left out. Raises DatasetError if a test image was trained on.
    """
    data = config.data
    keys = ("name", "category", "num_train_anomalies")
    same = all(getattr(data, key) == getattr(trained.data, key) for key in keys)
    root, tested_root = dataset_root(trained), dataset_root(config)
    if trained.data.name == data.name and not (root and root.is_dir()):  # the dataset has moved
        trained, root = replace(trained, run=config.run), tested_root
    parts = trained_parts(trained, identity)
    if same and parts is not None and root == tested_root:
        test, skipped = parts.test, parts.skipped
        if config.run.skip_unreadable and not trained.run.skip_unreadable:
            test, skipped = _readable(data, test)
    else:
        samples, skipped = list_samples(config)
        test, _ = splits.move_anomalies([s for s in samples if s.split == "test"], data.num_train_anomalies)
    if parts is not None:
        splits.check_disjoint(parts.trained, test)
    images = image_set(config, normalise, test)
    _look_at_masks(data, test, images.decode)
    return images, parts.defects if same and parts is not None else frozenset(), skipped


def _look_at_masks(data: DataConfig, samples: Sequence[Sample], decode: Decode) -> None:
    for warning in check_masks(data.name, samples, decode):
        _log.warning("%s", warning)


def image_set(
    config: Config,
    normalise: Normalise,
    samples: Sequence[Sample],
    *,
    cache_gb: float = 0,
    training: bool = False,
) -> ImageSet:
    """The samples as a set, read as the configuration says."""
    data = config.data
    decode = Decode(data.image_size, data.resize, data.center_crop, data.mask_threshold)
    images = ImageSet(samples, decode, normalise, cache_gb=cache_gb)
    if config.model.head == "frame":
        images = FrameSet(images, frame_offset=data.frame_offset)
    elif training and data.synthetic:
        images = SyntheticTraining(
            images, share=data.synthetic, kinds=data.synthetic_kinds, seed=config.train.seed
        )
        images.with_clean = "repair" in config.loss.terms
        images.degrades = "adapt" in config.loss.terms  # its teacher would learn how defects are drawn
    if spec_of(data.name).video:
        images.kind = "video"
    elif config.model.head == "mask":
        images.kind = "segmentation"
    return images


def images_below(where: Path, config: Config, normalise: Normalise) -> ImageSet:
    """The image at `where`, or all below that folder, as a set. Raises DatasetError if there is none."""
    return image_set(config, normalise, new_samples(find_images(where), where, config))


def validation_kinds(data: DataConfig) -> tuple[str, ...]:
    """Defect types of validation: those not in `data.synthetic_kinds`, or the first four if none is left."""
    known = (*DEFECT_KINDS, "zoom") if data.stack_frames else DEFECT_KINDS  # speed needs frames of the set
    return tuple(kind for kind in known if kind not in data.synthetic_kinds) or DEFECT_KINDS


def read_as(name: str, category: str, config: Config) -> DataConfig:
    """How a model that was trained as `config` says reads another dataset: as that one's own file says."""
    data, model = config.data, config.model
    chosen: dict[str, object] = {"data.tile": data.tile, "data.category": category}
    chosen |= {"model.name": model.name, "model.backbone": model.backbone}
    if model.name == "remind":  # its heads are not what the other's file has
        chosen |= {"model.head": model.head, "data.synthetic": data.synthetic}
    if model.flavor != "default":
        chosen["model.flavor"] = model.flavor
    return load_config(config_file(spec_of(name).name), chosen | {"data.name": name}, category=category).data


def data_identity(config: Config, data: RunData) -> Tree:
    """What a run is made of besides its settings, as plain types: roots, numbers of images, a fingerprint.

    The fingerprint covers each sample's set, label, category and kind of defect, and the path below the root
    and the `content_digest` of its image, its masks and its earlier frames.
    """
    root, weights = dataset_root(config), config.model.weights
    sets = {"train": data.train, "calibration": data.calibration, "validation": data.validation}
    sets |= {"scale": data.scale} if data.scale else {}  # runs without it keep their identity
    samples = {name: part.samples if part else [] for name, part in (sets | {"test": data.test}).items()}
    digest, content = hashlib.sha256(), cache(splits.content_digest)  # a frame is in several samples
    for name, s in ((name, s) for name, part in samples.items() for s in part):
        lines = [f"{s.label}|{s.category}|{s.defect}"]
        lines += [f"{relative_to(path, root)}|{content(path)}" for path in (s.path, *s.masks, *s.earlier)]
        for line in lines:
            digest.update(f"{name}|{line}\n".encode(errors="surrogateescape"))
    return {
        "root": str(root),
        "images": {name: len(part) for name, part in samples.items()},
        "fingerprint": digest.hexdigest()[:16],
        "trained": splits.names_and_sizes((s for name in sets for s in samples[name]), root),
        "weights": splits.content_digest(Path(weights)) if weights not in (None, "random") else None,
    }
