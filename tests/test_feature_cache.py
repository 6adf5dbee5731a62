"""The frozen teacher's features, kept: the same losses bit for bit, and no second computation."""

import json
import logging

import pytest
import torch
from test_train import run  # noqa: F401 (a fixture)

from model import build_model
from model.teachers import FeatureCache
from utils.config import ConfigError

IMAGES = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
ORDER = [[0, 1, 2, 3], [4, 5, 0, 1], [3, 1, 5, 0], [2, 4, 1, 3]]  # other neighbours, other places


def losses(config, cache, rate=1e-3):
    """Losses of three epochs' worth of steps, and how often the source teacher ran."""
    torch.manual_seed(0)
    model = build_model(config, pretrained=False).to(memory_format=torch.channels_last).train()
    model.teachers.cache = cache
    calls = []
    model.teachers.source.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    found = []
    for chosen in ORDER:
        images = IMAGES[chosen].contiguous(memory_format=torch.channels_last)
        batch = {"image": images, "index": torch.tensor(chosen), "label": torch.zeros(4)}
        loss = model.loss(batch, 0.5)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, len(calls)


@pytest.mark.parametrize("name", ["uninet", "recontrast"])
@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "resnet18"])
def test_losses_are_the_same_bit_for_bit(make_config, name, backbone):
    config = make_config(model__name=name, model__width=0.5, model__backbone=backbone)
    fresh, every_step = losses(config, None)
    kept, calls = losses(config, FeatureCache(6, budget_gb=1))
    assert kept == fresh
    assert every_step == len(ORDER) and calls == 2  # the first two batches hold all images


def test_float16_rounds(make_config):
    """The weights stay where they are: steps of Adam make of a rounding what the processor will."""
    config = make_config(model__width=0.5)
    fresh, _ = losses(config, None, rate=0)
    rounded, calls = losses(config, FeatureCache(6, budget_gb=1, dtype=torch.float16), rate=0)
    assert rounded != fresh and rounded == pytest.approx(fresh, rel=2e-4) and calls == 2


def test_all_or_nothing(make_config, caplog):
    with caplog.at_level(logging.WARNING, "uninet"):
        cache = FeatureCache(10**9, budget_gb=1)
        _, calls = losses(make_config(model__width=0.5), cache)
    assert calls == len(ORDER) and not cache.stored
    assert "more than train.cache_features_gb 1.00: not cached" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("other", [
    {"data__augment": "flip-rotate"}, {"train__scales": [0.75, 1.0]}, {"model__name": "unias"},
])  # fmt: skip
def test_what_it_does_not_go_with(make_config, other):
    with pytest.raises(ConfigError, match=r"train\.cache_features_gb"):
        make_config(train__cache_features_gb=1, **other)


def test_train_writes_the_same_log(run, tmp_path):  # noqa: F811
    logs = []
    for flags in (["--name", "a"], ["--name", "b", "--cache-features", "1"]):
        assert run("--iterations", "7", "--eval", "none", *flags)[0] == 0
        (path,) = (tmp_path / "runs").glob(f"*/*/*/{flags[1]}/log.jsonl")
        logs.append([json.loads(line) for line in path.read_text().splitlines()])
    for line in logs[0] + logs[1]:
        del line["images_per_s"]
    assert logs[0] == logs[1] and len(logs[0]) == 7
