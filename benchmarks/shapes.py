"""Our UniNet in the shapes that are compared: `paper`, `released`, and the peer's."""

from __future__ import annotations

import torch
from protocol import Spec

from model import build_model
from model.base import AnomalyModel
from model.bottleneck import MEM
from model.layers import conv_bn, init_weights
from model.uninet import UniNet
from utils.config import Config
from utils.layers import load_config
from utils.yaml_io import CONFIGS

SHAPES = {
    "paper": {"model.flavor": "paper"},
    "released": {"model.flavor": "released"},
    "peer": {"model.flavor": "released", "model.dfs_theta": "learnable", "optim.preset": "multi-class"},
    "memory-bank": {"model.name": "memory-bank"},
}


def configuration(spec: Spec) -> Config:
    """One-class MVTec AD with random weights; `peer` learns theta and uses AMSGrad, as the peer does."""
    chosen = {
        "model.weights": "random",
        "data.image_size": spec.size,
        "train.batch_size": spec.batch,
        "train.precision": spec.precision,
        "loss.temperature": 0.1,
    }
    return load_config(CONFIGS / "mvtec.yaml", chosen | SHAPES[spec.variant])


def uninet(spec: Spec) -> AnomalyModel:
    """The model on the spec's device, in channels-last order."""
    model = build_model(configuration(spec), pretrained=False)
    if spec.variant == "peer":
        halve_branches(model)
    return model.to(spec.device).to(memory_format=torch.channels_last)


def halve_branches(model: AnomalyModel) -> None:
    """Give each MEM the peer's inner width: two branches of an eighth of the outputs, not of a quarter."""
    assert isinstance(model, UniNet)
    blocks, out_channels = model.bottleneck.blocks, model.bottleneck.out_channels
    for i, block in enumerate(blocks):
        assert isinstance(block, MEM)
        in_channels, stride = sum(block.split), 1 if i else 2
        narrow = MEM(in_channels, out_channels // 2, stride=stride, kernels=(3, 3), reparam="none")
        narrow.merge, narrow.shortcut = conv_bn(out_channels // 4, out_channels, 1), block.shortcut
        init_weights(narrow)
        blocks[i] = narrow
