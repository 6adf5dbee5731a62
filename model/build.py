"""The registry: from a resolved configuration to a model."""

from model.backbone import build_backbone
from model.base import AnomalyModel
from model.peers.memory_bank import MemoryBank
from model.peers.recontrast import ReContrast
from model.peers.unias import UniAS
from model.remind import ReMIND
from model.tiles import tiled
from model.uninet import UniNet
from utils.config import WITH_DECODER, Config, scaled_side

NETWORKS: dict[str, type[AnomalyModel]] = {
    "uninet": UniNet,
    "remind": ReMIND,
    "recontrast": ReContrast,
    "unias": UniAS,
    "memory-bank": MemoryBank,
}


def build_model(config: Config, *, pretrained: bool = True) -> AnomalyModel:
    """Build the model of `config.model.name`, on tiles if `config.data.tile` says so.

    pretrained: False skips the backbone's weights, as a state is loaded next. Raises as `build_backbone`.
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
    model = NETWORKS[config.model.name](backbone, info, config)
    if data.tile is None:
        return model
    return tiled(model, tile=data.tile, batch_size=config.run.eval_batch_size)
