"""UniNet: two teachers, bottleneck, student, feature selection, weighted decision (Fig. 2). Wiring only.

Legend: B images, n levels, fine to coarse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from losses.total import Pair, uninet_loss
from model.backbone import BackboneInfo
from model.bottleneck import Bottleneck
from model.decision import Decision, Prediction, distance_map
from model.dfs import DomainRelatedFeatureSelection
from model.layers import fold_batch_norms
from model.student import Student
from model.teachers import Features, FeatureScale, Teachers
from utils.config import LossConfig, ModelConfig, OptimConfig

Batch = dict[str, Tensor]


class UniNet(nn.Module):
    """The unsupervised model of the paper.

    Both teachers' features pass the bottleneck and the student as one batch of 2B, target first. What was
    decoded from the target's features is compared with the SOURCE teacher, and the other way round (cross
    pairing).
    """

    def __init__(
        self,
        backbone: nn.Module,
        info: BackboneInfo,
        config: ModelConfig,
        *,
        loss: LossConfig,
        decision: Decision,
    ) -> None:
        super().__init__()
        self.info, self.config, self.loss_config, self.decision = info, config, loss, decision
        scale = FeatureScale(info.channels, mode=config.feature_scale, gain=config.feature_gain)
        self.teachers = Teachers(backbone, scale)
        self.bottleneck = Bottleneck(
            info.channels,
            width=config.width,
            mem=config.mem,
            kernels=config.mem_kernels,
            reparam=config.mem_reparam,
        )
        signed = info.signed or config.feature_scale == "standardise"
        self.student = Student(info.channels, self.bottleneck.out_channels, width=config.width, signed=signed)
        self.dfs = DomainRelatedFeatureSelection(
            info.channels,
            mode=config.dfs,
            theta=config.dfs_theta,
            theta_map=config.dfs_theta_map,
            stop_grad=config.dfs_stop_grad,
        )
        self.deployed = False

    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Measure what the model takes from the training normals before the first step: the feature scale."""
        self.teachers.fit_scale(images)

    def features(self, images: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """The 2n pairs (level, teacher, student) of (B, C_i, H_i, W_i): source teacher's, then target's."""
        source, target = self.teachers(images)
        restored = self.student(
            self.bottleneck([torch.cat(both) for both in zip(target, source, strict=True)])
        )
        from_target, from_source = _halves(restored)
        pairs = [(i, *pair) for i, pair in enumerate(zip(source, from_target, strict=True))]
        return pairs + [(i, *pair) for i, pair in enumerate(zip(target, from_source, strict=True))]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Eq. 12 on a batch; image (B, 3, H, W), and where known label (B,) and mask (B, 1, H, W).

        `progress` in [0, 1] is there for models with schedules; UniNet has none.
        """
        if self.deployed:
            raise RuntimeError(
                "this model was folded by deploy() for inference; load the checkpoint to train on"
            )
        pairs = self.features(batch["image"])
        wanted = {"both": pairs, "source": pairs[: len(pairs) // 2], "target": pairs[len(pairs) // 2 :]}
        with torch.autocast(batch["image"].device.type, enabled=False):
            selected = [
                Pair(teacher.float(), self.dfs(student.float(), teacher.float(), level))
                for level, teacher, student in wanted[self.loss_config.pairs]
            ]
            return uninet_loss(selected, self.loss_config, label=batch.get("label"), mask=batch.get("mask"))

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and scores (B,); each result depends on its image alone."""
        maps = []
        for level, teacher, student in self.features(images):
            restored = (
                self.dfs(student.float(), teacher.float(), level) if self.config.dfs_at_test else student
            )
            maps.append(distance_map(teacher, restored))
        return self.decision(maps, tuple(images.shape[2:]))

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        """Student, bottleneck and DFS at `lr`; the target teacher at `lr_teacher` (Sec. 5.1)."""
        learnt = [*self.student.parameters(), *self.bottleneck.parameters(), *self.dfs.parameters()]
        return [
            {"name": "student", "params": [p for p in learnt if p.requires_grad], "lr": optim.lr},
            {"name": "teacher", "params": list(self.teachers.target.parameters()), "lr": optim.lr_teacher},
        ]

    def deploy(self) -> UniNet:
        """A copy for inference: parallel kernels merged, every batch norm folded (Eq. 3).

        Same output, eval only.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        model.bottleneck.deploy()
        fold_batch_norms(model)
        model.deployed = True
        return model


def _halves(features: Features) -> tuple[Features, Features]:
    first, second = zip(*(f.chunk(2) for f in features), strict=True)
    return list(first), list(second)
