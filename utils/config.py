"""Typed configuration: YAML layers merged in a fixed order, checked once, then frozen.

Order of merging (later wins): base.yaml < backbones/NAME.yaml < flavors/NAME.yaml (or models/NAME.yaml for a
model without flavours) < the dataset's file < its block for the setting < its block for the category < its
block for the flavour or model < that block's own one for the setting < that block's own one for the category
(only where model.category_exceptions is on) < the command line. `configs/base.yaml` holds every key with its
meaning; other files hold differences only.

The dataset's blocks are `settings.NAME`, `categories.NAME` (how a category is read, whatever the flavour),
`flavors.NAME`, `flavors.NAME.settings.NAME` and `flavors.NAME.categories.NAME` (rules by name of a flavour).
One model for all categories has no category, so neither block by category applies to it.

A run's config.yaml holds every setting and stands alone: no other layer than base.yaml and the command line.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from utils.config_rules import check_together
from utils.errors import ConfigError
from utils.yaml_io import CONFIGS, Tree, read_yaml

MODELS = ("uninet", "remind", "recontrast", "unias", "memory-bank")
FLAVORS = ("paper", "released")
SETTINGS = ("one-class", "multi-class", "supervised")
REMOVED = (  # settings of older checkpoints that changed no result, or only what was tested
    "data.test_name",
    "data.test_root",
    "data.test_category",
    "train.recompute",
    "eval.map_dtype",
    "train.cache_features_gb",
    "train.cache_features_dtype",
)

NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")  # as text: 5e-3 is text in YAML

T = TypeVar("T")


def _number(low: float, high: float) -> dict[str, float]:
    return {"low": low, "high": high}


DefectKind = Literal["texture", "scratch", "stain", "cut", "speed", "zoom"]


@dataclass(frozen=True)
class DataConfig:
    """What is read, at which size, and what is held out. `image_size` is (height, width) in pixels, of whole
    images; with `tile` the model sees squares of that side alone.
    """

    name: str
    root: str | None
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
    cache_gb: float = field(metadata=_number(0, 10**4))
    workers: int | None = field(metadata=_number(0, 256))


@dataclass(frozen=True)
class ModelConfig:
    """The network: teachers, bottleneck, student and feature selection (paper Sec. 4.1 to 4.3)."""

    name: Literal["uninet", "remind", "recontrast", "unias", "memory-bank"]
    flavor: Literal["paper", "released", "default"]
    setting: Literal["one-class", "multi-class", "supervised"]
    category_exceptions: bool
    backbone: str
    student_backbone: str | None
    weights: str | None
    random_weights: bool
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
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    log_every: int = field(metadata=_number(1, 10**8))
    save_every: int = field(metadata=_number(1, 10**8))


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and when. `select: best` looks at the test set and says so in every output."""

    split: Literal["test", "validation", "none"]
    select: Literal["last", "best"]
    every: int = field(metadata=_number(0, 10**8))
    batch_size: int = field(metadata=_number(1, 65536))
    precision: Literal["auto", "fp32", "bf16"]
    extra_metrics: tuple[Literal["aupimo", "dsc_unias", "soft_dsc"], ...]


@dataclass(frozen=True)
class Config:
    """Every setting of a run, one section a part of the system."""

    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    score: ScoreConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig

    def to_dict(self) -> Tree:
        """Return plain dictionaries and lists, as written to config.yaml."""
        return _plain(asdict(self))


def load_config(path: str | Path, overrides: Mapping[str, object], *, category: str | None = None) -> Config:
    """Merge the layers for one run.

    Args:
        path: the dataset's file in `configs/`, or a config.yaml saved by a run.
        overrides: dotted keys of the command line, such as {"train.iterations": 200}; they win over every
            file.
        category: the category to train, for the dataset's blocks by category (None: none of them applies).

    Raises:
        ConfigError: for an unknown key (the nearest one is named), a wrong type, a value out of range, or an
            override that chooses another layer where the file is complete.
    """
    dataset, base = read_yaml(path), read_yaml(CONFIGS / "base.yaml")
    if _is_complete(dataset, base):
        _check_same_layers(path, dataset, overrides)
        config = build(Config, merge([base, dataset, nested(overrides)]))
        check_together(config)
        return config
    settings, categories, flavors = (_blocks(dataset, key) for key in ("settings", "categories", "flavors"))
    chosen = nested(overrides)
    models = [_mapping(tree.get("model"), "model") for tree in (dataset, chosen)]
    names = merge([base["model"], *models])
    if names["flavor"] == "tuned":
        raise ConfigError("the recipe tuned is a model of its own: --model remind in place of --flavor tuned")
    for key, known in (("name", MODELS), ("flavor", FLAVORS), ("setting", SETTINGS)):
        if names[key] not in known:
            raise ConfigError(f"unknown {key} {_shown(names[key])}; choose one of {', '.join(known)}")
    if names["name"] == "uninet":
        flavor, reading = names["flavor"], read_yaml(CONFIGS / "flavors" / f"{names['flavor']}.yaml")
    else:
        flavor, reading = "default", _optional(CONFIGS / "models", names["name"])
    by_setting_of_model = _blocks(reading, "settings")
    backbone = _optional(CONFIGS / "backbones", names["backbone"])
    block = dict(flavors.get(flavor if names["name"] == "uninet" else names["name"], {}))
    exceptions, by_setting = (_blocks(block, key) for key in ("categories", "settings"))
    setting = merge([reading.get("model") or {}, *models]).get("setting", names["setting"])
    own = (settings.get(setting, {}), categories.get(category, {}))
    reading = merge([reading, by_setting_of_model.get(setting, {})])
    layers = [base, backbone, reading, dataset, *own, block, by_setting.get(setting, {})]
    if category is not None and merge([*layers, chosen])["model"]["category_exceptions"]:
        layers.append(exceptions.get(category, {}))
    tree = merge([*layers, chosen, {"model": {"flavor": flavor}}])
    if names["name"] != "uninet":  # no other model has its heads
        none = {"model": {"head": "none", "skip_connections": False}, "loss": {"supervised": "none"}}
        none["data"] = {"frame_offset": 0} | ({} if names["name"] == "remind" else {"synthetic": 0})
        tree = merge([tree, none])
    config = build(Config, tree)
    check_together(config)
    return config


# settings that choose which layers are merged; a complete file is merged already
LAYERS = (
    "data.name", "data.category", "model.name", "model.flavor", "model.setting", "model.backbone",
    "model.category_exceptions",
)  # fmt: skip


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


def _optional(folder: Path, name: object) -> Tree:
    files = {path.stem: path for path in folder.glob("*.yaml")}
    return read_yaml(files[str(name)]) if str(name) in files else {}


def _blocks(tree: Tree, key: str) -> Tree:
    """Take the named blocks below `key` out of a tree."""
    blocks = _mapping(tree.pop(key, None), key)
    return {name: _mapping(block, f"{key}.{name}") for name, block in blocks.items()}


def _mapping(value: object, name: str) -> Tree:
    if not isinstance(value, dict | None):
        raise ConfigError(f"'{name}' is a section with keys of its own, found {_shown(value)}")
    return value or {}


def _shown(value: object) -> str:
    """A value as it is written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def merge(layers: Sequence[Tree]) -> Tree:
    """Merge trees; a later value replaces an earlier one, sections are merged key by key (none: no keys).

    Raises:
        ConfigError: for a value in place of a section.
    """
    result: Tree = {}
    for layer in layers:
        for key, value in layer.items():
            if not isinstance(result.get(key), dict):
                result[key] = value
            else:
                result[key] = merge([result[key], _mapping(value, key)])
    return result


def nested(overrides: Mapping[str, object]) -> Tree:
    """Dotted keys as a tree of sections."""
    tree: Tree = {}
    for dotted, value in overrides.items():
        section, dot, key = dotted.partition(".")
        if not dot or not key:
            raise ConfigError(
                f"'{dotted}' is no setting; write section.key=value, such as train.iterations=200"
            )
        tree.setdefault(section, {})[key] = value
    return tree


# --- checking -----------------------------------------------------------------------------------------------


def build(cls: type[T], tree: Mapping[str, object], *, prefix: str = "") -> T:
    """Turn a tree into the frozen dataclass `cls`; every key must be there and known.

    Raises:
        ConfigError: naming the key, what was found, and what is allowed.
    """
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known here: {', '.join(known)}"
            if f"{prefix}{key}" in REMOVED:
                hint = "it was removed, so leave it out"
            raise ConfigError(f"unknown setting '{prefix}{str(key)[:80]}'; {hint}")
    values = {}
    for name, spec in known.items():
        if name not in tree:
            raise ConfigError(f"setting '{prefix}{name}' is missing")
        if is_dataclass(hints[name]):
            if not isinstance(tree[name], Mapping):
                raise ConfigError(
                    f"'{prefix}{name}' is a section with keys of its own, found {_shown(tree[name])}"
                )
            values[name] = build(hints[name], tree[name], prefix=f"{prefix}{name}.")
        else:
            values[name] = _checked(tree[name], hints[name], key=f"{prefix}{name}", bounds=spec.metadata)
    return cls(**values)


def _checked(value: object, kind: object, *, key: str, bounds: Mapping[str, float]) -> object:
    """Convert one value to its declared type, or say why not."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        if value is None:
            return None
        return _checked(value, next(a for a in args if a is not types.NoneType), key=key, bounds=bounds)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key} is {_shown(value)}; choose one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}; names and their values are needed, such as {{name: []}}")
        return {str(k): _checked(v, args[1], key=f"{key}.{k}", bounds=bounds) for k, v in value.items()}
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        if args[-1] is not Ellipsis and len(items) == 1:
            items = items * len(args)  # 256 means (256, 256)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ConfigError(f"{key} is {_shown(value)}; {len(args)} values are needed")
        return tuple(_checked(item, args[0], key=key, bounds=bounds) for item in items)
    return _scalar(value, kind, key=key, bounds=bounds)


def _scalar(value: object, kind: object, *, key: str, bounds: Mapping[str, float]) -> object:
    name = {bool: "bool: true or false", str: "text, in quotes where YAML reads it otherwise"}.get(kind)
    wrong = ConfigError(f"{key} is {_shown(value)}; expected {name or kind.__name__}")
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise wrong
        return value
    if kind is str:
        if not isinstance(value, str | int):  # `category: 7` reads as a number in YAML
            raise wrong
        return str(value)
    if not isinstance(value, int | float) and not (isinstance(value, str) and NUMBER.fullmatch(value)):
        raise wrong
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:  # "e3"; more digits than a float has
        raise wrong from error
    if kind is int and (not math.isfinite(number) or number != int(number)):
        raise wrong
    if not bounds.get("low", -math.inf) <= number <= bounds.get("high", math.inf):
        raise ConfigError(f"{key} is {_shown(value)}; allowed are {bounds['low']:g} to {bounds['high']:g}")
    return kind(number)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
