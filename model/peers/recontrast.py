"""ReContrast (Guo et al., NeurIPS 2023): UniNet's ancestor, with its own loss and a pair of output heads.

Teachers, cross pairing, decoder, maps and scores are UniNet's; `configs/models/recontrast.yaml` sets the
parts: reverse distillation's bottleneck, two heads per level, no feature selection (DFS as an option, Fig. 5
of the UniNet paper), a blurred map and its maximum.

Legend: B images, C channels, H x W positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.kd import cosine_distance
from model.base import Batch
from model.uninet import UniNet
from utils.distributed import global_moments

ALPHA_START, ALPHA_END = -3.0, 1.0  # standard deviations above the mean distance


class ReContrast(UniNet):
    """UniNet's network under contrastive reconstruction with hard-point mining."""

    student_outputs = 2

    def loss(self, batch: Batch, progress: float | Tensor) -> dict[str, Tensor]:
        """Half the sum over levels for each teacher, both added; image (B, 3, H, W), progress in [0, 1]."""
        pairs, alpha = self.features(batch["image"]), mining_alpha(progress)
        with torch.autocast(batch["image"].device.type, enabled=False):
            distances = [
                mined_distance(teacher.float(), self.dfs(student.float(), teacher.float(), level), alpha)
                for level, teacher, student in pairs
            ]
        half = len(pairs) // 2
        source, target = (torch.stack(part).sum() / 2 for part in (distances[:half], distances[half:]))
        return {"source": source, "target": target, "total": source + target}


def mining_alpha(progress: float | Tensor, *, warm: float = 0.1) -> Tensor:
    """Where the threshold of hard positions lies, by the share of training that is done.

    It rises from -3 (nearly all count) to 1 standard deviation above the mean over the first `warm`.
    """
    alpha = ALPHA_START + (ALPHA_END - ALPHA_START) * progress / warm
    return torch.as_tensor(alpha, dtype=torch.float64).clamp(max=ALPHA_END)


@torch.no_grad()
def easy_positions(teacher: Tensor, student: Tensor, alpha: float | Tensor) -> Tensor:
    """Where the cosine distance is below mean + alpha x deviation over batch and positions, (B, 1, H, W)."""
    distance = 1 - F.cosine_similarity(teacher, student, dim=1)
    mean, deviation = global_moments(distance)
    return (distance < mean + torch.as_tensor(alpha).to(deviation) * deviation)[:, None]


def mined_distance(teacher: Tensor, student: Tensor, alpha: float | Tensor) -> Tensor:
    """Mean distance of flattened features (B, C, H, W); easy positions of the student get no gradient.

    The value is that of `cosine_distance` with reading "global". The teacher gets no gradient at all.
    """
    hard_only = torch.where(easy_positions(teacher, student, alpha), student.detach(), student)
    return cosine_distance(teacher.detach(), hard_only, reading="global")
