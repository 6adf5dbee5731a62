"""The registry: from a resolved configuration to a model."""

from __future__ import annotations

from dataclasses import asdict

from model.backbone import build_backbone
from model.decision import Decision
from model.memory_bank import MemoryBank
from model.recontrast import ReContrast
from model.unias import UniAS
from model.uninet import UniNet
from utils.config import Config


def build_model(config: Config, *, pretrained: bool = True) -> UniNet | UniAS | MemoryBank:
    """Build the model of `config.model.name`.

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
        return MemoryBank(backbone, info, config.model, decision=decision)
    network = {"uninet": UniNet, "recontrast": ReContrast, "unias": UniAS}[config.model.name]
    return network(backbone, info, config.model, loss=config.loss, decision=decision)
