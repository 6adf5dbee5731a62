"""scripts/tables/backbones.py, and the table that it made."""

import re

import pytest
from conftest import ROOT

from scripts.tables.backbones import NAMES, row


def test_the_table_has_every_backbone():
    lines = (ROOT / "docs/BACKBONES.md").read_text().splitlines()
    assert [line.split("`")[1] for line in lines if re.match(r"`\w+` \| ", line)] == list(NAMES)
    assert len(NAMES) == 41


@pytest.mark.slow
def test_rows_are_as_printed():
    lines = (ROOT / "docs/BACKBONES.md").read_text().splitlines()
    for name in ("mambaout_femto", "vit_tiny_patch16_224", "inception_v3"):
        assert " | ".join(filter(None, row(name, 256))) in lines
