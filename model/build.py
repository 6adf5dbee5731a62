"""The registry: from a resolved configuration to a model."""

from dataclasses import asdict

from model.backbone import build_backbone
from model.base import AnomalyModel
from model.decision import Decision
from model.peers.memory_bank import MemoryBank
from model.peers.recontrast import ReContrast
from model.peers.unias import UniAS
from model.remind import ReMIND
from model.tiles import Tiled
from model.uninet import UniNet
from utils.config import WITH_DECODER, Config, scaled_side


def build_model(config: Config, *, pretrained: bool = True) -> AnomalyModel:
    """Build the model of `config.model.name`, on tiles if `config.data.tile` says so. Raises ValueError,
    OSError as `build_backbone`.

    Args:
        config: the resolved configuration.
        pretrained: False skips the backbone's weights, for a model whose state is loaded next.
    """
    data, random = config.data, not pretrained or config.model.weights == "random"
    size = data.image_size if data.tile is None else (data.tile, data.tile)
    scales = config.train.scales if config.model.name in WITH_DECODER else ()
    backbone, info = build_backbone(
        config.model.backbone,
        config.model.strides,
        image_size=size,
        other_sizes=[(scaled_side(size[0], x), scaled_side(size[1], x)) for x in scales if x != 1],
        weights=None if random else config.model.weights,
        random_weights=random,
    )
    decision = Decision(**asdict(config.score))
    model: AnomalyModel
    if config.model.name == "memory-bank":
        model = MemoryBank(backbone, info, config.model, decision=decision)
    elif config.model.name == "remind":
        # defects with masks, which the head learns
        defects = data.synthetic > 0 or config.model.setting == "supervised"
        model = ReMIND(backbone, info, config.model, loss=config.loss, decision=decision, with_head=defects)
    else:
        network = {"uninet": UniNet, "recontrast": ReContrast, "unias": UniAS}[config.model.name]
        model = network(backbone, info, config.model, loss=config.loss, decision=decision)
    if data.tile is None:
        return model
    return Tiled(model, tile=data.tile, batch_size=config.run.eval_batch_size)
