"""Every setting, typed, and which of them go together; `utils.layers` reads them from YAML.

How and where a run is computed (`RunOptions`) are flags of the command line and in no file.
"""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Literal

from utils.errors import ConfigError
from utils.yaml_io import Tree

SMALLEST_CROP = 8  # pixels
WITH_DECODER = ("uninet", "remind", "recontrast")  # their student mirrors the backbone's levels
HEAD_LOSSES = {
    "none": ("none",),
    "label": ("bce",),
    "mask": ("bce", "dice", "structure"),
    "frame": ("mse",),
}


def _number(low: float, high: float) -> dict[str, float]:
    return {"low": low, "high": high}


DefectKind = Literal["texture", "scratch", "stain", "cut", "speed", "zoom"]


@dataclass(frozen=True)
class DataConfig:
    """What is read, at which size, and what is held out. `image_size` is (height, width) in pixels, of whole
    images; with `tile` the model sees squares of that side alone.
    """

    name: str
    category: str
    image_size: tuple[int, int] = field(metadata=_number(32, 4096))
    tile: int | None = field(metadata=_number(32, 4096))
    resize: Literal["bilinear", "bicubic", "lanczos"]
    center_crop: float | None = field(metadata=_number(0.1, 8192))
    mask_threshold: float = field(metadata=_number(0, 1))
    validation_fraction: float = field(metadata=_number(0, 0.9))
    calibration_fraction: float = field(metadata=_number(0, 0.9))
    train_limit: int | None = field(metadata=_number(1, 10**9))
    num_train_anomalies: int = field(metadata=_number(0, 10**9))
    anomaly_oversampling: int = field(metadata=_number(1, 1000))
    synthetic: float = field(metadata=_number(0, 1))
    synthetic_kinds: tuple[DefectKind, ...]
    augment: Literal["none", "flip", "flip-rotate", "by-category"]
    augment_by_category: dict[str, tuple[Literal["hflip", "vflip", "rot90"], ...]]
    frame_offset: int = field(metadata=_number(0, 1000))
    stack_frames: int = field(metadata=_number(0, 1000))


@dataclass(frozen=True)
class ModelConfig:
    """The network: teachers, bottleneck, student and feature selection (paper Sec. 4.1 to 4.3)."""

    name: Literal["uninet", "remind", "recontrast", "unias", "memory-bank"]
    flavor: Literal["paper", "released", "default"]
    setting: Literal["one-class", "multi-class", "supervised"]
    backbone: str
    student_backbone: str | None
    weights: str | None
    strides: tuple[int, ...] = field(metadata=_number(1, 64))
    feature_gain: float | None = field(metadata=_number(1e-3, 1e3))
    width: float = field(metadata=_number(0.125, 32))
    mem_kernels: tuple[int, int] | None = field(metadata=_number(1, 31))
    mem_reparam: Literal["none", "parallel", "construct"]
    dfs: Literal["none", "prior", "all"]
    dfs_theta: Literal["learnable", "fixed"]
    student_activation: Literal["relu", "gelu"]
    teacher_bn: Literal["train", "eval"]
    head: Literal["none", "label", "mask", "frame"]
    head_levels: Literal["n-1", "finest"]
    skip_connections: bool
    bank_fraction: float = field(metadata=_number(1e-6, 1))


@dataclass(frozen=True)
class LossConfig:
    """Eqs. 7 to 13: which terms, how they are read, and their weights."""

    kd: Literal["global", "pointwise"]
    hard_ratio: float = field(metadata=_number(1e-4, 1))
    stop_grad: Literal["kd", "all", "none"]
    reduction: Literal["paper", "released"]
    terms: tuple[Literal["contrastive", "margin"], ...]
    temperature: float = field(metadata=_number(1e-3, 1e3))
    kd_weight: float = field(metadata=_number(0, 1))
    anomaly_source: Literal["label", "mask", "none"]
    supervised: Literal["none", "bce", "dice", "structure", "mse"]


@dataclass(frozen=True)
class ScoreConfig:
    """From the 2n distance maps to one map and one number an image (Sec. 4.5, Alg. 1). Sigmas in pixels."""

    decision: Literal["weighted", "weighted-distance", "max", "top1", "top3", "top5", "top10", "mean"]
    alpha: float = field(metadata=_number(0, 1))
    beta: float = field(metadata=_number(0, 1))
    score_sigma: float = field(metadata=_number(0, 100))
    map_sigma: float = field(metadata=_number(0, 100))
    blur_size: int | None = field(metadata=_number(1, 99))
    head_weight: float = field(metadata=_number(0, 1e6))


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and its schedule. `preset` one-class: plain AdamW; multi-class: eps 1e-10 and amsgrad."""

    preset: Literal["one-class", "multi-class"]
    lr: float = field(metadata=_number(0, 1))
    lr_teacher: float = field(metadata=_number(0, 1))
    weight_decay: float = field(metadata=_number(0, 1))
    schedule: Literal["constant", "step", "tenth", "cosine"]
    grad_clip: float | None = field(metadata=_number(1e-6, 1e6))
    warmup: int = field(metadata=_number(0, 10**7))


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, on what, and how often something is written. Counts are in iterations."""

    iterations: int = field(metadata=_number(1, 10**8))
    epochs: float | None = field(metadata=_number(1e-6, 10**6))
    batch_size: int = field(metadata=_number(1, 65536))
    last_batch: Literal["carry", "drop", "keep"]
    scales: tuple[float, ...] = field(metadata=_number(0.25, 4))
    seed: int = field(metadata=_number(0, 2**32 - 1))
    precision: Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and when. `select: best` looks at the test set and says so in every output."""

    split: Literal["test", "validation", "none"]
    select: Literal["last", "best"]
    every: int = field(metadata=_number(0, 10**8))


@dataclass(frozen=True)
class RunOptions:
    """How and where a run is computed: flags of the command line, no part of the experiment.

    They change no result, except that `eval_precision` rounds it. What `skip_unreadable` leaves out is not in
    the fingerprint of a run's images. A checkpoint keeps them as defaults for the commands that use it.
    """

    data_root: str | None = None
    skip_unreadable: bool = False
    extra_metrics: tuple[Literal["aupimo", "dsc_unias", "soft_dsc"], ...] = ()
    device: str = "auto"
    workers: int | None = field(default=None, metadata=_number(0, 256))
    cache_gb: float = field(default=4.0, metadata=_number(0, 10**4))
    save_every: int = field(default=500, metadata=_number(1, 10**8))
    eval_batch_size: int = field(default=16, metadata=_number(1, 65536))
    eval_precision: Literal["auto", "fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Config:
    """Every setting of a run, one section per part of the system, and how it is run."""

    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    score: ScoreConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    run: RunOptions = RunOptions()

    def to_dict(self) -> Tree:
        """Every setting as plain dictionaries and lists, as in config.yaml; without `run`."""
        return {name: _plain(part) for name, part in asdict(self).items() if name != "run"}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def scaled_side(side: int, scale: float) -> int:
    """Pixels of a side at one of `train.scales`, a multiple of 32: every level has whole positions."""
    return side if scale == 1 else max(32, round(side * scale / 32) * 32)


def check_together(config: Config) -> None:
    """Stop at settings that are each allowed, but not together. Raises ConfigError naming them, and what goes
    with what.
    """
    head, loss = config.model.head, config.loss.supervised
    if loss not in HEAD_LOSSES[head]:
        raise ConfigError(
            f"model.head {head} and loss.supervised {loss} do not go together; "
            f"with that head loss.supervised is one of {', '.join(HEAD_LOSSES[head])}"
        )
    if config.data.frame_offset and head != "frame":
        raise ConfigError("data.frame_offset needs a model that looks at frames: model.head=frame")
    if head == "frame" and config.data.synthetic:
        raise ConfigError(
            "data.synthetic draws defects on single images; a frame head needs data.synthetic=0"
        )
    kinds = set(config.data.synthetic_kinds if config.data.synthetic else ())
    if not config.data.stack_frames and kinds & {"speed", "zoom"}:
        raise ConfigError("synthetic defects of the kinds speed and zoom need data.stack_frames, such as 1")
    if config.data.stack_frames and head == "frame":
        raise ConfigError(
            "data.stack_frames makes one image of three frames; model.head=frame needs data.stack_frames=0"
        )
    if config.data.synthetic and not config.data.synthetic_kinds:
        raise ConfigError("data.synthetic_kinds is empty; data.synthetic needs kinds to draw from")
    if config.model.setting == "supervised" and config.model.name not in ("uninet", "remind"):
        raise ConfigError(
            f"--setting supervised is for uninet and remind; {config.model.name} learns from normal images"
        )
    if head == "frame" and (config.data.augment != "none" or config.train.scales != (1.0,)):
        raise ConfigError("data.augment and train.scales are for single images; video needs none and [1.0]")
    if config.data.augment == "by-category":
        height, width = config.data.image_size
        if height != width and any("rot90" in names for names in config.data.augment_by_category.values()):
            raise ConfigError(
                f"data.augment_by_category turns images (rot90), which needs square ones; data.image_size is "
                f"{[height, width]}: set another, or --set data.augment=none"
            )
    if config.score.blur_size is not None and config.score.blur_size % 2 == 0:
        raise ConfigError(f"score.blur_size {config.score.blur_size} must be odd: a kernel has a middle")
    if not config.train.scales:
        raise ConfigError("train.scales is empty; one size is [1.0]")
    _check_levels(config)
    _check_sizes(config)
    if config.model.student_backbone and config.model.name not in WITH_DECODER:
        raise ConfigError(
            f"model.student_backbone is for {', '.join(WITH_DECODER)}, not for {config.model.name}"
        )


def _check_levels(config: Config) -> None:
    model, strides = config.model, list(config.model.strides)
    least = 2 if model.name == "memory-bank" else 1
    if len(strides) < least:
        raise ConfigError(f"model.strides is {strides}; {model.name} needs {least} at least, such as [8, 16]")
    if model.name in WITH_DECODER and any(b != 2 * a for a, b in pairwise(strides)):
        raise ConfigError(f"model.strides is {strides}; each is twice the one before, such as [4, 8, 16]")
    if any(kernel % 2 == 0 for kernel in model.mem_kernels or ()):
        raise ConfigError(f"model.mem_kernels is {model.mem_kernels}; kernels have odd sides")


def _check_sizes(config: Config) -> None:
    crop = config.data.center_crop
    if crop is not None and crop > 1 and (crop < SMALLEST_CROP or crop % 1):
        raise ConfigError(
            f"data.center_crop is {crop:g}; above 1 it is a side in whole pixels, at least {SMALLEST_CROP}, "
            "and up to 1 a share of each side"
        )
    data, model = config.data, config.model
    seen, sizes = ("image_size", data.image_size) if data.tile is None else ("tile", (data.tile,))
    multiple = 2 * model.strides[-1]
    for scale in (1.0, *config.train.scales) if model.name in WITH_DECODER else ():
        scaled = [scaled_side(n, scale) for n in sizes]
        if any(n % multiple for n in scaled):
            shown = list(sizes) if data.tile is None else data.tile
            found = "" if scale == 1 else f", and train.scales {scale:g} gives {scaled}"
            raise ConfigError(
                f"data.{seen} {shown} must be multiples of {multiple}, twice the coarsest stride{found}"
            )
    if data.tile is None:
        return
    if data.tile > min(data.image_size):
        raise ConfigError(
            f"data.tile {data.tile} is larger than data.image_size {list(data.image_size)}, the size "
            "of whole images: set that to what they are worked on at, such as --set data.image_size=1024"
        )
    if model.head in ("label", "frame"):
        raise ConfigError(f"data.tile does not go with model.head {model.head}, which judges whole images")
