"""The peer's half: anomalib's UniNet, its loss, AUPRO and PatchCore. Runs in the peer's environment.

Needs anomalib and torch alone. Weights are random: the teacher factory is told not to load any.
"""

from __future__ import annotations

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.models.image.uninet import torch_model
from anomalib.models.image.uninet.components import UniNetLoss
from generated import images, maps_and_masks, unit_features
from protocol import Reply, Spec, Workload, serve
from torch.amp import autocast
from torchvision.models import wide_resnet50_2
from torchvision.models.feature_extraction import create_feature_extractor

BACKBONE = "wide_resnet50_2"


def _teacher(_name: str) -> torch.nn.Module:
    """What `Teachers._get_teacher` gives, without the download."""
    return create_feature_extractor(
        wide_resnet50_2(weights=None), return_nodes=["layer3", "layer2", "layer1"]
    )


def model(spec: Spec) -> torch_model.UniNetModel:
    """The peer's model with its own loss."""
    torch_model.Teachers._get_teacher = staticmethod(_teacher)
    return torch_model.UniNetModel(BACKBONE, BACKBONE, UniNetLoss(temperature=0.1)).to(spec.device)


def train(spec: Spec) -> Workload:
    """A step as its Lightning module takes it: forward, backward, its one AdamW."""
    net, batch = model(spec).train(), images(spec)
    labels = torch.zeros(spec.batch, device=spec.device)
    learnt = [net.student, net.bottleneck, net.dfs]
    groups: list[dict[str, object]] = [{"params": list(part.parameters())} for part in learnt]
    groups.append({"params": list(net.teachers.target_teacher.parameters()), "lr": 1e-6})
    optimizer = torch.optim.AdamW(groups, lr=5e-3, weight_decay=1e-5, eps=1e-10, amsgrad=True)

    def step() -> None:
        with autocast(spec.device.split(":")[0], torch.bfloat16, enabled=spec.precision == "bf16"):
            loss = net(batch, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def predict(spec: Spec) -> Workload:
    """Score `count` images in batches."""
    net, batch = model(spec).eval(), images(spec)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(spec.count // spec.batch):
            net(batch)

    return run


def similarity(spec: Spec) -> Workload:
    """Its loss on one pair, forward and backward; the cosine term with it cannot be left out and is small."""
    student, teacher = (x.requires_grad_() for x in unit_features(spec))
    loss = UniNetLoss(temperature=2.0)

    def run() -> None:
        student.grad = teacher.grad = None
        loss([student], [teacher]).backward()

    return run


def pixel_metrics(spec: Spec) -> Workload:
    """Its PRO alone, at 0.3 and as exact as it has it."""
    maps, masks = (torch.from_numpy(x) for x in maps_and_masks(spec))

    def run() -> Reply:
        metric = _AUPRO(fpr_limit=0.3)
        metric.update(maps, masks.int())
        return {"pro": float(metric.compute())}

    return run


def memory_bank(spec: Spec) -> Workload:
    """PatchCore: fit on `count` images (its coreset), then score one batch."""
    batch = images(spec)

    def run() -> None:
        torch.manual_seed(0)
        net = PatchcoreModel(["layer2", "layer3"], BACKBONE, pre_trained=False).to(spec.device)
        net.train()
        for _ in range(spec.count // spec.batch):
            net(batch + 0.1 * torch.randn_like(batch))
        net.subsample_embedding(0.1)
        net.eval()
        with torch.inference_mode():
            net(batch)

    return run


WORKLOADS = {
    "train": train,
    "predict": predict,
    "similarity": similarity,
    "pixel-metrics": pixel_metrics,
    "memory-bank": memory_bank,
}


def build(spec: Spec) -> tuple[Workload, Reply]:
    """The workload after a warm-up run, and the peer's versions."""
    import anomalib

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries may use the global generator)
    torch.set_num_threads(spec.threads)
    run = WORKLOADS[spec.row](spec)
    run()
    return run, {"versions": f"anomalib {anomalib.__version__}, torch {torch.__version__}"}


if __name__ == "__main__":
    serve(build)
