"""UniNet: two teachers, bottleneck, student, feature selection, weighted decision (Fig. 2). Wiring only.

Legend: B images, n levels, fine to coarse.
"""

from collections.abc import Iterable
from functools import partial, reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from losses.similarity import Diagonal, diagonal_statistics
from losses.supervised import supervised_loss, upsample
from losses.uninet import Pair, uninet_loss
from model.backbone import BackboneInfo
from model.base import AnomalyModel, Batch
from model.decision import Prediction, distance_map
from model.dfs import DomainRelatedFeatureSelection
from model.heads import FrameHead, LabelHead, MaskHead
from model.layers import chunk
from model.student import build_bottleneck_and_student
from model.teachers import FeatureStandardizer, Teachers
from utils.config import Config, ModelConfig, OptimConfig

Pairs = list[tuple[int, Tensor, Tensor]]


class UniNet(AnomalyModel):
    """The model of the paper, with a head where a task needs one.

    Both teachers' features pass the bottleneck and the student as one batch of 2B, target first. What was
    decoded from the target's features is compared with the SOURCE teacher, and the reverse (cross pairing).
    """

    cuda_graphs = True
    student_outputs: ClassVar[int] = 1  # of each level; 2: one for each teacher's half, as ReContrast has it

    def __init__(self, backbone: nn.Module, info: BackboneInfo, config: Config) -> None:
        super().__init__()
        self.configure(info, config)
        model = config.model
        scale = FeatureStandardizer(info.channels, gain=model.feature_gain)
        self.teachers = Teachers(backbone, scale, train_bn=model.teacher_bn == "train")
        outputs = self.student_outputs
        self.bottleneck, self.student = build_bottleneck_and_student(info, model, outputs=outputs)
        learnable = model.dfs_theta == "learnable"
        self.dfs = DomainRelatedFeatureSelection(info.channels, mode=model.dfs, learnable=learnable)
        self.heads = build_heads(info, model)
        self.diagonals: list[Diagonal] = []  # of the last batch's pairs

    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Measure the features' scale with the source teacher on batches of training normals."""
        with torch.no_grad():
            self.teachers.scale.fit(self.teachers.source(batch) for batch in images)

    def features(self, images: Tensor) -> Pairs:
        """The 2n pairs (level, teacher, student) of (B, C_i, H_i, W_i): source teacher's, then target's."""
        source, target = self.teachers(images)
        both = [torch.cat(pair) for pair in zip(target, source, strict=True)]
        restored = [chunk(f) for f in self.student(self.bottleneck(both), both)]
        pairs = [(i, t, s) for i, (t, (s, _)) in enumerate(zip(source, restored, strict=True))]
        return pairs + [(i, t, s) for i, (t, (_, s)) in enumerate(zip(target, restored, strict=True))]

    def loss(self, batch: Batch, progress: float | Tensor) -> dict[str, Tensor]:
        """L_U (Eq. 12) of a batch, plus L_S with a head (Eq. 13).

        batch: image (B, 3, H, W), or frames (B, F, 3, H, W) with a frame head; where known label (B,) and
        mask (B, 1, H, W).
        """
        images, target = _first_and_last(batch["frames"] if "frames" in batch else batch["image"])
        pairs = self.features(images)
        outputs = self.head_outputs(pairs)
        source = self.loss_config.anomaly_source
        with torch.autocast(images.device.type, enabled=False):
            self.diagonals = []
            parts = uninet_loss(
                [self.selected(*pair) for pair in pairs],
                self.loss_config,
                label=batch.get("label") if source == "label" else None,
                mask=batch.get("mask") if source == "mask" else None,
                diagonals=self.diagonals,
            )
            if outputs:
                truth = target if self.config.head == "frame" else batch[self.config.head]
                outputs = [x.float() for x in outputs]
                parts["head"] = supervised_loss(outputs, truth, self.loss_config.supervised)
                parts["total"] = parts["total"] + parts["head"]
        return parts

    def selected(self, level: int, teacher: Tensor, student: Tensor) -> Pair:
        """A pair of the losses, its student feature selected by DFS (Eq. 6)."""
        return Pair(teacher, student, partial(self.dfs, level=level), (self.dfs.theta[level],))

    def diagnostics(self) -> dict[str, float]:
        """For curves, per level: theta (Eq. 6), and the mean diagonal d (Eq. 9), normal and anomalous.

        "highest" is what d can reach: the margin (Eq. 11) pulls it to tau, or below tau / 2. A sync point.
        """
        values: dict[str, float] = {}
        for level, stride in enumerate(self.info.strides):
            at = f"stride{stride}" + f"-{level + 1}" * (self.info.strides.count(stride) > 1)
            if self.config.dfs != "none":
                theta = self.dfs.theta[level].detach()
                for name in ("min", "mean", "max"):
                    values[f"theta/{at}/{name}"] = float(getattr(theta, name)())
            if self.diagonals:  # of the source teacher
                d, normal = self.diagonals[level]
                statistics = diagonal_statistics(d, normal, self.loss_config.temperature)
                values |= {f"diagonal/{at}/{name}": value for name, value in statistics.items()}
        return values

    def head_outputs(self, pairs: Pairs) -> list[Tensor]:
        """Outputs of the heads on raw student features, finest level first, for each teacher's pairs.

        Label (B,), mask (B, 1, h, w) or frame (B, 3, H, W); empty without a head.
        """
        n = len(self.info.channels)
        return [head(pairs[i + j][2]) for j, head in enumerate(self.heads) for i in (0, n)]

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and scores (B,); each result depends on its image alone.

        With a frame head frames (B, F, 3, H, W); the error of the predicted last one joins the score. With a
        mask head the map is the probability of an anomaly, the score its maximum.
        """
        images, target = _first_and_last(images)
        pairs, size = self.features(images), images.shape[2:]
        outputs = [x.float() for x in self.head_outputs(pairs)]
        if self.config.head == "mask":
            finest = reduce(torch.add, outputs[:2])  # of both teachers' pairs
            probability = upsample(finest, size)[:, 0].sigmoid()
            return Prediction(probability, probability.amax(dim=(1, 2)))
        maps = [distance_map(teacher, student) for _, teacher, student in pairs]  # without DFS, as released
        return self.decision(maps, size, highest=2, head_score=self._head_score(outputs, target))

    def _head_score(self, outputs: list[Tensor], target: Tensor) -> Tensor | None:
        """Probability of an anomaly (label head) or squared error of both frames (frame head), (B,)."""
        if not outputs:
            return None
        if self.config.head == "label":
            return torch.stack(outputs).mean(dim=0).sigmoid()
        return reduce(torch.add, [(x - target).square().mean(dim=(1, 2, 3)) for x in outputs])

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        """Student, bottleneck, DFS and heads at `lr`; the target teacher at `lr_teacher` (Sec. 5.1)."""
        parts = (self.student, self.bottleneck, self.dfs, self.heads)
        learning = [p for part in parts for p in part.parameters() if p.requires_grad]
        target = list(self.teachers.target.parameters())
        return [
            {"name": "student", "params": learning, "lr": optim.lr},
            {"name": "teacher", "params": target, "lr": optim.lr_teacher},
        ]

    def parts_to_fold(self) -> list[nn.Module]:
        """All that has batch norms."""
        return [self.teachers.source, self.teachers.target, self.bottleneck, self.student, *self.heads]

    def example(self) -> Tensor:
        """One input of `predict`, two frames with a frame head."""
        noise = super().example()
        return torch.stack([noise, noise], dim=1) if self.config.head == "frame" else noise


def build_heads(info: BackboneInfo, config: ModelConfig) -> nn.ModuleList:
    """One head per level from the finest on (one in all for a frame), shared by both teachers' halves."""
    if config.head == "frame":
        return nn.ModuleList([FrameHead(info.channels[0], info.strides[0])])
    if config.head == "none":
        return nn.ModuleList()
    kind = LabelHead if config.head == "label" else MaskHead
    levels = 1 if config.head_levels == "finest" else max(1, len(info.channels) - 1)
    return nn.ModuleList(kind(c) for c in info.channels[:levels])


def _first_and_last(images: Tensor) -> tuple[Tensor, Tensor]:
    """What the teachers see and what is judged: of frames (B, F, 3, H, W) the first and the last."""
    if images.dim() == 4:
        return images, images
    return images[:, 0].contiguous(memory_format=torch.channels_last), images[:, -1]
