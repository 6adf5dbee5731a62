"""Specs of the paper's tables (specs/*.yaml): rows and columns, with the published numbers.

A spec names its published numbers, the metrics of a cell, its columns (a dataset, perhaps one category,
perhaps flags) or `columns_by_category`, and its rows: `name` (the published row, or its number), `ours` (what
it is called here), `flags` of train.py, `score` settings that need no training. What others reported stands
with the published numbers, by the names that rows have here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets.registry import SPECS
from scripts import ROOT
from utils.yaml_io import Tree, read_yaml

SPECS_DIR, PUBLISHED = ROOT / "scripts/tables/specs", ROOT / "results/published"


@dataclass(frozen=True)
class Column:
    """A published column: what of our data stands in it."""

    title: str
    dataset: str
    categories: tuple[str, ...]
    metrics: tuple[str, ...]
    flags: tuple[str, ...] = ()


@dataclass
class Table:
    """A table's spec (specs/*.yaml) with its published numbers."""

    name: str
    published: Tree
    columns: list[Column]
    rows: list[Tree]
    flags: tuple[str, ...] = ()
    spread: bool = False
    scale: float = 1.0
    others: Tree = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load_table(name: str) -> Table:
    """Read a spec and its published numbers."""
    spec = read_yaml(SPECS_DIR / f"{name}.yaml")
    published = read_yaml(PUBLISHED / f"{spec['published']}.yaml")
    metrics, columns = tuple(spec["metrics"]), []
    if "columns_by_category" in spec:
        dataset, prefix = spec["columns_by_category"], spec.get("prefix", "")
        first = next(iter(published["rows"].values()))
        for category in SPECS[dataset].counts:
            title = next((t for t in first if _plain(t.removeprefix(prefix)) == _plain(category)), category)
            columns.append(Column(title, dataset, (category,), metrics))
    for title, c in (spec.get("columns") or {}).items():
        shown = tuple(c.get("metrics", metrics))
        chosen = (str(c["category"]),) if "category" in c else tuple(SPECS[c["dataset"]].counts)
        columns.append(Column(title, c["dataset"], chosen, shown, tuple(c.get("flags", ()))))
    return Table(
        name,
        published,
        columns,
        spec["rows"],
        flags=tuple(spec.get("flags", ())),
        spread=spec.get("spread", False),
        scale=spec.get("scale", 1.0),
        others=published.get("reported_by_others") or {},
        notes=[str(n) for n in published.get("notes", [])],
    )


def reported(table: Table, row: Tree, column: int) -> list[float | None]:
    """What others reported for a row and column, in percent, one per metric; None where nothing is known."""
    values = table.others.get("rows", {}).get(row.get("ours"), {}).get(table.columns[column].title) or []
    return [*values, *[None] * (len(table.columns[column].metrics) - len(values))]


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("_", "")


def printed(table: Table, name: object, column: int) -> list[float | None]:
    """Published values of a row and column, one per metric; None where there are none."""
    metrics = table.columns[column].metrics
    rows = table.published["rows"]
    if isinstance(rows, list):  # numbered rows, their values run over all columns
        before = sum(len(c.metrics) for c in table.columns[:column])
        values: list[float | None] = next((r["values"] for i, r in enumerate(rows, start=1) if i == name), [])
        cells = values[before : before + len(metrics)]
    else:
        cells = (rows.get(name) or {}).get(table.columns[column].title) or []
    cells = [None if v is None else v * table.scale for v in cells]
    return [*cells, *[None] * (len(metrics) - len(cells))]
