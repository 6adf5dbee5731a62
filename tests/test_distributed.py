"""Two gloo processes against one with the same global batch: losses, weights, metrics, files."""

import json
import socket
from pathlib import Path

import processes
import pytest
import torch
from conftest import ROOT
from distributed_worker import CASES, descend, prepare
from test_train import SMALL

import train as train_command
from datasets.loader import TrainingOrder
from utils import distributed
from utils.cli import run_command
from utils.errors import ConfigError
from utils.layers import load_config


def run_two(script, argv):
    """Run two processes as torchrun would; gives their stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        group |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        started.append(processes.start(script, *argv, env=group))
    try:
        for process in started:
            process.wait(120)
    finally:
        for process in started:
            process.kill()
    ends = [(process.stdout, process.stderr) for process in started]
    assert all(process.returncode == 0 for process in started), ends
    return ends


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Losses and weights of each case, from two processes."""
    file = tmp_path_factory.mktemp("two") / "two.pt"
    run_two("tests/distributed_worker.py", [str(file)])
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_losses_and_weights_are_those_of_one_process(two, monkeypatch, name):
    prepare(monkeypatch.setattr)
    try:
        parts, weights = descend(name)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(parts, two[name][0], strict=True):
        assert b == pytest.approx(a, rel=1e-8)
    assert len({part["total"] for part in parts}) == len(parts)
    for key, value in weights.items():
        torch.testing.assert_close(two[name][1][key], value, rtol=1e-6, atol=1e-8, msg=f"{name} {key}")


@pytest.mark.parametrize("model", [pytest.param("uninet", marks=pytest.mark.slow), "memory-bank"])
def test_train_writes_one_run_with_the_same_numbers(mvtec_like, tmp_path, capfd, model):
    argv = [
        *SMALL,
        "--model",
        model,
        "--data-root",
        str(mvtec_like),
        "--output",
        str(tmp_path),
        "--iterations",
        "2",
    ]
    # weights hardly move, so float32 scores can be compared; what moves them is compared above
    argv += ["--set", "optim.lr=1e-7", "--set", "optim.lr_teacher=1e-7"]
    argv += ["--set", "eval.every=1"] if model != "memory-bank" else []
    argv += ["--set", "data.calibration_fraction=0.2"]
    assert run_command(train_command.main, [*argv, "--name", "one"]) == 0
    printed = capfd.readouterr().out
    (out, _), (silent, _) = run_two("train.py", [*argv, "--name", "two"])
    assert silent == "" and len(out.splitlines()) == len(printed.splitlines())
    one, two = (files(tmp_path / "mvtec/one-class/part" / name) for name in ("one", "two"))
    assert len(two["log"]) == len(one["log"])  # one process writes
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b.keys() == a.keys()  # of a training step, or of an evaluation, which has no loss
        assert b.get("total", 0) == pytest.approx(a.get("total", 0), rel=1e-4)
    assert [row[:4] for row in two["scores"]] == [row[:4] for row in one["scores"]]  # in order
    columns = [[float(row[4]) for row in run["scores"]] for run in (one, two)]
    assert columns[1] == pytest.approx(columns[0], rel=1e-3)
    assert two["results"] == pytest.approx(one["results"], abs=0.02)


def files(folder: Path):
    """What is compared of a run."""
    metrics, log = json.loads((folder / "metrics.json").read_text()), folder / "log.jsonl"
    return {
        "log": [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [],
        "scores": [line.split(",") for line in (folder / "scores.csv").read_text().splitlines()[1:]],
        "results": metrics["results"]["part"],
    }


@pytest.mark.parametrize(
    ("changes", "samples", "message"),
    [
        ({"train.batch_size": 3}, 12, "no multiple of 2 processes"),
        ({"train.last_batch": "keep"}, 9, "leaves a batch of 1 for 2 processes"),
    ],
)
def test_what_cannot_be_shared_equally_is_refused(monkeypatch, changes, samples, message):
    config = load_config(ROOT / "configs/mvtec.yaml", {"train.batch_size": 4} | changes)
    distributed.check_batches(config.train, samples)  # alone, all of it is possible
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        distributed.check_batches(config.train, samples)
    distributed.check_batches(load_config(ROOT / "configs/mvtec.yaml", {}).train, samples)


def test_a_smaller_last_batch_is_shared():
    parts = [
        list(TrainingOrder(6, 4, seed=0, start=0, stop=2, share=(rank, 2), last_batch="keep"))
        for rank in (0, 1)
    ]
    both = [first + second for first, second in zip(*parts, strict=True)]
    assert both == list(TrainingOrder(6, 4, seed=0, start=0, stop=2, last_batch="keep"))
    assert [len(batch) for batch in parts[1]] == [2, 1]


def test_pieces_hold_every_image_once(monkeypatch):
    for count in (0, 1, 7, 8):
        pieces = []
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "world_size", lambda: 3)
            pieces += distributed.shard(count)
        assert pieces == list(range(count))
