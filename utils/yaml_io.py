"""YAML files and values of the command line as plain data: no tags, no aliases, no large files."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from utils.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAX_CONFIG_BYTES = 1 << 18

Tree = dict[
    str, Any
]  # parsed YAML or JSON: sections, lists and plain values, which `utils.typed.build` checks


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
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first)
    )


def read_yaml(path: str | Path) -> Tree:
    """Read one YAML file of plain values. Raises ConfigError if it is missing, larger than 256 KiB, not YAML,
    or not a mapping.
    """
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
    """Parse 'section.key=value' of the command line; the value is read as YAML. Raises ConfigError if there
    is no '=' or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"'{text}' has no '='; write section.key=value, such as train.iterations=200")
    try:
        return key.strip(), yaml.load(value, Loader=_PlainLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the value of '{text}' is not readable: {' '.join(str(error).split())}") from error
