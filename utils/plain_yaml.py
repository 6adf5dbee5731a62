"""YAML files and values of the command line as plain data: no tags, no aliases, no large files."""

from __future__ import annotations

from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAX_CONFIG_BYTES = 1 << 18

Tree = dict[str, "Tree | list | str | int | float | bool | None"]


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names the key and the fix."""


class _PlainLoader(yaml.SafeLoader):
    """A safe loader without aliases, which can blow a small file up to any size."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise ConfigError("YAML aliases (*name) are not allowed in a config; write the value out")
        return super().compose_node(parent, index)


def read_yaml(path: str | Path) -> Tree:
    """Read one YAML file of plain values.

    Raises:
        ConfigError: if it is missing, larger than 256 KiB, not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.yaml") if p.stem != "base"))
        raise ConfigError(f"no config file at {path}; the configs that come with the repository are: {known}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES >> 10} KiB, too large for a config")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as 'train:', found {type(tree).__name__}")
    return tree


def parse_override(text: str) -> tuple[str, object]:
    """Parse 'section.key=value' of the command line; the value is read as YAML.

    Raises:
        ConfigError: if there is no '=' or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"'{text}' has no '='; write section.key=value, such as train.iterations=200")
    try:
        return key.strip(), yaml.load(value, Loader=_PlainLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the value of '{text}' is not readable: {' '.join(str(error).split())}") from error
