"""Markdown of what was measured; cells that were not measured stay empty."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from operations import Operations
from rows import Measured, Row

COLUMNS = (
    "what", "shape", "precision", "ours, s", "peer, s", "ratio", "limit, s", "share of limit", "ours, GB",
    "peer, GB", "over inputs, GB", "goal",
)  # fmt: skip


def cell(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def line(row: Row, variant: str, precision: str, found: Measured) -> list[str]:
    """One line of the main table."""
    ours, limit = found.seconds("ours", row.per), found.limit(row.per)
    return [
        row.title,
        variant if row.limited or not row.peer else "",
        precision,
        cell(ours, ".3g"),
        cell(found.seconds("peer", row.per), ".3g"),
        cell(found.ratio(), ".2f"),
        cell(limit, ".3g"),
        "" if limit is None or ours is None else f"{limit / ours:.0%}",
        cell(found.largest("ours", "peak_gb"), ".2f"),
        cell(found.largest("peer", "peak_gb"), ".2f"),
        cell(found.largest("ours", "over_gb"), ".2f"),
        row.goal if variant in ("peer", "paper") and precision == "fp32" else "",
    ]


def stage_table(stages: Sequence[tuple[str, Operations, float, float]]) -> str:
    """Operations, seconds and share of the limit of each stage, and their sums."""
    rows = [["stage", "GFLOP, convolutions", "GFLOP, products", "s", "share of limit"]]
    for name, operations, seconds, share in stages:
        shown = f"{share:.0%}" if operations.total else ""
        rows.append(
            [name, f"{operations.convolution:.1f}", f"{operations.product:.1f}", f"{seconds:.3g}", shown]
        )
    total = sum((s[1] for s in stages), Operations())
    seconds = sum(s[2] for s in stages)
    share = sum(s[2] * s[3] for s in stages) / seconds
    rows.append(["sum", f"{total.convolution:.1f}", f"{total.product:.1f}", f"{seconds:.3g}", f"{share:.0%}"])
    return markdown(rows)


def throughput(found: Sequence[tuple[str, Measured]]) -> str:
    """The machine's GFLOP/s by precision: median, lowest and highest of all rounds."""
    rows = [["precision", "convolution, GFLOP/s", "product, GFLOP/s"]]
    for precision in dict.fromkeys(p for p, _ in found):
        replies = [reply for p, measured in found if p == precision for reply in measured.machine]
        if replies:
            values = [[r["convolution"] for r in replies], [r["product"] for r in replies]]
            rows.append(
                [precision, *(f"{statistics.median(v):.0f} ({min(v):.0f} to {max(v):.0f})" for v in values)]
            )
    return markdown(rows)
