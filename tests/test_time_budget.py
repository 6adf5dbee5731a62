"""`--minutes`: the length that fits, the size of own images, what is kept, what is refused."""

import time

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, write_image

import train as train_command
from model import time_budget
from model.remind import ReMIND
from utils.cli import run_command
from utils.runs import run_folder
from utils.yaml_io import read_yaml

SMALL = ["--config", "configs/folder.yaml", "--backbone", TINY, "--weights", "random", "--device", "cpu"]
SMALL += ["--precision", "fp32", "--quiet", "--set", "train.batch_size=2"]


@pytest.fixture
def call(mvtec_like, tmp_path, monkeypatch):
    """train.py on tiny own images; the settings of the runs there are, oldest first."""
    monkeypatch.chdir(ROOT)

    def call(*flags, data=mvtec_like, code=0):
        words = [*SMALL, "--data-root", str(data), "--output", str(tmp_path / "runs"), *map(str, flags)]
        assert run_command(train_command.main, words) == code
        found = (tmp_path / "runs").rglob("config.yaml")
        return [read_yaml(path) for path in sorted(found, key=lambda path: path.stat().st_mtime)]

    return call


def measured(monkeypatch, step):
    """Take the seconds of a step as given."""
    monkeypatch.setattr(time_budget, "measure", lambda config, device: (step, 0))


@pytest.mark.slow
def test_the_length_is_recorded_and_repeats_the_run(call, capfd):
    (first,) = call("--minutes", 0.01)
    steps = first["train"]["iterations"]
    assert steps == time_budget.FEWEST and first["data"]["image_size"] == [32, 32]  # images are 48 x 40
    (again,) = call("--iterations", steps, "--set", "data.image_size=32")  # it is the same run
    assert again == first


@pytest.mark.slow
def test_resume_keeps_the_length(call, monkeypatch):
    measured(monkeypatch, step=2.5)
    (first,) = call("--minutes", 1)
    measured(monkeypatch, step=1.5)
    assert call("--minutes", 1, "--resume") == [first]
    (_, other) = call("--minutes", 1, "--resume", "--seed", 1)
    assert other["train"]["iterations"] > first["train"]["iterations"]


def test_steps_and_size_follow_from_time(tmp_path, monkeypatch, make_config):
    for i in range(4):
        write_image(tmp_path / f"tall/train/good/{i}.png", np.random.default_rng(i), size=(512, 256))

    def measure(config, device):  # 10 seconds a megapixel, 30 for the rest
        height, width = config.data.image_size
        return height * width / 1e5, 30

    monkeypatch.setattr(time_budget, "measure", measure)

    def chosen(seconds, **settings):
        config = make_config("configs/folder.yaml", run__data_root=str(tmp_path / "tall"), **settings)
        return time_budget.choose(config, seconds, free=True)

    # 352 x 160 pixels: 0.563 s a step; 256 x 128: 0.328 s; 160 x 64: 0.102 s
    assert chosen(30 + 0.563 * 500) == (pytest.approx(499, abs=2), (352, 160))
    assert chosen(30 + 0.563 * 300) == (pytest.approx(515, abs=3), (256, 128))
    assert chosen(30 + 0.102 * 100) == (pytest.approx(98, abs=3), (160, 64))
    coarse = chosen(30 + 0.563 * 500, model__strides=[8, 16, 32])[1]  # the bottleneck is at stride 64
    assert coarse == (320, 128) and chosen(0.1, model__strides=[2, 4, 8])[1] == (176, 80)
    assert chosen(0.1)[0] == time_budget.FEWEST and chosen(10**6) == (time_budget.MOST, (352, 160))


@pytest.mark.slow
def test_a_given_size_stays(call, monkeypatch):
    measured(monkeypatch, step=1)
    (found,) = call("--minutes", 0.1, "--set", "data.image_size=64")
    assert found["data"]["image_size"] == [64, 64]


@pytest.mark.parametrize(("flags", "message"), [
    (("--minutes", "0"), "--minutes is 0; expected the minutes"),
    (("--minutes", "-3"), "--minutes is -3; expected"),
    (("--minutes", "nan"), "--minutes is nan; expected"),
    (("--minutes", "inf"), "--minutes is inf; expected"),
    (("--minutes", "3", "--iterations", "5"), "--iterations gives it; leave one out"),
    (("--minutes", "3", "--set", "train.epochs=5"), "--iterations gives it; leave one out"),
])  # fmt: skip
def test_one_line_says_what_is_wrong(call, capfd, flags, message):
    assert call(*flags, code=2) == []
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_several_categories_share_the_time(monkeypatch, make_config):
    budget = time_budget.TimeBudget(2, {}, ROOT / "configs/folder.yaml")
    given = []
    monkeypatch.setattr(
        time_budget, "choose", lambda config, seconds, free: given.append(seconds) or (7, (32, 32))
    )
    args = train_command.parse_arguments(SMALL)
    for runs in (2, 1):
        config = budget.fit(make_config("configs/folder.yaml"), args, runs=runs)
        assert (config.train.iterations, config.train.epochs, config.data.image_size) == (7, None, (32, 32))
    assert given == [pytest.approx(60, abs=1), pytest.approx(120, abs=1)]


def test_an_earlier_length_is_found_by_any_name(make_config, tmp_path):
    config = make_config(train__iterations=77)
    for name in ("plain", "a[1]"):
        folder = run_folder(config, tmp_path, name)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
        other = make_config(train__iterations=5)
        assert time_budget.chosen_before(other, tmp_path, name, free=True) == (77, (64, 64))
    assert time_budget.chosen_before(other, tmp_path, "b", free=True) is None


def test_a_memory_bank_takes_no_steps(call, capfd):
    (found,) = call("--minutes", 1, "--model", "memory-bank")
    assert found["train"]["iterations"] == read_yaml(ROOT / "configs/folder.yaml")["train"]["iterations"]


@pytest.mark.slow
def test_a_bank_of_all_images_counts(make_config, mvtec_like, monkeypatch):
    """Not that of the few that are timed."""
    settings = {"model__name": "remind", "model__width": 0.25, "train__batch_size": 1}
    config = make_config(run__data_root=str(mvtec_like), data__category="part", **settings)
    plain, cpu = ReMIND.fit, torch.device("cpu")

    def slow(model, images, *, seed):
        time.sleep(1)
        plain(model, images, seed=seed)

    def measured():  # the lower of two: a process's first calls take longer, and others take its core
        return min(time_budget.measure(config, cpu)[::-1] for _ in range(2))

    rest, step = measured()
    monkeypatch.setattr(ReMIND, "fit", slow)
    longer = measured()[0] - rest
    whole = len(time_budget.split_samples(config).train) / time_budget.PROBE
    assert step > 0 and longer == pytest.approx(whole, rel=0.5)
