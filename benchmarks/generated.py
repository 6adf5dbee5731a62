"""Inputs that both sides measure on, the same for the same spec."""

from __future__ import annotations

import numpy as np
import torch
from protocol import Spec
from torch import Tensor


def images(spec: Spec) -> Tensor:
    """(B, 3, size, size) noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(spec.batch, 3, spec.size, spec.size, generator=generator).to(spec.device)


def unit_features(spec: Spec) -> tuple[Tensor, Tensor]:
    """Student and teacher feature (B, C, size, size), rectified noise."""
    generator = torch.Generator().manual_seed(0)
    shape = (spec.batch, spec.channels, spec.size, spec.size)
    first, second = (torch.rand(shape, generator=generator).to(spec.device) for _ in range(2))
    return first, second


def maps_and_masks(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Maps (N, size, size) float32 and masks of {0, 1}: half the images normal, 200 regions on the others.

    At 160 images; the number of regions grows with theirs. Maps are smooth noise, higher on the regions.
    """
    rng = np.random.default_rng(0)
    maps = np.empty((spec.count, spec.size, spec.size), np.float32)
    masks = np.zeros(maps.shape, np.uint8)
    cells = spec.size // 8
    for i in range(spec.count):
        coarse = rng.random((cells, cells), dtype=np.float32)
        maps[i] = coarse.repeat(8, 0).repeat(8, 1) + 0.2 * rng.random(maps[i].shape, dtype=np.float32)
        if i % 2:
            for place in range(3 if i % 4 == 1 else 2):
                _region(maps[i], masks[i], place, rng)
    return maps, masks


def _region(anomaly_map: np.ndarray, mask: np.ndarray, place: int, rng: np.random.Generator) -> None:
    """A rectangle in the `place`-th third of the rows, so that regions never touch."""
    third = mask.shape[0] // 3
    height, width = rng.integers(3, third - 4, 2)
    top = place * third + 1 + rng.integers(0, third - 2 - height)
    left = rng.integers(0, mask.shape[1] - width)
    mask[top : top + height, left : left + width] = 1
    anomaly_map[top : top + height, left : left + width] += 0.4
