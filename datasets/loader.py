"""From samples to batches: a bounded cache of decoded images, a data order that can be resumed anywhere."""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from datasets.images import read_image
from datasets.samples import NORMAL, Sample
from datasets.transforms import Decode, Normalise
from utils.config import TrainConfig
from utils.errors import DatasetError

Batch = dict[str, Tensor]
Drawn = tuple[np.ndarray, np.ndarray | None, int]  # pixels, mask and label of a draw
T = TypeVar("T")
THREADS = min(4, os.cpu_count() or 1)  # that decode ahead of a model
STATISTICS_IMAGES = 64  # that feature statistics are taken from
AHEAD = 1 << 28  # bytes of batches that may wait for it


class ImageSet(Dataset):
    """Samples as batches: image (B, 3, H, W), label (B,), mask (B, 1, H, W) in {0, 1}, index (B,).

    Masks are there if every sample's is known: an anomalous one without a mask file leaves them out.
    Decoded images are kept as uint8 up to `cache_gb`.
    """

    kind = "detection"  # what is measured on it, see `Scores`

    def __init__(
        self, samples: Sequence[Sample], decode: Decode, normalise: Normalise, *, cache_gb: float = 0
    ) -> None:
        self.samples, self.decode, self.normalise = list(samples), decode, normalise
        self.has_masks = all(s.mask_path is not None or s.label == 0 for s in self.samples)
        self.budget = int(cache_gb * 2**30)  # bytes
        self.image_bytes = 3 * decode.size[0] * decode.size[1]
        self.cached = min(len(self.samples), self.budget // self.image_bytes)
        self._cache: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def fill_cache(self, *, quiet: bool = False) -> "ImageSet":
        """Decode what fits, in threads (Pillow releases the GIL); loader processes started later share it."""
        todo = [i for i in range(self.cached) if i not in self._cache]
        with ThreadPoolExecutor() as pool:
            images = pool.map(self._decoded, todo)
            bar = tqdm(images, "decoding", len(todo), unit="image", disable=quiet or None)
            self._cache.update(zip(todo, bar, strict=True))
        return self

    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        image = self._cache.get(index)
        if image is None:
            image = self._decoded(index)
            if index < self.cached:
                self._cache[index] = image
        return image

    def _decoded(self, index: int) -> np.ndarray:
        sample = self.samples[index]
        if sample.earlier:
            return self.decode.stacked([read_image(path) for path in (*sample.earlier, sample.path)])
        return self.decode.image(sample.path)

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 in {0, 1}; zero for a normal image."""
        sample = self.samples[index]
        if not sample.masks:
            return np.zeros(self.decode.size, np.uint8)
        return self.decode.mask(*sample.masks, of=sample.path)

    def sample(self, draw: int) -> Drawn:
        """Pixels, mask (None where masks are not known) and label of draw d: sample d % N, epoch d // N."""
        index = draw % len(self)
        return self.pixels(index), self.mask(index) if self.has_masks else None, self.samples[index].label

    def __getitems__(self, draws: list[int]) -> Batch:
        """The batch of these draws (called by DataLoader with a whole batch)."""
        return self.batch(draws, list(map(self.sample, draws)))

    def batch(self, draws: list[int], samples: Sequence[Drawn]) -> Batch:
        """The batch of these samples of these draws."""
        images, masks, labels = zip(*samples, strict=True)
        batch = {
            "image": self.normalise(np.stack(images)),
            "label": torch.tensor(labels),
            "index": torch.tensor([draw % len(self) for draw in draws]),
        }
        if self.has_masks:
            batch["mask"] = torch.from_numpy(np.stack(masks))[:, None]
        return batch


class DeviceSet(Dataset):
    """An `ImageSet` whose pixels and masks are on a GPU as uint8: its batches, to the bit, are made there."""

    def __init__(self, data: ImageSet, device: torch.device) -> None:
        places = range(len(data))
        self.images = torch.from_numpy(np.stack([data.pixels(i) for i in places])).to(device)
        self.masks = None
        if data.has_masks:
            self.masks = torch.from_numpy(np.stack([data.mask(i) for i in places]))[:, None].to(device)
        self.labels = torch.tensor([sample.label for sample in data.samples])
        self.scale, self.offset = (torch.from_numpy(x).to(device) for x in data.normalise.factors())

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: list[int]) -> Batch:
        """As of the `ImageSet`."""
        index = torch.tensor([draw % len(self) for draw in draws])
        place = index.to(self.images.device, non_blocking=True)
        images = (self.images[place] * self.scale + self.offset).permute(0, 3, 1, 2)
        batch = {"image": images, "label": self.labels[index], "index": index}
        return batch if self.masks is None else batch | {"mask": self.masks[place]}


def fits_on(data: ImageSet, device: torch.device) -> bool:
    """Whether a GPU can hold the set: plain images, all decoded, in a quarter of its free memory at most."""
    decoded = type(data) is ImageSet and data.cached == len(data)
    return (
        device.type == "cuda"
        and decoded
        and 2 * data.image_bytes * len(data) < torch.cuda.mem_get_info(device)[0] / 4
    )


@dataclass(eq=False)
class TrainingOrder(Sampler[list[int]]):
    """Batches of draws from step `start` to `stop`: permutations of all samples, one after the other.

    A draw is the sample's index plus the number of samples times the epoch. Step k is a function of the seed
    alone, hence a run can go on anywhere without replaying what came before.

    last_batch: what becomes of the samples that an epoch leaves. "carry" begins the next epoch's first batch
    with them, so that all batches have one size; "drop" leaves them out; "keep" makes a smaller batch.
    repeat: how often each batch is given in a row. share: (k, n) takes piece k of n of each batch.
    """

    samples: int
    batch_size: int
    _: KW_ONLY
    seed: int
    start: int
    stop: int
    repeat: int = 1
    share: tuple[int, int] = (0, 1)
    last_batch: str = "carry"

    def __post_init__(self) -> None:
        assert self.batch_size % self.share[1] == 0, f"{self.batch_size} images are not shared equally"

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for step in range(self.start, self.stop):
            batch = []
            for position in self._positions(step // self.repeat):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.samples).tolist()
                batch.append(epoch * self.samples + order[position % self.samples])
            place, size = self.share[0], len(batch) // self.share[1]
            yield batch[place * size : (place + 1) * size]

    def _positions(self, turn: int) -> range:
        """Where the batch of a turn lies in the epochs, each `samples` long, one after the other."""
        if self.last_batch == "carry":
            return range(turn * self.batch_size, (turn + 1) * self.batch_size)
        per_epoch = int(batches_per_epoch(self.samples, self.batch_size, self.last_batch))
        epoch, batch = divmod(turn, per_epoch)
        first = epoch * self.samples + batch * self.batch_size
        return range(first, min(first + self.batch_size, (epoch + 1) * self.samples))


def batches_per_epoch(samples: int, batch_size: int, last_batch: str) -> float:
    """Batches that an epoch has, a whole number unless they run across epochs; a DatasetError if none."""
    if last_batch == "drop" and samples < batch_size:
        way_out = f"use --set train.batch_size={samples} or --set train.last_batch=carry"
        raise DatasetError(f"{samples} training images make no batch of {batch_size}; {way_out}")
    exact = samples / batch_size
    return {"carry": exact, "drop": math.floor(exact), "keep": math.ceil(exact)}[last_batch]


def count_steps(train: TrainConfig, images: int) -> int:
    """Steps of a run: `train.iterations`, or where it is set `train.epochs` over so many images."""
    per_epoch = batches_per_epoch(images, train.batch_size, train.last_batch)
    if train.epochs is None:
        return train.iterations
    return math.ceil(train.epochs * per_epoch) * len(train.scales)


def training_batches(
    data: ImageSet, order: TrainingOrder, *, workers: int | None, device: torch.device
) -> DataLoader:
    """Loader over the steps of `order`, from the memory of a GPU if the set fits there.

    workers: processes that make batches, which changes none. None: some for a GPU, which would wait for each
    batch; none for a CPU, which has no time to spare.
    """
    resident = fits_on(data, device)
    pin = device.type == "cuda" and not resident
    if resident or workers is None:
        workers = min(4, (os.cpu_count() or 1) // 2) if pin else 0
    return DataLoader(
        DeviceSet(data, device) if resident else data,
        batch_sampler=order,
        collate_fn=dict,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # the global one is the models': each loader would take a number of it
    )


class batches:  # noqa: N801 (used as a function)
    """All samples (or those of `indices`) in order, each once; the last batch may be smaller.

    Threads decode the next batches while a model works on this one.
    """

    def __init__(self, data: ImageSet, batch_size: int, *, indices: Sequence[int] | None = None) -> None:
        indices = list(range(len(data)) if indices is None else indices)
        self.data = data
        self.parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        largest = batch_size * 12 * data.decode.size[0] * data.decode.size[1]  # bytes
        self.threads = max(1, min(THREADS, AHEAD // largest))

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for part in self.parts:
                    waiting.append(pool.submit(self.data.__getitems__, part))
                    if len(waiting) > self.threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def statistics_sample(data: ImageSet, most: int = STATISTICS_IMAGES) -> ImageSet:
    """Normal training images (all, if there is none), spread over the set and so over its categories."""
    normal = [i for i, s in enumerate(data.samples) if s.label == NORMAL] or list(range(len(data)))
    chosen = evenly_spread(normal, most)
    sample = ImageSet([data.samples[i] for i in chosen], data.decode, data.normalise)
    sample._cache = {at: data._cache[i] for at, i in enumerate(chosen) if i in data._cache}
    return sample


def evenly_spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places.tolist()]
