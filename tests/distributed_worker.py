"""Steps of plain gradient descent on generated images, in one process or several; for test_distributed.py.

python tests/distributed_worker.py FILE: writes losses and weights of the leading process to FILE.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets.transforms import flip_rotate, random_tile  # noqa: E402
from model import build_model  # noqa: E402
from model.peers import unias  # noqa: E402
from utils import distributed  # noqa: E402
from utils.layers import load_config  # noqa: E402

SUPERVISED, TILES = {"model.setting": "supervised"}, {"data.image_size": 96, "data.tile": 64}
# what each name of a case stands for: the settings, and what a batch has beside images
CASES = {
    "uninet": ({}, ()),
    "uninet, anomalous": ({"loss.kd": "pointwise", "loss.temperature": 0.1}, ("label",)),
    "uninet, label head": (SUPERVISED | {"model.head": "label", "loss.supervised": "bce"}, ("label",)),
    "uninet, dice": (SUPERVISED | {"model.head": "mask", "loss.supervised": "dice"}, ("label", "mask")),
    "uninet, tiles": (TILES | {"loss.anomaly_source": "mask"}, ("label", "mask")),
    "remind": ({"model.name": "remind"}, ("label", "mask")),
    "remind, second teacher": ({"model.name": "remind", "loss.terms": ["adapt"]}, ("label", "mask")),
    "recontrast": ({"model.name": "recontrast"}, ()),
    "unias": ({"model.name": "unias"}, ()),
}
BATCH, STEPS = 4, 2
SMALL_UNIAS = {"D": 32, "G": 4, "FFN": 64, "NEIGHBOURS": 3}
WITHOUT_CHANCE = {"DROPOUT": 0.0, "NOISE_CHANCE": 0.0}  # what differs between processes


def prepare(patch=setattr):
    """Compute in float64 all that asks for float32; a small UniAS without random numbers.

    Random weights at 64 px are badly conditioned: in float32 a change of the images by 1e-7 changes gradients
    by percents, as a sum in another order does, and hides mistakes of that size.
    """
    patch(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    for name, value in (SMALL_UNIAS | WITHOUT_CHANCE).items():
        patch(unias, name, value)


def batches(size, extra):
    """Global batches; the third image of each has a defect, the others have none."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = {"image": torch.randn(BATCH, 3, size, size, generator=generator)}
        label, mask = torch.tensor([0, 0, 1, 0]), torch.zeros(BATCH, 1, size, size, dtype=torch.uint8)
        mask[2, :, 10 : size // 2, 20 : size // 2] = 1
        yield batch | {k: v for k, v in (("label", label), ("mask", mask)) if k in extra}


def descend(name):
    """Loss parts of each step, and the weights after the last."""
    torch.manual_seed(0)
    settings, extra = CASES[name]
    chosen = {"model.backbone": "test_efficientnet", "model.weights": "random", "model.width": 0.25}
    config = load_config(ROOT / "configs/mvtec.yaml", chosen | {"data.image_size": 64} | settings)
    model = build_model(config, pretrained=False).train()
    loss, parts = distributed.wrap_ddp(model, model.loss), []
    # steps of the gradients' size show a wrong factor; decay shows an unused weight that got a zero gradient
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=1e-2, weight_decay=0.1)
    for step, batch in enumerate(batches(config.data.image_size[0], extra)):
        own = distributed.shard(BATCH)
        batch = {k: v[own.start : own.stop] for k, v in batch.items()}
        if config.data.tile:
            batch = flip_rotate(batch, np.random.default_rng(step))
            batch = random_tile(batch, config.data.tile, np.random.default_rng(step + 1))
        found = loss(batch, 0.05 if name == "recontrast" else 0.5)
        optimizer.zero_grad()
        found["total"].backward()
        optimizer.step()
        parts.append({k: v.item() for k, v in distributed.reduce_mean(found).items()})
    return parts, model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare()
    with distributed.processes():
        results = {name: descend(name) for name in CASES}
        if distributed.is_main_process():
            torch.save(results, sys.argv[1])
