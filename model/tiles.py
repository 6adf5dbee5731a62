"""Large images in overlapping tiles: any model sees tiles alone; maps are blended, the highest score counts.

Legend: B images, H x W their size, T side of a tile, N tiles of an image.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from model.base import AnomalyModel
from model.decision import Prediction

OVERLAP = 0.25  # of neighbouring tiles, share of their side


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """First pixels of the fewest tiles that cover `length`, evenly spread, overlapping by that share or more.

    The first begins at 0, the last ends with the image. length >= tile; overlap in [0, 1).
    """
    steps = math.ceil((length - tile) / (tile * (1 - overlap)) - 1e-9)
    return [round(i * (length - tile) / steps) for i in range(steps + 1)] if steps else [0]


def tile_window(tile: int) -> Tensor:
    """(T, T) weights of a tile's pixels: sine squared along both sides, nearly 0 at the border.

    So no seam shows where tiles overlap, and the border, which knows least of its surroundings, counts least.
    """
    line = ((torch.arange(tile, dtype=torch.float64) + 0.5) * math.pi / tile).sin().square()
    return line[:, None] * line


class Tiled(AnomalyModel):
    """Mixed into a model by `tiled`: it then takes large images, and its own methods see tiles of them.

    The map is the mean of the tiles' maps under `tile_window`. The score is the highest of the tiles' scores,
    so that normal surroundings do not average a small defect away. More tiles mean a higher maximum on normal
    images, too: scores of images of different sizes do not compare. A loss takes a batch of tiles, which
    datasets/transforms.random_tile cuts.
    """

    cuda_graphs = False
    tile: int
    tiles_at_once: int
    overlap: float

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and scores (B,); each result depends on its image alone."""
        window = tile_window(self.tile).to(images.device)
        total = torch.zeros_like(images[:, 0], dtype=torch.float64)
        weight = torch.zeros_like(total[0])
        highest: list[Tensor] = []  # score (B,) in each group of tiles
        for places, tiles in self._tiles(images):
            found = super().predict(tiles)
            maps, scores = (x.unflatten(0, (len(places), -1)) for x in (found.anomaly_map, found.score))
            for (rows, columns), part in zip(places, maps, strict=True):
                total[:, rows, columns] += window * part.double()
                weight[rows, columns] += window
            highest.append(scores.float().amax(dim=0))
        return Prediction((total / weight).float(), torch.stack(highest).amax(dim=0))

    def fit(self, images: Iterable[Tensor], *, seed: int) -> None:
        """The model's, on the tiles of the images, image by image: batches change nothing."""
        one_by_one = (image for batch in images for image in batch.split(1))
        super().fit(self._all_tiles(one_by_one), seed=seed)

    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """The model's, from the tiles of the images."""
        super().fit_statistics(self._all_tiles(images))

    def fit_score(self, images: Iterable[Tensor]) -> None:
        """The model's, from the tiles of the images."""
        super().fit_score(self._all_tiles(images))

    def _all_tiles(self, images: Iterable[Tensor]) -> Iterator[Tensor]:
        return (tiles for batch in images for _, tiles in self._tiles(batch))

    def _tiles(self, images: Tensor) -> Iterator[tuple[list[tuple[slice, slice]], Tensor]]:
        """Places and their tiles (places x B, 3, T, T), about `tiles_at_once`, one place or more."""
        rows, columns = (tile_starts(int(n), self.tile, self.overlap) for n in images.shape[2:])
        places = [(slice(y, y + self.tile), slice(x, x + self.tile)) for y in rows for x in columns]
        # an exported graph takes a batch of any size
        step = 1 if torch.compiler.is_compiling() else max(1, self.tiles_at_once // len(images))
        for first in range(0, len(places), step):
            some = places[first : first + step]
            tiles = torch.cat([images[:, :, y, x] for y, x in some])
            yield some, tiles.contiguous(memory_format=torch.channels_last)


def tiled(model: AnomalyModel, *, tile: int, batch_size: int, overlap: float = OVERLAP) -> AnomalyModel:
    """The model, changed to take images of any size in tiles; its state dict stays as it is."""
    kind = type(model)
    model.__class__ = type(f"Tiled{kind.__name__}", (Tiled, kind), {})
    assert isinstance(model, Tiled)
    model.tile, model.tiles_at_once, model.overlap = tile, batch_size, overlap
    return model
