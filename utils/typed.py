"""Trees of plain values, as from YAML: merged, and turned into frozen dataclasses of checked values."""

import difflib
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from utils.errors import ConfigError
from utils.yaml_io import Tree

NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")  # as text: 5e-3 is text in YAML

T = TypeVar("T")


def merge(layers: Sequence[Tree]) -> Tree:
    """Merge trees; a later value replaces an earlier one, sections are merged key by key (none: no keys).
    Raises ConfigError for a value in place of a section.
    """
    result: Tree = {}
    for layer in layers:
        for key, value in layer.items():
            if not isinstance(result.get(key), dict):
                result[key] = value
            else:
                result[key] = merge([result[key], mapping(value, key)])
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


def build(cls: type[T], tree: Mapping[str, object], *, prefix: str = "") -> T:
    """Turn a tree into the frozen dataclass `cls`; every key must be there and known. Raises ConfigError
    naming the key, what was found, and what is allowed.
    """
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cast(Any, cls))}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"unknown setting '{prefix}{str(key)[:80]}'; {hint}")
    values = {}
    for name, spec in known.items():
        if name not in tree:
            if spec.default is not MISSING:
                continue
            raise ConfigError(f"setting '{prefix}{name}' is missing")
        if is_dataclass(hints[name]):
            section = mapping(tree[name], f"{prefix}{name}")
            values[name] = build(hints[name], section, prefix=f"{prefix}{name}.")
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
            raise ConfigError(f"{key} is {shown(value)}; choose one of {', '.join(map(str, args))}")
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
            raise ConfigError(f"{key} is {shown(value)}; {len(args)} values are needed")
        return tuple(_checked(item, args[0], key=key, bounds=bounds) for item in items)
    return _scalar(value, cast(type, kind), key=key, bounds=bounds)


def _scalar(value: object, kind: type, *, key: str, bounds: Mapping[str, float]) -> object:
    name = {bool: "bool: true or false", str: "text, in quotes where YAML reads it otherwise"}.get(kind)
    wrong = ConfigError(f"{key} is {shown(value)}; expected {name or kind.__name__}")
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
        raise ConfigError(f"{key} is {shown(value)}; allowed are {bounds['low']:g} to {bounds['high']:g}")
    return kind(number)


def mapping(value: object, name: str) -> Tree:
    """The keys of a section, none if it is empty; a ConfigError for anything else."""
    if not isinstance(value, dict | None):
        raise ConfigError(f"'{name}' is a section with keys of its own, found {shown(value)}")
    return value or {}


def shown(value: object) -> str:
    """A value as it is written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
