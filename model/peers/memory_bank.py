"""The baseline of every table: nearest neighbours in a memory of training patches (the idea of PatchCore).

Features of strides 8 and 16 are averaged over 3 x 3 neighbourhoods, brought to one size and concatenated; a
random part of all training patches is kept; a patch's anomaly is its distance to the nearest kept one.

Legend: B images, C channels, P patches of an image, M patches in the bank.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import BackboneInfo
from model.base import AnomalyModel
from model.decision import Prediction
from utils.config import Config

ROWS = 1 << 10  # of the bank, compared at once: with 16 images of 1024 patches 64 MB


class MemoryBank(AnomalyModel):
    """Frozen backbone and a bank (M, C) of training patches, drawn at random with a fixed seed."""

    one_pass = True

    def __init__(self, backbone: nn.Module, info: BackboneInfo, config: Config) -> None:
        super().__init__()
        self.configure(info, config)
        self.backbone = backbone.eval().requires_grad_(False)
        self.register_buffer("bank", torch.zeros(0, sum(info.channels[-2:])))

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor], *, seed: int) -> None:
        """Fill the bank from training normals (B, 3, H, W): `bank_fraction` of each image's patches.

        They are drawn image by image, so the size of the batches changes nothing. Raises FloatingPointError
        if a feature is not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        kept = []
        for batch in images:
            for patches in self._patches(batch):
                count = max(1, round(self.config.bank_fraction * len(patches)))
                kept.append(patches[torch.randperm(len(patches), generator=generator)[:count]])
        self.bank = torch.cat(kept)
        if not self.bank.isfinite().all():
            found = "features of the training images are not finite"
            raise FloatingPointError(f"{found}; use --precision fp32, or other --weights")

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) of distances and scores (B,)."""
        if len(self.bank) == 0:
            raise RuntimeError("the memory bank is empty; call fit on training normals, or load a checkpoint")
        patches = self._patches(images)
        nearest = self._nearest(patches.flatten(0, 1))
        grid = [-(-size // self.info.strides[-2]) for size in images.shape[2:]]
        return self.decision([nearest.view(-1, *grid)], (images.shape[2], images.shape[3]))

    def _patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, P, C), P positions of the second-coarsest level."""
        fine, coarse = self.backbone(images)[-2:]
        fine, coarse = (F.avg_pool2d(f.float(), 3, stride=1, padding=1) for f in (fine, coarse))
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([fine, coarse], dim=1).flatten(2).transpose(1, 2)

    def _nearest(self, patches: Tensor) -> Tensor:
        """(N, C) to (N,): distance to the nearest patch of the bank, which is looked at by parts.

        Its size is fixed, that of the batch is not: a loop over patches could not be exported.
        """
        parts = [torch.cdist(patches, part).amin(dim=1) for part in self.bank.split(ROWS)]
        return torch.stack(parts).amin(dim=0)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> object:
        """As usual; the bank takes the stored size."""
        self.bank = torch.empty_like(state_dict["bank"], device=self.bank.device)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
