"""Configurations from files: five layers of YAML merged in a fixed order, checked once, then frozen.

The layers (later wins): base.yaml < backbones/NAME.yaml < flavors/NAME.yaml or models/NAME.yaml < the
dataset's file < the command line. `configs/base.yaml` holds every key with its meaning; other files hold
differences only. A file may hold blocks `settings.NAME`, `categories.NAME` and `flavors.NAME` (of a flavor or
a model), one inside the other: those that are chosen win over what stands beside them, in that order. One
model for all categories has no category, so no block by category applies to it.

A run's config.yaml holds every setting and stands alone: no other layer than base.yaml and the command line.
"""

import logging
from collections.abc import Mapping
from functools import cache
from operator import attrgetter
from pathlib import Path

from utils.config import MODELS, Config, check_together, unread
from utils.errors import ConfigError
from utils.yaml_io import CONFIGS, Tree, build, mapping, merge, nested, read_yaml, shown

FLAVORS = ("paper", "released")
SETTINGS = ("one-class", "multi-class", "supervised")
POLYP = ("kvasir", "clinicdb", "colondb")
# in place of what a dataset's file says for uninet's heads, for another model
NO_HEAD: Tree = {"model": {"head": "none", "skip_connections": False}, "loss": {"supervised": "none"}}
NO_HEAD["data"] = {"frame_offset": 0}


def load_config(path: str | Path, overrides: Mapping[str, object], *, category: str | None = None) -> Config:
    """Merge the layers for one run; a ConfigError for what is unknown, of a wrong type or out of range, and
    for an override that chooses another layer where the file is complete.

    path: the dataset's file in `configs/`, or a config.yaml saved by a run.
    overrides: dotted keys of the command line, such as {"train.iterations": 200}, which win over every file;
    those of `RunOptions` begin with "run.". category: for the blocks by category (None: without these).
    """
    dataset, base, chosen = read_yaml(path), read_yaml(CONFIGS / "base.yaml"), nested(overrides)
    if "run" in dataset:
        raise ConfigError(f"'run' in {path} is no section of a config; flags say how a run is computed")
    if _is_complete(dataset, base):
        _check_same_layers(path, dataset, overrides)
        layers, files = [base, dataset, chosen], [base, dataset]
    else:
        layers = _layers(base, dataset, chosen, category)
        network = nested({key: value for key, value in overrides.items() if key in LAYERS})
        files = _layers(base, dataset, network, category)
    config, asked, given = (build(Config, merge(trees)) for trees in (layers, [*layers, chosen], files))
    check_together(config)
    for key in overrides:
        here, there = (attrgetter(key)(c) for c in (config, asked))
        if here != there:
            raise ConfigError(f"{key} of --model {config.model.name} is {here}; it cannot be {there}")
    for text in unread(config, given, overrides):
        _warn(text)
    return config


@cache
def _warn(text: str) -> None:
    """Log a warning once, however many categories have it."""
    logging.getLogger("uninet").warning("%s", text)


def config_file(dataset: str) -> Path:
    """The file of `configs/` that holds a dataset's settings; the polyp sets share one."""
    return CONFIGS / f"{'polyp' if dataset in POLYP else dataset}.yaml"


def _layers(base: Tree, dataset: Tree, chosen: Tree, category: str | None) -> list[Tree]:
    """The five layers, each with its chosen blocks merged into it."""
    asked = mapping(chosen.get("model"), "model")
    if asked.get("flavor") == "tuned":
        raise ConfigError("the recipe tuned is a model of its own: --model remind in place of --flavor tuned")
    if "flavor" in asked:  # it chooses uninet where the dataset's file has another model
        if (name := asked.get("name", "uninet")) != "uninet":
            raise ConfigError(f"--flavor is of uninet and the model is {shown(name)}; leave one of them out")
        chosen = merge([chosen, {"model": {"name": "uninet"}}])
    given = [mapping(tree.get("model"), "model") for tree in (dataset, chosen)]
    names = merge([base["model"], *given])
    for key, known in (("name", MODELS), ("flavor", FLAVORS), ("setting", SETTINGS)):
        if names[key] not in known:
            raise ConfigError(f"unknown {key} {shown(names[key])}; choose one of {', '.join(known)}")
    if names["name"] == "uninet":
        model, variant = read_yaml(CONFIGS / "flavors" / f"{names['flavor']}.yaml"), names["flavor"]
    else:
        model, variant = _optional("models", names["name"]), names["name"]
        chosen = merge([chosen, {"model": {"flavor": "default"}}])
        if names["name"] != "remind":  # no other model learns from defects
            chosen = merge([chosen, {"data": {"synthetic": 0}}])
    setting = merge([model.get("model") or {}, *given]).get("setting", names["setting"])
    blocks = {"settings": setting, "categories": category, "flavors": variant}
    backbone = _optional("backbones", names["backbone"])
    layers = [base, *(_resolved(layer, blocks) for layer in (backbone, model, dataset)), chosen]
    if names["name"] == "uninet":
        return layers
    own = {"model": {"head": "speed"}} if merge(layers)["model"]["head"] == "speed" else {}
    return [*layers, NO_HEAD, own]


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
            holds = f"{path} holds every setting of a run, with {key} {own}"
            raise ConfigError(f"{holds}. Leave that out, or start from a dataset's file of configs/")


def _optional(folder: str, name: object) -> Tree:
    files = {path.stem: path for path in (CONFIGS / folder).glob("*.yaml")}
    return read_yaml(files[str(name)]) if str(name) in files else {}
