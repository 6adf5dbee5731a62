"""YAML files and values of the command line: to plain trees, merged, and to frozen, checked dataclasses."""

import difflib
import math
import re
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from utils.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAX_CONFIG_BYTES = 1 << 18
NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")  # as text: 5e-3 is text in YAML

Tree = dict[str, Any]  # parsed YAML or JSON: sections, lists and plain values, which `build` checks
T = TypeVar("T")


class _PlainLoader(yaml.SafeLoader):
    """A safe loader of what people mean: no aliases (a small file could grow to any size), no tags, no key
    twice; keys are text. YAML 1.1 reads 1:30 as 90, 010 as 8, 'no' as false, and dates: all text here.
    """

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (the library's; filled below)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{event.anchor}) are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags ({event.tag}) are not allowed; write the plain value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        tree: dict[Hashable, Any] = {}
        for key, value in node.value:
            where = f"in line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key {where} is no plain text")
            if key.value in tree:
                raise yaml.YAMLError(f"'{key.value}' {where} is there a second time")
            tree[key.value] = self.construct_object(value, deep=deep)
        return tree


# a part of what YAML 1.1 reads so, hence what yaml.safe_dump writes is read back as it was
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _whole = re.compile(rf"(?:{_pattern})\Z")
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, list(_first))


def read_yaml(path: str | Path) -> Tree:
    """Read one YAML file of plain values; a ConfigError if it is none, or larger than 256 KiB."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.yaml") if p.stem != "base"))
        raise ConfigError(f"no config file at {path}; the configs that come with the repository are: {known}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES >> 10} KiB, too large for a config")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, a number too long
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as 'train:', found {type(tree).__name__}")
    return tree


def parse_override(text: str) -> tuple[str, object]:
    """Parse 'section.key=value' of the command line; the value is read as YAML, or a ConfigError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"'{text}' has no '='; write section.key=value, such as train.iterations=200")
    try:
        return key.strip(), yaml.load(value, Loader=_PlainLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the value of '{text}' is not readable: {' '.join(str(error).split())}") from error


def merge(layers: Sequence[Tree]) -> Tree:
    """Merge trees: a later value replaces an earlier one, sections are merged key by key (none: no keys)."""
    result: Tree = {}
    for layer in layers:
        for key, value in layer.items():
            section = result.get(key)
            result[key] = section | mapping(value, key) if isinstance(section, dict) else value
    return result


def nested(overrides: Mapping[str, object]) -> Tree:
    """Dotted keys as a tree of sections."""
    tree: Tree = {}
    for dotted, value in overrides.items():
        section, dot, key = dotted.partition(".")
        if not dot or not key:
            raise ConfigError(f"'{dotted}' is no setting; write section.key=value, as train.iterations=200")
        tree.setdefault(section, {})[key] = value
    return tree


def build(cls: type[T], tree: Mapping[str, object], *, prefix: str = "") -> T:
    """Turn a tree into the frozen dataclass `cls`; a ConfigError for keys or values that do not fit."""
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


def _checked(value: object, kind: object, *, key: str, bounds: Mapping[str, Any]) -> object:
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


def _scalar(value: object, kind: type, *, key: str, bounds: Mapping[str, Any]) -> object:
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
