"""Every setting, typed, and which of them go together; `utils.layers` reads them from YAML.

How and where a run is computed (`RunOptions`) are flags of the command line and in no file.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal

from utils.errors import ConfigError
from utils.yaml_io import Tree

SMALLEST_CROP = 8  # pixels
MODELS = ("uninet", "remind", "recontrast", "unias", "memory-bank")
WITH_DECODER = ("uninet", "remind", "recontrast")  # their student mirrors the backbone's levels
HEAD_LOSSES: dict[str, tuple[str, ...]] = {"none": ("none",), "label": ("bce",), "speed": ("none",)}
HEAD_LOSSES |= {"mask": ("bce", "dice", "structure"), "frame": ("mse",)}


def _number(low: float, high: float) -> dict[str, Any]:
    return {"low": low, "high": high}


def _with(key: str, *values: str) -> dict[str, Any]:
    """What has this is read only where the setting `key` has one of these values."""
    return {"key": key, "values": values}


UNINET = _with("model.name", "uninet")
TWO_TEACHERS = _with("model.name", "uninet", "recontrast")
DECODER = _with("model.name", *WITH_DECODER)
TRAINED = _with("model.name", *WITH_DECODER, "unias")
WEIGHTED = _with("score.decision", "weighted", "weighted-distance")
BY_CATEGORY = _with("data.augment", "by-category")
DefectKind = Literal["texture", "scratch", "stain", "cut", "moved", "speed", "zoom"]
Operation = Literal["hflip", "vflip", "rot90"]
Term = Literal["contrastive", "margin", "repair", "adapt"]


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
    augment: Literal["none", "flip", "flip-rotate", "by-category"] = field(metadata=TRAINED)
    augment_by_category: dict[str, tuple[Operation, ...]] = field(metadata=BY_CATEGORY)
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
    feature_gain: float | None = field(metadata=_number(1e-3, 1e3) | DECODER)
    width: float = field(metadata=_number(0.125, 32) | DECODER)
    mem_kernels: tuple[int, int] | None = field(metadata=_number(1, 31) | DECODER)
    mem_reparam: Literal["none", "parallel", "construct"] = field(metadata=DECODER)
    dfs: Literal["none", "prior", "all"] = field(metadata=TWO_TEACHERS)
    dfs_theta: Literal["learnable", "fixed"] = field(metadata=TWO_TEACHERS)
    student_activation: Literal["relu", "gelu"] = field(metadata=DECODER)
    teacher_bn: Literal["train", "eval"] = field(metadata=TWO_TEACHERS)
    head: Literal["none", "label", "mask", "frame", "speed"]
    head_levels: Literal["n-1", "finest"] = field(metadata=_with("model.head", "label", "mask"))
    skip_connections: bool
    bank_fraction: float = field(metadata=_number(0, 1) | _with("model.name", "remind", "memory-bank"))


@dataclass(frozen=True)
class LossConfig:
    """Eqs. 7 to 13: which terms, how they are read, and their weights."""

    kd: Literal["global", "pointwise"] = field(metadata=UNINET)
    hard_ratio: float = field(metadata=_number(1e-4, 1) | _with("model.name", "remind"))
    stop_grad: Literal["kd", "all", "none"] = field(metadata=UNINET)
    reduction: Literal["paper", "released"] = field(metadata=UNINET)
    terms: tuple[Term, ...] = field(metadata=_with("model.name", "uninet", "remind"))
    temperature: float = field(metadata=_number(1e-3, 1e3) | UNINET)
    kd_weight: float = field(metadata=_number(0, 1) | UNINET)
    anomaly_source: Literal["label", "mask", "none"] = field(metadata=UNINET)
    supervised: Literal["none", "bce", "dice", "structure", "mse"]


@dataclass(frozen=True)
class ScoreConfig:
    """From the 2n distance maps to one map and one number an image (Sec. 4.5, Alg. 1). Sigmas in pixels."""

    decision: Literal["weighted", "weighted-distance", "max", "top1", "top3", "top5", "top10", "mean"]
    alpha: float = field(metadata=_number(0, 1) | WEIGHTED)
    beta: float = field(metadata=_number(0, 1) | WEIGHTED)
    score_sigma: float = field(metadata=_number(0, 100))
    map_sigma: float = field(metadata=_number(0, 100))
    blur_size: int | None = field(metadata=_number(1, 99))
    head_weight: float = field(metadata=_number(0, 1e6) | _with("model.head", "label", "frame"))


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and its schedule. `preset` one-class: plain AdamW; multi-class: eps 1e-10 and amsgrad."""

    preset: Literal["one-class", "multi-class"] = field(metadata=TRAINED)
    lr: float = field(metadata=_number(0, 1) | TRAINED)
    lr_teacher: float = field(metadata=_number(0, 1) | TWO_TEACHERS)
    weight_decay: float = field(metadata=_number(0, 1) | TRAINED)
    schedule: Literal["constant", "step", "tenth", "cosine"] = field(metadata=TRAINED)
    grad_clip: float | None = field(metadata=_number(1e-6, 1e6) | TRAINED)
    warmup: int = field(metadata=_number(0, 10**7) | TRAINED)


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
    graph: Literal["auto", "off"] = "auto"


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
        sections = {name: part for name, part in asdict(self).items() if name != "run"}
        return json.loads(json.dumps(sections))  # tuples become lists


def scaled_side(side: int, scale: float) -> int:
    """Pixels of a side at one of `train.scales`, a multiple of 32: every level has whole positions."""
    return side if scale == 1 else max(32, round(side * scale / 32) * 32)


def check_evaluations(config: Config) -> None:
    """Stop where none of the evaluations that `eval` promises takes place in a training of known length."""
    every, steps = config.eval.every, 0 if config.model.name == "memory-bank" else config.train.iterations
    if every > steps or (config.eval.select == "best" and every == 0):
        way_out = "take one within the steps, or 0 with --select last"
        raise ConfigError(f"eval.every {every} evaluates nothing in a training of {steps} steps; {way_out}")


def unread(config: Config, before: Config, keys: Iterable[str]) -> Iterator[str]:
    """In words, each setting among `keys` that is not as in `before` although nothing reads it."""
    for section, _, name in (key.partition(".") for key in keys):
        part, earlier = getattr(config, section), getattr(before, section)
        spec = next(f for f in fields(part) if f.name == name).metadata
        where, wanted = spec.get("key", "model.name"), spec.get("values", MODELS)
        if section == "score" and config.model.head == "mask":  # map and score are its probability
            where, wanted = "model.head", ("none", "label", "frame", "speed")
        found = attrgetter(where)(config)
        if found not in wanted and getattr(part, name) != getattr(earlier, name):
            yield f"{section}.{name} changes nothing with {where} {found}; it is for {' or '.join(wanted)}"


def check_together(config: Config) -> None:
    """Stop at settings that are each allowed, but not together: the ConfigError says what goes with what."""
    for problem in _problems(config):
        raise ConfigError(problem)


def _problems(config: Config) -> Iterator[str]:
    data, model, train, head = config.data, config.model, config.train, config.model.head
    loss, strides = config.loss.supervised, list(model.strides)
    if loss not in HEAD_LOSSES[head]:
        allowed = f"with that head loss.supervised is one of {', '.join(HEAD_LOSSES[head])}"
        yield f"model.head {head} and loss.supervised {loss} do not go together; {allowed}"
    if data.frame_offset and head != "frame":
        yield "data.frame_offset needs a model that looks at frames: model.head=frame"
    if head == "frame" and data.synthetic:
        yield "data.synthetic draws defects on single images; a frame head needs data.synthetic=0"
    if data.synthetic and not data.stack_frames and {"speed", "zoom"} & set(data.synthetic_kinds):
        yield "synthetic defects of the kinds speed and zoom need data.stack_frames, such as 1"
    if data.stack_frames and head == "frame":
        yield "data.stack_frames makes one image of three; model.head=frame needs data.stack_frames=0"
    if head == "speed" and (model.name != "remind" or not data.stack_frames):
        yield "model.head speed is for remind on several frames: --model remind and data.stack_frames"
    for term in sorted({"adapt", "repair"} & {*config.loss.terms}):
        if model.name != "remind" or not (data.synthetic or model.setting == "supervised"):
            yield f"loss.terms {term} is for remind with defects in training, as of data.synthetic=0.5"
    if data.synthetic and not data.synthetic_kinds:
        yield "data.synthetic_kinds is empty; data.synthetic needs kinds to draw from"
    if model.setting == "supervised" and model.name not in ("uninet", "remind"):
        yield f"--setting supervised is for uninet and remind; {model.name} learns from normal images"
    if head == "frame" and (data.augment != "none" or train.scales != (1.0,)):
        yield "data.augment and train.scales are for single images; video needs none and [1.0]"
    turned = any("rot90" in names for names in data.augment_by_category.values())
    if data.augment == "by-category" and turned and data.image_size[0] != data.image_size[1]:
        sides = f"needs square ones, not {list(data.image_size)}"
        yield f"data.augment by-category turns images and {sides}; --set data.augment=none does not"
    if config.score.blur_size is not None and config.score.blur_size % 2 == 0:
        yield f"score.blur_size {config.score.blur_size} must be odd: a kernel has a middle"
    if model.name == "memory-bank" and model.bank_fraction == 0:
        yield "model.bank_fraction 0 leaves memory-bank nothing to compare with; 0.1 is usual"
    least = {"memory-bank": 2, "remind": 1 + (model.bank_fraction > 0)}.get(model.name, 1)
    if len(strides) < least:
        without = ", or model.bank_fraction=0" if model.name == "remind" and strides else ""
        yield f"model.strides is {strides}; {model.name} needs {least} at least, such as [8, 16]{without}"
    if model.name in WITH_DECODER and any(b not in (a, 2 * a) for a, b in pairwise(strides)):
        yield f"model.strides is {strides}; each is twice the one before, such as [4, 8, 16], or the same"
    if any(kernel % 2 == 0 for kernel in model.mem_kernels or ()):
        yield f"model.mem_kernels is {model.mem_kernels}; kernels have odd sides"
    if model.student_backbone and model.name not in WITH_DECODER:
        yield f"model.student_backbone is for {', '.join(WITH_DECODER)}, not for {model.name}"
    yield from _problems_of_sizes(config)


def _problems_of_sizes(config: Config) -> Iterator[str]:
    data, model, crop = config.data, config.model, config.data.center_crop
    whole = list(data.image_size)
    if not config.train.scales:
        yield "train.scales is empty; one size is [1.0]"
    if crop is not None and crop > 1 and (crop < SMALLEST_CROP or crop % 1):
        yield f"data.center_crop is {crop:g}; above 1 it is a side in whole pixels, at least {SMALLEST_CROP}"
    name, sizes = (f"image_size {whole}", whole) if data.tile is None else (f"tile {data.tile}", [data.tile])
    multiple = 2 * model.strides[-1]
    for scale in (1.0, *config.train.scales) if model.name in WITH_DECODER else ():
        scaled = [scaled_side(n, scale) for n in sizes]
        if any(n % multiple for n in scaled):
            found = "" if scale == 1 else f", and train.scales {scale:g} gives {scaled}"
            yield f"data.{name} must be multiples of {multiple}, twice the coarsest stride{found}"
    if data.tile and data.tile > min(data.image_size):
        yield f"data.tile {data.tile} is larger than data.image_size {whole}, the size of whole images"
    if data.tile and model.head in ("label", "frame", "speed"):
        yield f"data.tile does not go with model.head {model.head}, which judges whole images"
