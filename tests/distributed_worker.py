"""Steps of plain gradient descent on generated images, in one process or several; for test_distributed.py.

python tests/distributed_worker.py FILE: writes losses and weights of the leading process to FILE.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import build_model  # noqa: E402
from utils import distributed  # noqa: E402
from utils.config import load_config  # noqa: E402

MODELS = ("uninet", "recontrast")
BATCH, STEPS = 4, 2


def double_precision(patch=setattr):
    """Compute in float64 all that asks for float32.

    Random weights at 64 px are badly conditioned: in float32 a change of the images by 1e-7 changes gradients
    by percents, as a sum in another order does, and hides mistakes of that size.
    """
    patch(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)


def descend(name):
    """Loss parts of each step, and the weights after the last."""
    torch.manual_seed(0)
    chosen = {"model.name": name, "model.backbone": "test_efficientnet", "model.random_weights": True}
    config = load_config(ROOT / "configs/mvtec.yaml", chosen | {"model.width": 0.25, "data.image_size": 64})
    model = build_model(config, pretrained=False).train()
    loss, parts = distributed.shared_loss(model), []
    rank, world = distributed.place()
    # steps of the gradients' size show a wrong factor; decay shows an unused weight that got a zero gradient
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=1e-2, weight_decay=0.1)
    images = torch.randn(STEPS, BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        found = loss({"image": images[step].chunk(world)[rank]}, 0.05)
        optimizer.zero_grad()
        found["total"].backward()
        optimizer.step()
        parts.append({k: v.item() for k, v in distributed.averaged(found).items()})
    return parts, model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    double_precision()
    with distributed.processes():
        results = {name: descend(name) for name in MODELS}
        if distributed.leads():
            torch.save(results, sys.argv[1])
