"""ReMIND, our recipe: REverse distillation, Multi-scale embedding, hard-position mINing, Discrimination head.

One frozen teacher, UniNet's bottleneck and student (Sec. 4.2), and synthetic defects (docs/RECIPE.md): the
student restores normal features, of which only the hardest positions teach; a head learns from the defects'
masks where teacher and student differ as they do on defects.

Legend: B images; a feature list holds one (B, C_i, H_i, W_i) per level, fine to coarse.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from losses.kd import hardest_distance
from losses.similarity import unmasked_positions
from losses.supervised import focal_loss, upsample
from model.backbone import BackboneInfo, input_normalisation
from model.base import AnomalyModel, Batch
from model.decision import Prediction, distance_map
from model.heads import DiscriminationHead
from model.motion import SpeedHead
from model.student import build_bottleneck_and_student
from model.teachers import Features, FeatureStandardizer
from utils.config import Config

MINED_FROM = 0.3  # share of the training after which only `hard_ratio` of the positions teaches
HEAD_FLOOR = 0.05  # added to the head's probability, so that a defect which it does not know still shows


class ReMIND(AnomalyModel):
    """Reverse distillation, with a head where training shows defects with their masks."""

    cuda_graphs = True

    def __init__(self, backbone: nn.Module, info: BackboneInfo, config: Config) -> None:
        super().__init__()
        self.configure(info, config)
        self.teacher = backbone.eval().requires_grad_(False)
        self.scale = FeatureStandardizer(info.channels, gain=config.model.feature_gain)
        self.bottleneck, self.student = build_bottleneck_and_student(info, config.model)
        with_defects = config.data.synthetic > 0 or config.model.setting == "supervised"
        self.head = DiscriminationHead(info.channels) if with_defects else None
        video = config.model.head == "speed"
        self.speed = SpeedHead(*input_normalisation(config.model.backbone)) if video else None

    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Measure the features' scale on batches of training normals."""
        with torch.no_grad():
            self.scale.fit(self.teacher(batch) for batch in images)

    @torch.no_grad()
    def fit_score(self, images: Iterable[Tensor]) -> None:
        """Scale the speed like the score of the maps, on batches of training normals."""
        if self.speed is None:
            return
        self.speed.gain.zero_()  # the score is the maps' alone
        pairs = [(self.predict(batch).score, self.speed.speed(batch)) for batch in images]
        self.speed.fit(*(torch.cat(scores) for scores in zip(*pairs, strict=True)))

    def features(self, images: Tensor) -> tuple[Features, Features]:
        """Images (B, 3, H, W) to the teacher's features and what the student restores of them."""
        with torch.no_grad():
            teacher = self.scale(self.teacher(images))
        return teacher, self.student(self.bottleneck(teacher), teacher)

    def loss(self, batch: Batch, progress: float | Tensor) -> dict[str, Tensor]:
        """L_KD of the hardest normal positions, summed over levels, and the head's focal and Dice loss.

        batch: image (B, 3, H, W) and mask (B, 1, H, W) of its defects. The share of positions that counts
        falls in a line from 1 to `hard_ratio`.
        """
        (teacher, student), mask = self.features(batch["image"]), batch["mask"]
        mined = torch.as_tensor(progress / MINED_FROM, dtype=torch.float64).clamp(max=1)
        share = 1 - (1 - self.loss_config.hard_ratio) * mined
        with torch.autocast(batch["image"].device.type, enabled=False):
            distances = [
                hardest_distance(t.float(), s.float(), unmasked_positions(t.shape[2:], mask), share)
                for t, s in zip(teacher, student, strict=True)
            ]
            parts = {"kd": torch.stack(distances).sum()}
            if self.head is not None:
                # detached: the student would learn to show the synthetic kinds of defects, and only those
                logits = self.head(teacher, [s.detach() for s in student])
                parts["head"] = focal_loss(upsample(logits, mask.shape[2:]), mask)
            return parts | {"total": torch.stack(list(parts.values())).sum()}

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and scores (B,).

        The head's probability of a defect multiplies the sum of the cosine distances. Speed adds to the score
        alone.
        """
        teacher, student = self.features(images)
        size, factor = images.shape[2:], None
        if self.head is not None:
            factor = upsample(self.head(teacher, student), size)[:, 0].sigmoid() + HEAD_FLOOR
        maps = [distance_map(t, s) for t, s in zip(teacher, student, strict=True)]
        head_score = None if self.speed is None else self.speed(images)
        return self.decision(maps, size, highest=2, factor=factor, head_score=head_score)

    def parts_to_fold(self) -> list[nn.Module]:
        """All that has batch norms."""
        return [self.teacher, self.bottleneck, self.student, *([self.head] if self.head else [])]
