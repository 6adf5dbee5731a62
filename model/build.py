"""The registry: from a resolved configuration to a model."""

from __future__ import annotations

from dataclasses import asdict

from model.backbone import build_backbone
from model.decision import Decision
from model.memory_bank import MemoryBank
from model.recontrast import ReContrast
from model.tiled import Tiled
from model.unias import UniAS
from model.uninet import UniNet
from utils.config import Config


def build_model(config: Config, *, pretrained: bool = True) -> UniNet | UniAS | MemoryBank | Tiled:
    """Build the model of `config.model.name`, on tiles if `config.data.tile` says so.

    Args:
        config: the resolved configuration.
        pretrained: False skips the backbone's weights, for a model whose state is loaded next.

    Raises:
        ValueError, OSError: as `build_backbone`.
    """
    backbone, info = build_backbone(
        config.model.backbone,
        config.model.strides,
        weights=config.model.weights if pretrained else None,
        random_weights=config.model.random_weights or not pretrained,
    )
    decision = Decision(**asdict(config.score))
    if config.model.name == "memory-bank":
        model = MemoryBank(backbone, info, config.model, decision=decision)
    else:
        network = {"uninet": UniNet, "recontrast": ReContrast, "unias": UniAS}[config.model.name]
        model = network(backbone, info, config.model, loss=config.loss, decision=decision)
    data = config.data
    if data.tile is None:
        return model
    return Tiled(model, tile=data.tile, overlap=data.tile_overlap, batch_size=config.eval.batch_size)
