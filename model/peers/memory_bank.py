"""The baseline of every table: nearest neighbours in a memory of training patches (the idea of PatchCore).

Features of strides 8 and 16 are averaged over 3 x 3 neighbourhoods, brought to one size and concatenated; a
random part of all training patches is kept; a patch's anomaly is its distance to the nearest kept one.

Legend: B images, C channels, P patches of an image, M patches in the bank.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import BackboneInfo
from model.base import AnomalyModel
from model.decision import Prediction
from utils.config import Config

ROWS = 1 << 10  # of the bank, compared at once: with 16 images of 1024 patches 64 MB
PROJECTED = 64
OTHERS, ALIKE = 1 << 11, 3  # how many random patches one is compared with, and which of the nearest counts


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
        """Fill the bank from training normals (B, 3, H, W)."""
        patches = (patches_of(self.backbone(batch)) for batch in images)
        self.bank = sample_patches(patches, self.config.bank_fraction, seed=seed)

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) of distances and scores (B,)."""
        distance = nearest(patches_of(self.backbone(images)), self.bank)
        return self.decision([distance], (images.shape[2], images.shape[3]))


def patches_of(features: Sequence[Tensor]) -> Tensor:
    """A backbone's features to (B, h, w, C), the two coarsest levels at the size of the finer one."""
    fine, coarse = (F.avg_pool2d(f.float(), 3, stride=1, padding=1) for f in features[-2:])
    coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1)


def placed(patches: Tensor, weight: float | Tensor = 1) -> Tensor:
    """(B, h, w, C) to (B, h, w, C + 2): with `weight` times each patch's place (y, x), from 0 to 1."""
    axes = [weight * (torch.arange(n, device=patches.device) + 0.5) / n for n in patches.shape[1:3]]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return torch.cat([patches, place.expand(patches.shape[0], -1, -1, -1)], dim=-1)


def sample_patches(
    images: Iterable[Tensor], fraction: float, *, seed: int, most: int | None = None
) -> Tensor:
    """A bank (M, C): `fraction` of the patches (h, w, C) of each image, of all these `most`, equally likely.

    They are drawn image by image, whatever the batches. Raises FloatingPointError if a feature is not finite.
    """
    generator, kept = torch.Generator().manual_seed(seed), []
    keys, lots = torch.zeros(0), torch.Generator().manual_seed(seed)  # the lowest keys stay
    for batch in images:
        for patches in batch.flatten(1, 2):
            count = max(1, round(fraction * len(patches)))
            kept.append(patches[torch.randperm(len(patches), generator=generator)[:count]])
            if most is not None:
                keys = torch.cat([keys, torch.rand(count, generator=lots)])
                if len(keys) > 2 * most:
                    kept, keys = _lowest(kept, keys, most)
    if most is not None and len(keys) > most:
        kept, keys = _lowest(kept, keys, most)
    bank = torch.cat(kept)
    if not bank.isfinite().all():
        found = "features of the training images are not finite"
        raise FloatingPointError(f"{found}; use --precision fp32, or other --weights")
    return bank


def _lowest(parts: list[Tensor], keys: Tensor, most: int) -> tuple[list[Tensor], Tensor]:
    """The patches of the lowest keys, in their order."""
    places = keys.argsort()[:most].sort().values
    return [torch.cat(parts)[places.to(parts[0].device)]], keys[places]


def nearest(patches: Tensor, bank: Tensor) -> Tensor:
    """(B, h, w, C) to (B, h, w): distance to the nearest patch of the bank, which is looked at by parts.

    Its size is fixed, that of the batch is not: a loop over patches could not be exported. Raises
    RuntimeError if the bank is empty.
    """
    if len(bank) == 0:
        raise RuntimeError("the memory bank is empty; call fit on training normals, or load a checkpoint")
    parts = [torch.cdist(patches.flatten(0, 2), part).amin(dim=1) for part in bank.split(ROWS)]
    return torch.stack(parts).amin(dim=0).view(-1, *patches.shape[1:3])


def coreset(patches: Tensor, count: int, *, rare: float, seed: int) -> Tensor:
    """Of patches (N, C) at most `count` that cover all: each next one is the farthest from those before.

    The share `rare` is left out first: the patches whose like is not among random others, as a defect's
    (the idea of SoftPatch). Distances are those of projections to PROJECTED dimensions, as in PatchCore.
    """
    generator = torch.Generator().manual_seed(seed)
    points = patches @ torch.randn(patches.shape[1], PROJECTED, generator=generator).to(patches)
    others = points[torch.randperm(len(points), generator=generator)[:OTHERS]]
    nth = min(ALIKE, len(others))
    far = torch.cat([torch.cdist(part, others).kthvalue(nth).values for part in points.split(ROWS)])
    kept = far.argsort(stable=True)[: len(far) - int(rare * len(far))].sort().values
    patches, points = patches[kept], points[kept]
    squares, chosen = points.square().sum(dim=1), [0]
    far = torch.full_like(squares, math.inf)  # squared, to the nearest chosen one
    for _ in range(min(count, len(points)) - 1):
        last = chosen[-1]
        far = torch.minimum(far, squares - 2 * (points @ points[last]) + squares[last])
        chosen.append(int(far.argmax()))
    return patches[chosen]
