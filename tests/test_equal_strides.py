"""Levels of one stride: the blocks of a ViT as levels of every model with a decoder or a bank."""

import pytest
import timm
import torch
from conftest import LITE0, levels

from model import build_model
from model.backbone import build_backbone
from model.bottleneck import Bottleneck
from model.student import Student
from utils.errors import ConfigError

VIT = "test_vit"  # of timm: six blocks of 64 channels
EQUAL = {"model__backbone": VIT, "model__strides": [16, 16, 16], "model__width": 0.5}
MODELS = [
    {"model__name": "uninet"},
    {"model__name": "uninet", "model__flavor": "released"},
    {"model__name": "recontrast"},
    {"model__name": "remind", "model__bank_fraction": 0.5},
]


@pytest.mark.parametrize(("count", "blocks"), [(1, [5]), (2, [2, 5]), (3, [1, 3, 5]), (4, [0, 2, 3, 5])])
@torch.no_grad()
def test_levels_are_blocks_spread_evenly(count, blocks):
    net, info = build_backbone(VIT, (16,) * count, image_size=(64, 32), random_weights=True)
    whole = timm.create_model(VIT).eval()
    whole.load_state_dict(net.model.state_dict(), strict=False)
    image = torch.randn(2, 3, 64, 32)
    expected = whole.forward_intermediates(image, indices=blocks, intermediates_only=True)
    assert info.strides == (16,) * count and info.channels == (64,) * count
    for found, block in zip(net.eval()(image), expected, strict=True):
        torch.testing.assert_close(found, block)
        assert found.shape == (2, 64, 4, 2)


def test_more_levels_than_blocks_is_one_line():
    for strides in ((16,) * 7, (4, 8, 16)):
        with pytest.raises(
            ValueError, match=r"\[16\], asked for \[.*\]; model.strides may name 16 up to 6 times$"
        ):
            build_backbone(VIT, strides, random_weights=True)
    with pytest.raises(ValueError, match=r"has strides \[2, 4, 8, 16, 32\], asked for \[8, 8\]$"):
        build_backbone(LITE0, (8, 8), random_weights=True)


@pytest.mark.parametrize("strides", [(16, 16, 16), (4, 4, 8), (8, 16, 16), (4, 8, 16), (16,), (2, 4, 4, 8)])
@torch.no_grad()
def test_a_decoder_restores_each_level_at_its_size(strides):
    channels = (8, 16, 12, 20)[: len(strides)]
    info, sizes = levels(*channels, strides=strides), [(64 // s, 96 // s) for s in strides]
    features = [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    bottleneck = Bottleneck(info).eval()
    student = Student(info, bottleneck.out_channels, skips=True).eval()
    embedding = bottleneck(features)
    assert embedding.shape == (2, 2 * channels[-1], 32 // strides[-1], 48 // strides[-1])
    assert [f.shape for f in student(embedding, features)] == [f.shape for f in features]


@pytest.mark.parametrize("settings", MODELS)
def test_trains_and_predicts(make_config, settings):
    model = build_model(make_config(**EQUAL, **settings), pretrained=False)
    image, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    mask[1, :, 10:30, 10:30] = 1
    if model.fits:
        model.fit([image], seed=0)
    model.train().loss({"image": image, "label": torch.tensor([0, 1]), "mask": mask}, 0.0)["total"].backward()
    trained = dict(model.student.named_parameters()) | dict(model.bottleneck.named_parameters())
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if model.fits:
        model.fit_score([image])
    found = model.eval().predict(image)
    assert found.anomaly_map.shape == (2, 64, 64) and found.score.isfinite().all()


def test_a_bank_takes_equal_levels(make_config):
    model = build_model(make_config(model__name="memory-bank", **EQUAL), pretrained=False).eval()
    image = torch.randn(1, 3, 64, 64)
    model.fit([image], seed=0)
    assert model.bank.shape[1] == 2 * 64 and model.predict(image).score > 0


def test_curves_of_equal_levels_have_names_of_their_own(make_config):
    """One name for several levels would keep the last level's values alone."""
    model = build_model(make_config(**EQUAL), pretrained=False)
    with torch.no_grad():
        for level, theta in enumerate(model.dfs.theta):
            theta.fill_(level)
    values = model.diagnostics()
    assert [values[f"theta/stride16-{level}/mean"] for level in (1, 2, 3)] == [0, 1, 2]
    apart = build_model(make_config(), pretrained=False).diagnostics()
    assert {"theta/stride4/mean", "theta/stride8/mean", "theta/stride16/mean"} <= set(apart)


@pytest.mark.parametrize("strides", [[16, 8], [4, 16], [16, 16, 8]])
def test_levels_only_stay_or_double(make_config, strides):
    with pytest.raises(ConfigError, match="twice the one before, such as .*, or the same"):
        make_config(model__strides=strides)
