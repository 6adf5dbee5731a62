"""scripts/**/*.sh from any folder: relative paths are the user's, and each answers --help or --dry-run."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from datasets.registry import SPECS
from scripts.figures.reproduce import FIGURES
from scripts.tables.spec import SPECS_DIR
from utils.cli import run_command
from utils.yaml_io import read_yaml


@pytest.fixture
def call(tmp_path):
    """Run a script in `tmp_path` with a `python` that writes its folder and arguments, one a line."""
    program = tmp_path / "bin/python"
    program.parent.mkdir()
    program.write_text('#!/usr/bin/env bash\npwd\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)

    def call(name, *flags, cwd=tmp_path):
        env = os.environ | {"VIRTUAL_ENV": "active", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        words = ["bash", ROOT / f"scripts/{name}.sh", *flags]
        done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return call


def test_an_old_python_is_named(call, tmp_path):
    (tmp_path / "bin/python").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 || exit 1\n')
    with pytest.raises(subprocess.CalledProcessError) as caught:
        call("demo")
    error = caught.value.stderr
    assert error.startswith("error: Python 3.10 or newer is needed, and python is Python 3.9.1. Set PYTHON=")
    assert error.count("\n") == 1


def test_a_finished_dataset_can_be_trained_again(call):
    assert "--resume" in call("datasets/mvtec", "DIR")
    words = call("datasets/mvtec", "DIR", "--overwrite")
    assert "--overwrite" in words and "--resume" not in words and "" not in words


def test_no_file_claims_a_package():
    """Its folders have common names (datasets, model, utils), which would hide those of other packages."""
    assert not [name for name in ("setup.py", "setup.cfg") if (ROOT / name).exists()]
    text = (ROOT / "pyproject.toml").read_text()
    assert "[project" not in text and "[build-system]" not in text


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (
            "datasets/mvtec",
            "a_b --output=out --weights w.pt --category x",
            "{}/a_b --resume --output={}/out --weights {}/w.pt",
        ),
        ("datasets/mvtec", "a --output=~/out", "{}/a --resume --output=HOME/out"),
        ("datasets/mvtec", "a --output c=d --config=e=f", "{}/a --resume --output {}/c=d --config={}/e=f"),
        ("tables/table01", "--data ../d --output t --seeds 0 1", "--data {}/../d --output {}/t --seeds 0 1"),
        (
            "tables/accuracy",
            "--data mvtec=d kolektor=/k --runs r --dry-run",
            "--data mvtec={}/d kolektor=/k --runs {}/r",
        ),
        ("figures/figure_smoothing", "--output f", "smoothing --output {}/f"),
        ("demo", "--output o --iterations 3", "-m scripts.demo --output {}/o --iterations 3"),
    ],
)
def test_paths_of_flags(call, tmp_path, script, flags, expected):
    lines = call(script, *flags.split())
    expected = expected.format(*[tmp_path] * 4).replace("HOME", str(Path.home()))
    assert lines[0] == str(ROOT) and expected in " ".join(lines)


def test_in_the_repository_nothing_changes(call):
    line = " ".join(call("datasets/mvtec", "rel", "--output", "out", cwd=ROOT))
    assert line.endswith("rel --resume --output out")


SCRIPTS = [
    path.relative_to(ROOT / "scripts").with_suffix("").as_posix()
    for pattern in ("tables/table*", "tables/accuracy", "figures/figure*", "datasets/[!r]*")
    for path in sorted((ROOT / "scripts").glob(f"{pattern}.sh"))
]


def test_every_table_figure_and_dataset_has_a_script():
    found = {kind: {Path(s).name for s in SCRIPTS if s.startswith(kind)} for kind in ("t", "f", "d")}
    assert found["d"] == set(SPECS) - {"folder", "demo"}
    numbers = {path.stem.rstrip("abcd") for path in SPECS_DIR.glob("*.yaml")}
    assert found["t"] == {f"table{n}" if n[0].isdigit() else f"table_{n}" for n in numbers} | {"accuracy"}
    theory = {"figure_temperature", "figure_smoothing"}
    assert found["f"] == {f"figure{n}" for n in read_yaml(FIGURES)} | theory


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_answers(call, script, capfd):
    """What a script calls in Python is called here, not in a process."""
    if script.startswith("datasets/"):
        assert call(script, "--help")[0].startswith(f"usage: bash scripts/{script}.sh DATA_ROOT ")
        return
    given = ["--help"] if "figure_" in script else ["--dry-run"]
    given += ["--datasets", "ped2", "--seeds", "0"] if script == "tables/accuracy" else []  # of 1,200 runs
    _, m, module, *flags = call(script, *given)
    assert m == "-m" and flags[-len(given) :] == given
    main = importlib.import_module(module).main
    if given == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            main(flags)
    else:
        assert run_command(main, flags) == 0
        assert "python train.py --dataset " in capfd.readouterr().out.replace(f"{ROOT}/", "")


def test_a_benchmark_keeps_a_table_that_is_there(tmp_path):
    (tmp_path / "t.md").write_text("kept")
    words = [sys.executable, ROOT / "benchmarks/run.py", "--markdown", tmp_path / "t.md"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "t.md is there already; choose a new file" in done.stderr
    assert (tmp_path / "t.md").read_text() == "kept"
