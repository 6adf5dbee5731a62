"""scripts/tables/slurm.sh with a stand-in for sbatch: the array covers every run once."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def slurm(tmp_path):
    """Call the script with an `sbatch`, and on request a `python`, that write their arguments."""
    for name in ("sbatch", "train/python"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$*"\n[[ "$*" != *fails* ]]\n')
        path.chmod(0o755)

    def call(*flags, task=None):
        first = tmp_path if task is None else tmp_path / "train"
        path = f"{first}:{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "VIRTUAL_ENV": "active", "SLURM_ARRAY_TASK_ID": str(task)}
        words = ["bash", ROOT / "scripts/tables/slurm.sh", *map(str, flags)]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, check=False)

    return call


@pytest.mark.slow
def test_an_array_over_categories_and_seeds(slurm):
    flags = ("--data", "DATA", "--tables", "01b library", "--seeds", "0 1", "--tasks", 4)
    done = slurm(*flags, "--", "--partition=p")
    assert done.returncode == 0, done.stderr
    said, sent = done.stdout.splitlines()
    words = shlex.split(sent)
    assert "--array=0-3" in words and "--partition=p" in words
    listed = ROOT / said.rpartition(" ")[2]
    lines = listed.read_text().splitlines()
    listed.unlink()
    assert len(lines) == len(set(lines)) == int(said.split()[0])
    for part in ("--data-root DATA/btad --category 02", "--category screw", "--seed 0", "--seed 1"):
        assert any(part in line for line in lines), part


def test_tasks_share_the_runs_and_survive_a_failure(slurm, tmp_path):
    runs = [f"python train.py --seed {i}{' fails' if i == 0 else ''}" for i in range(7)]
    (tmp_path / "runs.txt").write_text("".join(f"{run}\n" for run in runs))
    done = [slurm("--task", tmp_path / "runs.txt", 3, task=task) for task in range(3)]
    assert [d.returncode for d in done] == [1, 0, 0]
    taken = [line for d in done for line in d.stdout.splitlines()]
    assert sorted(f"python {line}" for line in taken) == [f"{run} --resume --quiet" for run in sorted(runs)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data is missing"),
        (["--data", "a b"], "spaces"),
        (["--data", "D", "--tasks", "0"], "from 1 on"),
        (["--data", "D", "--what", "0"], "unknown flag --what"),
    ],
)
def test_wrong_use_is_told_in_a_line(slurm, flags, message):
    done = slurm(*flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_help_states_the_defaults(slurm):
    done = slurm("--help")
    assert done.returncode == 0 and not done.stderr
    text = (ROOT / "scripts/tables/slurm.sh").read_text()
    for line, words in (
        ("seeds=0 tasks=100", "seed 0, 100 tasks"),
        ("--cpus-per-task=8 --mem=32G", "8 cores, 32 GB"),
    ):
        assert line in text and words in done.stdout
