"""A training that is killed again and again and resumed ends as an undisturbed one, bit for bit."""

import json
import os
import random
import signal
import time

import processes
import pytest
import torch

from datasets.demo import write_demo
from utils.checkpoint import FILE, load_checkpoint
from utils.files import PARTIAL

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SETTINGS = (
    "data.image_size=64", "model.weights=random", "model.width=0.25", "train.batch_size=2",
    "eval.every=4",
)  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Start a tiny training with a name; it resumes what is there."""
    write_demo(tmp_path / "demo", size=64)
    command = ["--config", "configs/folder.yaml", "--data-root", tmp_path / "demo", "--category", "flange"]
    command += ["--model", "uninet"]
    command += ["--output", tmp_path / "runs", "--iterations", "5", "--device", "cpu", "--precision", "fp32"]
    command += ["--quiet", "--resume", "--save-every", "1", *(f for s in SETTINGS for f in ("--set", s))]
    return lambda name: processes.start("train.py", *command, "--name", name)


def kill(script, number, folder, after):
    """Send the signal after some seconds; with `folder`, later, when a checkpoint is being written there."""
    began = time.monotonic()
    while script.poll() is None:
        waited = time.monotonic() - began >= after
        if waited and (folder is None or any(folder.glob(f".{FILE}.*{PARTIAL}"))):
            os.kill(script.pid, number)
            break
        time.sleep(0.0005)


@pytest.mark.slow
def test_killed_at_random_moments(start, tmp_path):
    rng, kills = random.Random(1), 0
    began = time.monotonic()
    assert start("whole").wait().returncode == 0
    seconds = time.monotonic() - began
    (whole,) = (tmp_path / "runs").glob("*/*/*/whole")
    while kills < 4:
        ended = False
        while not ended:
            script = start("killed")
            if kills < 4:  # every second process dies while it writes, the others at any moment
                number, after = rng.choice(SIGNALS), rng.uniform(0, seconds / 2)
                kill(script, number, whole.with_name("killed") if kills % 2 else None, after)
            ended = script.wait().returncode == 0
            kills += not ended
            assert script.returncode in (0, 1, *(-s for s in SIGNALS)) and kills < 6, script.stderr
        compare(whole, whole.with_name("killed"))
        for path in (whole.with_name("killed") / "metrics.json", whole.with_name("killed") / FILE):
            path.unlink()


def compare(whole, killed):
    """Weights, metrics, scores and validation curve are the same, and nothing is left over."""
    ours, theirs = (load_checkpoint(folder / FILE).model for folder in (whole, killed))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed)]
    assert all(found[0][key] == found[1][key] for key in ("results", "curve"))
    assert (whole / "scores.csv").read_bytes() == (killed / "scores.csv").read_bytes()
    assert not list(killed.glob(f".*{PARTIAL}"))
