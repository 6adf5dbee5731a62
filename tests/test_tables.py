"""Published numbers as data, and the tables made of them and of runs."""

import json
import os
import statistics
from pathlib import Path

import processes
import pytest
from conftest import ROOT, TINY

from scripts.tables import reproduce as tables
from scripts.tables import spec
from utils.cli import run_command
from utils.layers import load_config
from utils.yaml_io import read_yaml

PUBLISHED = sorted((ROOT / "results/published").glob("*.yaml"))
SPECS = sorted((ROOT / "scripts/tables/specs").glob("*.yaml"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_printed_means_are_those_of_the_cells_or_noted(path):
    tree = read_yaml(path)
    notes = " ".join(map(str, tree.get("notes", [])))
    for method, means in (tree.get("printed_means") or {}).items():
        cells = list(tree["rows"][method].values())
        for k, printed in enumerate(means):
            values = [c[k] for c in cells if len(c) > k and c[k] is not None]
            if printed is None or len(values) < len(cells):
                continue
            rounding = 0.001 if printed <= 1 else 0.1  # half of it in the cells, half in the mean
            if abs(statistics.fmean(values) - printed) > rounding + 1e-9:
                assert f"{method} {tree['metrics'][k]}: printed mean" in notes, (method, k)


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_every_spec_finds_its_published_row_and_its_settings(path):
    table = spec.load_table(path.stem)
    for row in table.rows:
        values = [v for j in range(len(table.columns)) for v in spec.printed(table, row["name"], j)]
        assert row["name"] is None or any(v is not None for v in values), row
        for column in table.columns:
            flags = [*table.flags, *column.flags, *map(str, row.get("flags") or [])]
            run = tables.Run(column.dataset, column.categories[0], tuple(flags), 0)
            args = tables.parse_arguments(["x", "--dry-run"])
            config = tables._resolved(tuple(tables.command_of(run, args)))  # unknown settings would stop it
            assert config.data.name == column.dataset
        for setting in row.get("score", ()):
            key, _, value = setting.partition("=")
            load_config(ROOT / "configs/mvtec.yaml", {key: value})


def test_numbered_rows_run_over_the_columns():
    table = spec.load_table("11")
    assert spec.printed(table, 1, 0) == [95.17] and spec.printed(table, 1, 1) == [95.01]
    assert spec.printed(spec.load_table("12"), 7, 2) == [None]  # MVTec AD is ours
    assert spec.printed(spec.load_table("library"), "anomalib UniNet", 0)[0] == pytest.approx(99.9)


def test_reported_by_others_belongs_to_a_row_and_a_column():
    for path in SPECS:
        table = spec.load_table(path.stem)
        columns = {c.title: len(c.metrics) for c in table.columns}
        for row, values in table.others.get("rows", {}).items():
            assert row in [r.get("ours") for r in table.rows]
            assert all(len(v) == columns[title] for title, v in values.items())
    medical = spec.load_table("02a")
    row = next(r for r in medical.rows if r["ours"] == "UniNet, released")
    assert spec.reported(medical, row, 0) == [90.0, 89.8, 85.2]
    assert spec.reported(medical, medical.rows[0], 0) == [None] * 3
    args = tables.parse_arguments(["02a", "--data", "nowhere", "--runs", "nowhere", "--datasets", "oct2017"])
    text, rows = tables.filled(medical, args)
    assert rows[0][3:] == [
        "published",
        "reported by others",
        "ours, fair protocol (wide_resnet50_2, seeds 0)",
    ]
    assert ["UniNet, released", "OCT2017", "I-AUROC", "100", "95.2", ""] in rows
    assert "issue 29 of its repository" in text


def test_every_table_has_a_spec():
    parts = {p.stem for p in SPECS}
    for number in range(1, 13):
        name = f"{number:02d}"
        assert any(part.startswith(name) for part in parts)
    assert {"unias", "library"} <= parts


def test_dry_run_needs_no_data(capfd):
    assert run_command(tables.main, ["01b", "--dry-run", "--seeds", "0", "1", "--step-seconds", "2"]) == 0
    out = capfd.readouterr().out
    assert "table 01b: 24 runs" in out and out.count("--category 02") == 8 and "at 2 s per step" in out
    assert run_command(tables.main, ["99", "--dry-run"]) == 2
    assert "no table '99'; there are 01a" in capfd.readouterr().err
    assert run_command(tables.main, ["01"]) == 2
    assert "--data DIR" in capfd.readouterr().err


def test_each_table_takes_its_published_backbone(capfd):
    for table, name in (("unias", "tf_efficientnet_b4"), ("02a", "wide_resnet50_2")):
        args = tables.parse_arguments([table, "--dry-run"])
        _, _, run = next(tables.runs_of(spec.load_table(table), args))
        command = tables.command_of(run, args)
        assert "--backbone" not in command
        assert tables._resolved(tuple(command)).model.backbone == name
    assert run_command(tables.main, ["unias", "--dry-run", "--step-seconds", "1"]) == 0
    assert "2 runs, 193000 steps" in capfd.readouterr().out  # 57 batches an epoch of MVTec AD, 136 of VisA


@pytest.mark.slow
def test_end_to_end(masters, tmp_path, capfd, copied_processes):
    flags = [
        "01b", "--data", str(masters["btad"].parent), "--runs", str(tmp_path / "runs"), "--categories", "01",
        "--rows", "1", "4", "--backbone", TINY, "--iterations", "1", "--output", str(tmp_path / "out"),
        "--quiet", "--april", "--set", "data.image_size=64", "--set", "model.weights=random",
        "--set", "train.batch_size=2", "--set", "train.precision=fp32", "--set", "model.width=0.5",
    ]  # fmt: skip
    assert run_command(tables.main, flags) == 0
    out = capfd.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")
    ]
    assert rows[0] == [
        "method",
        "column",
        "metric",
        "published",
        f"{tables.FAIR} ({TINY}, seeds 0)",
        tables.APRIL,
    ]
    ours = {(r[0], r[2]): r[3:] for r in rows}
    assert ours["PatchCore", "I-AUROC"] == ["93.13", "", ""]
    assert ours["UniNet, released", "I-AUROC"] == ["97.73", "", ""]  # not asked for: stays empty
    published, fair, april = ours["UniNet, paper", "P-AUROC"]
    assert published == "97.7" and fair.endswith("(1 of 3)") and april.endswith("(1 of 3)")
    assert ours["memory bank", "I-AUROC"][0] == "" and ours["memory bank", "I-AUROC"][1]
    lines = (tmp_path / "out/table01b.csv").read_text().splitlines()
    assert lines[0].startswith("method,column,metric,published") and len(lines) == len(rows) - 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("metrics.json")}
    assert run_command(tables.main, flags) == 0  # finished runs are reused
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("metrics.json")} == before
    only = [*flags[: flags.index("--rows")], "--rows", "4", *flags[flags.index("--backbone") :]]
    only.remove("--april")
    capfd.readouterr()
    more = ["--extra-metrics", "aupimo"]  # of the same run
    assert run_command(tables.main, ["06b", *only[1:], *more]) == 0
    line = next(r for r in capfd.readouterr().out.splitlines() if "| memory bank | Class 01 | AUPIMO |" in r)
    assert line.split("|")[4].strip() == "" and float(line.split("|")[5]) >= 0


def test_evaluations_of_an_earlier_model_are_made_again(tmp_path, monkeypatch):
    """Folders test*/ may be left by a model that is no longer there, or by test.py with other settings."""
    args = tables.parse_arguments(["x", "--runs", str(tmp_path)])
    run = tables.Run("btad", "01", ("--model", "memory-bank"), 0, ("score.decision=max",))
    folder = tables.folder_of(run, args)
    calls, own = [], {"settings": {"train.seed": 0}}

    def evaluate(words, **_):
        calls.append(words)
        write(Path(words[words.index("--output") + 1]), len(calls), own)

    def write(where, value, identity):
        where.mkdir(parents=True, exist_ok=True)
        tree = {"results": {"01": {"image_auroc": value}, "mean": {}}, "identity": identity}
        (where / "metrics.json").write_text(json.dumps(tree))

    monkeypatch.setattr(tables.subprocess, "run", evaluate)
    write(folder, 0, own)
    (folder / "last.pt").write_text("")
    write(folder / "test", 0, own)  # test.py's own default
    for name in ("test-decisionmax", "test-tables-decisionmax"):
        write(folder / name, 0, {"settings": {"train.seed": 1}})

    def value():
        return tables.results_of(run, args, "fair")["results"]["01"]["image_auroc"]

    assert value() == 1 and value() == 1 and len(calls) == 1
    later = (folder / "test-tables-decisionmax/metrics.json").stat().st_mtime + 10
    os.utime(folder / "last.pt", (later, later))  # trained again, as the same run
    assert value() == 2


def test_mean_and_spread_over_seeds():
    column = spec.Column("mean", "btad", ("01", "02"), ("image_auroc",))
    runs = [tables.Run("btad", c, (), seed) for seed in (0, 1) for c in ("01", "02")]
    trees = [
        {"timing": {}, "results": {r.category: {"image_auroc": v}}}
        for r, v in zip(runs, (0.8, 0.9, 0.9, 1.0))
    ]
    assert tables._cell(runs, trees, column, "image_auroc", spread=False) == "90.00 ± 7.07"
    assert tables._cell(runs, trees, column, "image_auroc", spread=True) == "7.07"
    assert tables._cell(runs, [*trees[:3], None], column, "image_auroc", spread=False) == "85.00"
    assert tables._cell(runs[:1], [None], column, "image_auroc", spread=False) == ""


@pytest.mark.parametrize("flags", [("--datasets", "mvtek"), ("--categories", "bottel"), ("--rows", "77")])
def test_nothing_by_these_names(tmp_path, capfd, flags):
    """No table of published values alone, as if ours had been asked for and had no run."""
    words = ["04", "--data", str(tmp_path), "--output", str(tmp_path / "out"), *flags]
    assert run_command(tables.main, words) == 2 and not (tmp_path / "out").exists()
    assert "no run of 04 is of these --datasets, --categories and --rows" in capfd.readouterr().err


def test_scripts_as_commands():
    done = processes.run("scripts.tables.reproduce", "--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout
