"""Every model learns: trained on the demo's flanges for seconds, it finds defects better than chance."""

import json

import pytest
from conftest import ROOT
from distributed_worker import SMALL_UNIAS

import train as train_command
from datasets.demo import write_demo
from model.peers import unias
from utils.cli import run_command

COMMON = (
    "--config configs/demo.yaml --category flange --device cpu --precision fp32 --quiet --name learnt "
    "--set data.image_size=64 --set train.batch_size=8 --save-every 1000"
)
MODELS = {
    "memory-bank": "--model memory-bank",
    "uninet, paper": "--flavor paper --iterations 40",
    "uninet, released": "--flavor released --iterations 40",
    "remind": "--model remind --iterations 40",
    "recontrast": "--model recontrast --iterations 40",
    "unias": "--model unias --setting one-class --iterations 20 --set optim.lr=1e-3 --set train.batch_size=2",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo"), size=64)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_better_than_chance(demo, tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    for constant, value in SMALL_UNIAS.items():
        monkeypatch.setattr(unias, constant, value)
    where = ["--data-root", str(demo), "--output", str(tmp_path)]
    assert run_command(train_command.main, [*COMMON.split(), *MODELS[name].split(), *where]) == 0
    (found,) = tmp_path.rglob("metrics.json")
    results = json.loads(found.read_text())["results"]["flange"]
    assert results["pixel_auroc"] > 0.65, results  # image scores take longer than seconds
