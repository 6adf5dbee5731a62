"""Typed configuration: five layers of YAML merged in a fixed order, checked once, then frozen.

The layers (later wins): base.yaml < backbones/NAME.yaml < flavors/NAME.yaml or models/NAME.yaml < the
dataset's file < the command line. `configs/base.yaml` holds every key with its meaning; other files hold
differences only. A file may hold blocks `settings.NAME`, `categories.NAME` and `flavors.NAME` (of a flavor or
a model), one inside the other: those that are chosen win over what stands beside them, in that order. One
model for all categories has no category, so no block by category applies to it.

A run's config.yaml holds every setting and stands alone: no other layer than base.yaml and the command line.
How and where a run is computed (`RunOptions`) are flags of the command line and in no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from utils.config_rules import check_together
from utils.errors import ConfigError
from utils.typed import build, mapping, merge, nested, shown
from utils.yaml_io import CONFIGS, Tree, read_yaml

MODELS = ("uninet", "remind", "recontrast", "unias", "memory-bank")
FLAVORS = ("paper", "released")
SETTINGS = ("one-class", "multi-class", "supervised")
POLYP = ("kvasir", "clinicdb", "colondb")
# in place of what a dataset's file says for uninet's heads, for another model
NO_HEAD: Tree = {
    "model": {"head": "none", "skip_connections": False},
    "loss": {"supervised": "none"},
    "data": {"frame_offset": 0},
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
    skip_unreadable: bool


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
    contrastive: bool
    margin: bool
    temperature: float = field(metadata=_number(1e-3, 1e3))
    kd_weight: float = field(metadata=_number(0, 1))
    anomaly_source: Literal["label", "mask", "none"]
    supervised: Literal["none", "bce", "dice", "structure", "mse"]


@dataclass(frozen=True)
class ScoreConfig:
    """From the 2n distance maps to one map and one number an image (Sec. 4.5, Alg. 1). Sigmas in pixels."""

    decision: Literal["weighted", "max", "top1", "top3", "top5", "top10", "mean"]
    decision_values: Literal["probability", "distance"]
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
    extra_metrics: tuple[Literal["aupimo", "dsc_unias", "soft_dsc"], ...]


@dataclass(frozen=True)
class RunOptions:
    """How and where a run is computed: flags of the command line, no part of the experiment.

    They change no result, except that `eval_precision` rounds it. A checkpoint keeps them as defaults for
    test.py, predict.py and export.py.
    """

    data_root: str | None = None
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


def load_config(path: str | Path, overrides: Mapping[str, object], *, category: str | None = None) -> Config:
    """Merge the layers for one run.

    Args:
        path: the dataset's file in `configs/`, or a config.yaml saved by a run.
        overrides: dotted keys of the command line, such as {"train.iterations": 200}, which win over every
            file; those of `RunOptions` begin with "run.".
        category: the category to train, for the blocks by category (None: none of them applies).

    Raises:
        ConfigError: for an unknown key (the nearest one is named), a wrong type, a value out of range, or an
            override that chooses another layer where the file is complete.
    """
    dataset, base, chosen = read_yaml(path), read_yaml(CONFIGS / "base.yaml"), nested(overrides)
    if "run" in dataset:
        raise ConfigError(f"'run' in {path} is no section of a config; flags say how a run is computed")
    if _is_complete(dataset, base):
        _check_same_layers(path, dataset, overrides)
        layers = [base, dataset, chosen]
    else:
        layers = _layers(base, dataset, chosen, category)
    config = build(Config, merge(layers))
    check_together(config)
    return config


def config_file(dataset: str) -> Path:
    """The file of `configs/` that holds a dataset's settings; the polyp sets share one."""
    return CONFIGS / f"{'polyp' if dataset in POLYP else dataset}.yaml"


def _layers(base: Tree, dataset: Tree, chosen: Tree, category: str | None) -> list[Tree]:
    """The five layers, each with its chosen blocks merged into it."""
    given = [mapping(tree.get("model"), "model") for tree in (dataset, chosen)]
    names = merge([base["model"], *given])
    if names["flavor"] == "tuned":
        raise ConfigError("the recipe tuned is a model of its own: --model remind in place of --flavor tuned")
    for key, known in (("name", MODELS), ("flavor", FLAVORS), ("setting", SETTINGS)):
        if names[key] not in known:
            raise ConfigError(f"unknown {key} {shown(names[key])}; choose one of {', '.join(known)}")
    if names["name"] == "uninet":
        model, variant = read_yaml(CONFIGS / "flavors" / f"{names['flavor']}.yaml"), names["flavor"]
    else:
        model, variant = _optional("models", names["name"]), names["name"]
        chosen = merge([chosen, {"model": {"flavor": "default"}}, NO_HEAD])
        if names["name"] != "remind":  # no other model learns from defects
            chosen = merge([chosen, {"data": {"synthetic": 0}}])
    blocks = {
        "settings": merge([model.get("model") or {}, *given]).get("setting", names["setting"]),
        "categories": category,
        "flavors": variant,
    }
    backbone = _optional("backbones", names["backbone"])
    return [base, *(_resolved(layer, blocks) for layer in (backbone, model, dataset)), chosen]


def _resolved(tree: Tree, blocks: Mapping[str, object]) -> Tree:
    """A layer with the blocks of these names merged into it, each resolved in the same way."""
    plain = {key: value for key, value in tree.items() if key not in blocks}
    for kind, name in blocks.items():
        named = {key: mapping(v, f"{kind}.{key}") for key, v in mapping(tree.get(kind), kind).items()}
        if name in named:
            plain = merge([plain, _resolved(named[name], blocks)])
    return plain


# settings that choose which layers are merged; a complete file is merged already
LAYERS = ("data.name", "data.category", "model.name", "model.flavor", "model.setting", "model.backbone")


def _is_complete(tree: Tree, base: Tree) -> bool:
    """Whether a file is a run's config.yaml, with every setting, or all but the few that are younger."""
    sections = [(tree.get(name) or {}, keys) for name, keys in base.items()]
    there = sum(key in found for found, keys in sections if isinstance(found, dict) for key in keys)
    return there > 0.8 * sum(map(len, base.values()))


def _check_same_layers(path: str | Path, tree: Tree, overrides: Mapping[str, object]) -> None:
    """Stop at a flag that would choose another layer than the one that a complete file was made with."""
    for key in LAYERS:
        section, _, name = key.partition(".")
        own = (tree.get(section) or {}).get(name)
        if key in overrides and str(overrides[key]) != str(own):
            raise ConfigError(
                f"{path} holds every setting of a run, with {key} {own}; with {overrides[key]} the values "
                f"that belong to {own} would stay. Leave that out, or start from a dataset's file of configs/"
            )


def _optional(folder: str, name: object) -> Tree:
    files = {path.stem: path for path in (CONFIGS / folder).glob("*.yaml")}
    return read_yaml(files[str(name)]) if str(name) in files else {}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
