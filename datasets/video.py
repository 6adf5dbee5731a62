"""Video: UCSD Ped2, a walkway seen by a fixed camera. Training clips show pedestrians only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from datasets.loader import Batch, ImageSet
from datasets.samples import ANOMALOUS, NORMAL, DatasetError, DatasetSpec, Sample, list_images
from datasets.transforms import Decode, Normalise

INTERVALS = "Test/UCSDped2.m"
_CLIP = re.compile(r"gt_frame\s*=\s*\[\s*(\d+)\s*:\s*(\d+)\s*\]")


def list_ped2_categories(root: Path) -> list[str]:
    """["ped2"] where the release's folders are."""
    return ["ped2"] if (root / "Train/Train001").is_dir() and (root / "Test").is_dir() else []


def list_ped2(root: Path, category: str) -> list[Sample]:
    """Frames of the release, clip by clip, in order; the group is the clip.

    A test frame is anomalous if it lies in its clip's interval of UCSDped2.m (frames from 1). Masks are
    paired by their place in the sorted folder, as three clips name them differently.

    Raises:
        DatasetError: if the intervals or masks do not fit the clips.
    """
    samples = []
    for folder in _clips(root, "Train"):
        for path in list_images(folder):
            samples.append(Sample(path, NORMAL, None, category, "train", "normal", folder.name))
    clips = _clips(root, "Test")
    for folder, (first, last) in zip(clips, _intervals(root / INTERVALS, len(clips)), strict=True):
        frames, masks = list_images(folder), list_images(folder.with_name(f"{folder.name}_gt"))
        if len(masks) != len(frames):
            raise DatasetError(
                f"{folder} has {len(frames)} frames and {len(masks)} masks; one a frame is needed"
            )
        for number, (path, mask) in enumerate(zip(frames, masks, strict=True), start=1):
            kind = (ANOMALOUS, mask) if first <= number <= last else (NORMAL, None)
            defect = "abnormal" if kind[0] == ANOMALOUS else "normal"
            samples.append(Sample(path, *kind, category, "test", defect, folder.name))
    return samples


def _clips(root: Path, part: str) -> list[Path]:
    return sorted(p for p in (root / part).glob(f"{part}*") if p.is_dir() and not p.name.endswith("_gt"))


def _intervals(path: Path, clips: int) -> list[tuple[int, int]]:
    """First and last anomalous frame of each test clip."""
    if not path.is_file():
        raise DatasetError(f"{path} is missing; it holds the anomalous intervals and comes with the release")
    found = [(int(a), int(b)) for a, b in _CLIP.findall(path.read_text(errors="replace"))]
    if len(found) != clips:
        raise DatasetError(f"{path} has {len(found)} intervals for {clips} test clips; complete the copy")
    return found


def with_motion(samples: Sequence[Sample], step: int) -> list[Sample]:
    """Grey frames with the frames 2 and 1 times `step` earlier in their clip as red and green plane.

    What stands still stays grey, what moves gets coloured fringes as wide as its way: speed becomes something
    that a frozen teacher sees. The first 2 `step` frames of a clip take the frames that are as much later:
    motion backwards.
    """
    clips: dict[str, list[Path]] = {}
    for sample in samples:
        clips.setdefault(sample.group, []).append(sample.path)
    seen, found = Counter(), []
    for sample in samples:
        clip, place = clips[sample.group], seen[sample.group]
        seen[sample.group] += 1
        towards = -step if place >= 2 * step else step
        places = (min(max(place + n * towards, 0), len(clip) - 1) for n in (2, 1))
        found.append(replace(sample, earlier=tuple(clip[i] for i in places)))
    return found


PED2 = DatasetSpec(
    "ped2",
    list_ped2_categories,
    list_ped2,
    {"ped2": (2550, 362, 1648)},
    layout="Train/Train001, Test/Test001 and Test/UCSDped2.m (the release's folder UCSDped2)",
    video=True,
    read_for_labels=("Test/*_gt/*", "Test/*.m"),
)


class FrameSet(ImageSet):
    """Samples as frames (B, 2, 3, H, W): the one `time_step` earlier in the clip, and the one that is judged.

    Near the start of a clip the earlier one is the clip's first. With `time_step` 0 both are the same.
    Otherwise there are no masks: anomaly maps are of the earlier frame, masks of the later one.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        decode: Decode,
        normalise: Normalise,
        *,
        time_step: int,
        cache_gb: float = 0,
    ) -> None:
        super().__init__(samples, decode, normalise, cache_gb=cache_gb)
        first = {}
        for i, sample in enumerate(self.samples):
            first.setdefault(sample.group, i)
        self.has_masks = self.has_masks and time_step == 0
        self.earlier = [max(first[s.group], i - time_step) for i, s in enumerate(self.samples)]

    def __getitems__(self, draws: list[int]) -> Batch:
        """As an ImageSet's, with `frames` in place of `image`."""
        batch = super().__getitems__(draws)
        earlier = self.normalise(np.stack([self.pixels(self.earlier[i]) for i in batch["index"].tolist()]))
        batch["frames"] = torch.stack([earlier, batch.pop("image")], dim=1)
        return batch
