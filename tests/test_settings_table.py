"""The table of docs/SETTINGS_LIST.md: settings with default, range and meaning as in base.yaml and the types.

python tests/test_settings_table.py prints the first three columns anew.
"""

import re
import types
from dataclasses import fields
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest

from utils.cli import HOW, WHAT
from utils.config import Config
from utils.yaml_io import CONFIGS

ROOT = CONFIGS.parent
ENTRY = re.compile(r"^  (\w+): *(.*?) +# (.*)$")
MORE = re.compile(r"^ +# (.*)$")
FLAGS = {setting: f"--{name}" for name, flag in (WHAT | HOW).items() if (setting := flag.setting)}


def settings():
    """Each setting of base.yaml: its dotted name, its default as it is written, and its comment."""
    found, section = {}, ""
    for line in (CONFIGS / "base.yaml").read_text().splitlines():
        if match := re.match(r"^(\w+):$", line):
            section = match[1]
        elif match := ENTRY.match(line):
            last = f"{section}.{match[1]}"
            found[last] = [match[2], match[3]]
        elif found and (match := MORE.match(line)):
            found[last][1] += f" {match[1]}"
    return found


def spec_of(name):
    """The dataclass field of a setting, and its type."""
    section, _, key = name.partition(".")
    part = get_type_hints(Config)[section]
    (spec,) = (f for f in fields(part) if f.name == key)
    return spec, get_type_hints(part)[key]


def choices_of(kind):
    """What a Literal, also inside of another type, admits."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    inner = get_args(kind) if get_origin(kind) in (tuple, Union, types.UnionType) else ()
    return next((found for found in map(choices_of, inner) if found), ())


def cells_of(name, default, comment):
    """Name, default with range, and meaning."""
    bounds = spec_of(name)[0].metadata
    limits = f" ({bounds['low']:g}..{bounds['high']:g})" if "low" in bounds else ""
    return [f"`{name}`", default + limits, comment.replace(" | ", " / ")]


def rows():
    """The rows of the page."""
    lines = (ROOT / "docs/SETTINGS_LIST.md").read_text().splitlines()
    return {line.split("`")[1]: line.split(" | ") for line in lines if re.match(r"`\w+\.\w+` \|", line)}


def test_every_setting_has_its_row():
    expected = {name: cells_of(name, *value) for name, value in settings().items()}
    assert {name: cells[:3] for name, cells in rows().items()} == expected
    hints = {s: h for s, h in get_type_hints(Config).items() if s != "run"}
    assert sorted(expected) == sorted(f"{s}.{f.name}" for s, h in hints.items() for f in fields(h))


@pytest.mark.parametrize("name", settings())
def test_the_meaning_names_each_value(name):
    comment = settings()[name][1]
    missing = [v for v in choices_of(spec_of(name)[1]) if not re.search(rf"(?<![\w-]){v}(?![\w-])", comment)]
    assert not missing, comment


@pytest.mark.parametrize("name", settings())
def test_each_setting_has_the_users_that_are_named(name):
    """Each is the stem of a file of configs/, docs/ or scripts/, or a table, that sets it."""
    section, _, key = name.partition(".")
    spelled = rf"(?<![\w.]){key}:|{section}\.{key}\b|{FLAGS.get(name, name)}\b"
    for user in rows()[name][3].split(", "):
        assert user not in ("base", "SETTINGS", "SETTINGS_LIST")
        stem = re.sub(r"^Table (\w+)$", r"\1", user)
        files = [p for top in ("configs", "docs", "scripts") for p in (ROOT / top).rglob(f"{stem}.*")]
        texts = [p.read_text() for p in files if p.suffix in (".yaml", ".md", ".py", ".sh")]
        assert any(re.search(spelled, text) for text in texts), f"{user} does not use {name}"


if __name__ == "__main__":
    for name, value in settings().items():
        print(" | ".join(cells_of(name, *value)))
