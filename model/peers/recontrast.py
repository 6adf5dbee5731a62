"""ReContrast (Guo et al., NeurIPS 2023): UniNet's ancestor, with its own loss and a pair of output heads.

Teachers, cross pairing, decoder, maps and scores are UniNet's; `configs/models/recontrast.yaml` sets the
parts: reverse distillation's bottleneck, two heads a level, no feature selection (DFS as an option, Fig. 5 of
the UniNet paper), a blurred map and its maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.mining import mined_distance, mining_alpha
from model.uninet import Batch, UniNet


class ReContrast(UniNet):
    """UniNet's network under contrastive reconstruction with hard-point mining."""

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Half the sum over levels for each teacher, both added; image (B, 3, H, W), progress in [0, 1]."""
        if self.deployed:
            raise RuntimeError("this model was folded by deploy(); load the checkpoint to train on")
        pairs, alpha = self.features(batch["image"]), mining_alpha(progress)
        with torch.autocast(batch["image"].device.type, enabled=False):
            distances = [
                mined_distance(teacher.float(), self.dfs(student.float(), teacher.float(), level), alpha)
                for level, teacher, student in pairs
            ]
        half = len(pairs) // 2
        source, target = (torch.stack(part).sum() / 2 for part in (distances[:half], distances[half:]))
        return {"source": source, "target": target, "total": source + target}
