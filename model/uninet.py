"""UniNet: two teachers, bottleneck, student, feature selection, weighted decision (Fig. 2). Wiring only.

Legend: B images, n levels, fine to coarse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import Diagonal, diagonal_statistics
from losses.supervised import supervised_loss
from losses.uninet import Pair, uninet_loss
from model.backbone import BackboneInfo, backbone_channels
from model.base import AnomalyModel, Batch
from model.bottleneck import Bottleneck
from model.decision import Decision, Prediction, distance_map
from model.dfs import DomainRelatedFeatureSelection
from model.heads import DiscrepancyHead, FrameHead, LabelHead, MaskHead
from model.layers import fold_batch_norms, halves
from model.student import Student
from model.teachers import Features, FeatureScale, Teachers
from utils.config import LossConfig, ModelConfig, OptimConfig

STATISTICS = ("min", "mean", "max")
TRUTHS = {"label": "label", "mask": "mask", "discrepancy": "mask"}  # what each head learns, of the batch
Pairs = list[tuple[int, Tensor, Tensor]]


class UniNet(AnomalyModel):
    """The model of the paper, with a head where a task needs one.

    Both teachers' features pass the bottleneck and the student as one batch of 2B, target first. What was
    decoded from the target's features is compared with the SOURCE teacher, and the other way round (cross
    pairing). With `teachers: source` there is one teacher, whose features are decoded and compared, and n
    pairs in place of 2n.
    """

    cuda_graphs = True

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
        self.teachers = Teachers(
            backbone,
            scale,
            train_bn=config.teacher_bn == "train",
            with_target=config.teachers == "both",
        )
        self.bottleneck = Bottleneck(
            info.channels,
            width=config.width,
            mem=config.mem,
            kernels=config.mem_kernels,
            reparam=config.mem_reparam,
        )
        signed = info.signed or config.feature_scale == "standardise"
        self.student = Student(
            info.channels,
            self.bottleneck.out_channels,
            width=config.width,
            own=student_channels(config),
            signed=signed,
            skips=config.skips,
            outputs=config.student_outputs,
            activation=config.student_activation,
        )
        self.dfs = DomainRelatedFeatureSelection(
            info.channels,
            mode=config.dfs,
            theta=config.dfs_theta,
            theta_map=config.dfs_theta_map,
            stop_grad=config.dfs_stop_grad,
        )
        self.heads = build_heads(info, config)
        self.deployed = False
        self.diagonals: list[Diagonal] = []  # of the last batch's pairs

    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Measure what the model takes from the training normals before the first step: the feature scale."""
        self.teachers.fit_scale(images)

    def features(self, images: Tensor) -> Pairs:
        """The 2n pairs (level, teacher, student) of (B, C_i, H_i, W_i): source teacher's, then target's."""
        source, *target = self.teachers(images)
        if not target:
            restored = self.student(self.bottleneck(source), source)
            return [(i, *pair) for i, pair in enumerate(zip(source, restored, strict=True))]
        (target,) = target
        both = [torch.cat(pair) for pair in zip(target, source, strict=True)]
        from_target, from_source = _halves(self.student(self.bottleneck(both), both))
        pairs = [(i, *pair) for i, pair in enumerate(zip(source, from_target, strict=True))]
        return pairs + [(i, *pair) for i, pair in enumerate(zip(target, from_source, strict=True))]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Eq. 12 on a batch, or Eq. 13 with a head.

        The batch holds image (B, 3, H, W), or frames (B, F, 3, H, W) with a frame head; where known label
        (B,) and mask (B, 1, H, W). `progress` in [0, 1]: the share of the training that is done.
        """
        if self.deployed:
            raise RuntimeError(
                "this model was folded by deploy() for inference; load the checkpoint to train on"
            )
        images, target = _first_and_last(batch["frames"] if "frames" in batch else batch["image"])
        pairs = self.features(images)
        outputs = self.head_outputs(pairs)
        n = len(self.info.channels)
        wanted = {"both": pairs, "source": pairs[:n], "target": pairs[n:]}
        told = {self.loss_config.anomalous: batch.get(self.loss_config.anomalous)}
        with torch.autocast(images.device.type, enabled=False):
            selected = [self.selected(*pair) for pair in wanted[self.loss_config.pairs]]
            self.diagonals = []
            parts = uninet_loss(
                selected,
                self.loss_config,
                label=told.get("label"),
                mask=told.get("mask"),
                progress=progress,
                seen=self.diagonals,
            )
            if outputs:
                truth = target if self.config.head == "frame" else batch[TRUTHS[self.config.head]]
                parts["head"] = supervised_loss([x.float() for x in outputs], truth, self.loss_config)
                parts["total"] = parts["total"] + self.loss_config.head_weight * parts["head"]
        return parts

    def selected(self, level: int, teacher: Tensor, student: Tensor) -> Pair:
        """A pair of the losses, its student feature selected by DFS (Eq. 6)."""
        return Pair(teacher, student, partial(self.dfs, level=level), (self.dfs.theta[level],))

    def diagnostics(self) -> dict[str, float]:
        """For curves, by level: theta (Eq. 6), and the mean diagonal d (Eq. 9) of the last batch.

        d of normal and of anomalous positions, and the highest value that it can take: the margin (Eq. 11)
        pulls it towards tau, or below tau / 2. A sync point.
        """
        found: dict[str, float] = {}
        for level, stride in enumerate(self.info.strides):
            theta = self.dfs.effective_theta(level).detach()
            if self.config.dfs != "none":
                found |= {
                    f"theta/stride{stride}/{name}": float(getattr(theta, name)()) for name in STATISTICS
                }
            if self.diagonals:  # of the source teacher, where there are both
                d, normal = self.diagonals[level]
                told = diagonal_statistics(d, normal, self.loss_config.temperature)
                found |= {f"diagonal/stride{stride}/{name}": value for name, value in told.items()}
        return found

    def head_outputs(self, pairs: Pairs) -> list[Tensor]:
        """Outputs of the heads on raw student features, finest level first, for each teacher's pairs.

        Label (B,), mask (B, 1, h, w) or frame (B, 3, H, W); empty without a head. A discrepancy head sees all
        levels of teacher and student at once, and gives the student no gradient.
        """
        n = len(self.info.channels)
        if self.config.head == "discrepancy":
            found = []
            for i in range(0, len(pairs), n):
                _, teachers, students = zip(*pairs[i : i + n], strict=True)
                found.append(self.heads[0](teachers, [s.detach() for s in students]))
            return found
        return [head(pairs[i + j][2]) for j, head in enumerate(self.heads) for i in range(0, len(pairs), n)]

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and scores (B,); each result depends on its image alone.

        With a frame head frames (B, F, 3, H, W); the error of the predicted last one joins the score. With a
        mask head the map is the probability of an anomaly, the score its maximum. With a discrepancy head
        that probability multiplies the distances (see `Decision`).
        """
        images, target = _first_and_last(images)
        pairs, size = self.features(images), tuple(images.shape[2:])
        outputs = [x.float() for x in self.head_outputs(pairs)]
        if self.config.head == "mask":
            probability = _probability(outputs[: len(pairs) // len(self.info.channels)], size)
            return Prediction(probability, probability.amax(dim=(1, 2)))
        maps = []
        for level, teacher, student in pairs:
            restored = (
                self.dfs(student.float(), teacher.float(), level) if self.config.dfs_at_test else student
            )
            maps.append(distance_map(teacher, restored))
        about = {"highest": 2}  # of a cosine distance
        if self.config.head == "discrepancy":
            return self.decision(maps, size, **about, head_map=_probability(outputs, size))
        return self.decision(maps, size, **about, head_score=self._head_score(outputs, target))

    def _head_score(self, outputs: list[Tensor], target: Tensor) -> Tensor | None:
        """Probability of an anomaly (label head) or squared error of both frames (frame head), (B,)."""
        if not outputs:
            return None
        if self.config.head == "label":
            return torch.stack(outputs).mean(dim=0).sigmoid()
        return sum((x - target).square().mean(dim=(1, 2, 3)) for x in outputs)

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        """Student, bottleneck, DFS and heads at `lr`; the target teacher at `lr_teacher` (Sec. 5.1)."""
        parts = (self.student, self.bottleneck, self.dfs, self.heads)
        learnt = [p for part in parts for p in part.parameters()]
        groups = [{"name": "student", "params": [p for p in learnt if p.requires_grad], "lr": optim.lr}]
        if self.teachers.target is not None:
            target = list(self.teachers.target.parameters())
            groups.append({"name": "teacher", "params": target, "lr": optim.lr_teacher})
        return groups

    def deploy(self) -> UniNet:
        """A copy for inference: parallel kernels merged, batch norms folded (Eq. 3).

        Same output, which is checked part by part on a noise image; eval only.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        model.bottleneck.deploy()
        for part, inputs in model._inputs_of_parts().items():
            fold_batch_norms(part, *inputs)
        model.deployed, model.diagonals = True, []
        return model

    @torch.no_grad()
    def _inputs_of_parts(self) -> dict[nn.Module, tuple]:
        """What each part takes as a noise image is predicted."""
        weight = next(self.bottleneck.parameters())
        noise = torch.randn(1, 3, *self.info.image_size, generator=torch.Generator().manual_seed(0))
        noise = noise.to(weight, memory_format=torch.channels_last)
        inputs: dict[nn.Module, tuple] = {}
        parts = (self.teachers.source, self.teachers.target, self.bottleneck, self.student, *self.heads)

        def keep(part: nn.Module, args: tuple) -> None:
            inputs.setdefault(part, copy.deepcopy(args))

        hooks = [part.register_forward_pre_hook(keep) for part in parts if part is not None]
        self.predict(torch.stack([noise, noise], dim=1) if self.config.head == "frame" else noise)
        for hook in hooks:
            hook.remove()
        return inputs


def _halves(features: Features) -> tuple[Features, Features]:
    pairs = [halves(f) for f in features]
    return [first for first, _ in pairs], [second for _, second in pairs]


def _probability(logits: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Summed logits (B, 1, h, w) as a probability at `size`, (B, H, W)."""
    logit = F.interpolate(sum(logits), size=size, mode="bilinear", align_corners=False)
    return logit[:, 0].sigmoid()


def student_channels(config: ModelConfig) -> tuple[int, ...] | None:
    """Channels of the backbone that the decoder follows, fine to coarse; None for the teachers' own."""
    if config.student_backbone is None:
        return None
    return backbone_channels(config.student_backbone, config.strides)


def build_heads(info: BackboneInfo, config: ModelConfig) -> nn.ModuleList:
    """One head a level from the finest on (or one for all), shared by both halves; empty for `head: none`."""
    if config.head == "frame":
        return nn.ModuleList([FrameHead(info.channels[0], info.strides[0])])
    if config.head == "discrepancy":
        return nn.ModuleList([DiscrepancyHead(info.channels)])
    kinds = {"label": partial(LabelHead, share=config.head_share), "mask": MaskHead}
    levels = 1 if config.head_levels == "finest" else max(1, len(info.channels) - 1)
    return nn.ModuleList(kinds[config.head](c) for c in info.channels[:levels] if config.head in kinds)


def _first_and_last(images: Tensor) -> tuple[Tensor, Tensor]:
    """What the teachers see and what is judged: of frames (B, F, 3, H, W) the first and the last."""
    if images.dim() == 4:
        return images, images
    return images[:, 0].contiguous(memory_format=torch.channels_last), images[:, -1]
