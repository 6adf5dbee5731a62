"""Video: UCSD Ped2, a walkway seen by a fixed camera. Training clips show pedestrians only."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat

from datasets.files import LFS_POINTER, is_lfs_pointer, list_images, natural_order, subfolders
from datasets.loader import Batch, ImageSet
from datasets.samples import ANOMALOUS, NORMAL, DatasetSpec, Sample
from utils.errors import DatasetError

INTERVALS = "Test/UCSDped2.m"
_PLACES = ("ped2.mat", "*.mat", "*.npy", "testing/*.mat", "testing/*.npy", "../ped2.mat", "../*ped2*.npy")
LABELS = (INTERVALS, *_PLACES)  # the first that is there counts
_log = logging.getLogger("uninet")


def warn_of_gaps(samples: Sequence[Sample]) -> None:
    """Log where the numbers of a clip's frames do not rise by one; the group of a sample is its clip."""
    gaps = [pair for clip in _clips(samples) for pair in pairwise(clip) if not _is_next(*pair)]
    if gaps:
        before, after = gaps[0]
        _log.warning(
            "frame numbers do not rise by one in %d places (%s is followed by %s in %s, for one): what is "
            "missing changes how fast things seem to move, and so the scores",
            len(gaps), before.name, after.name, before.parent,
        )  # fmt: skip


def _is_next(path: Path, after: Path) -> bool:
    one, two = (re.split(r"([0-9]+)", p.stem) for p in (path, after))
    steps = [int(b) - int(a) for a, b in zip(one[1::2], two[1::2], strict=False)]
    return one[::2] == two[::2] and [step for step in steps if step] == [1]


def _clips(samples: Sequence[Sample]) -> list[list[Path]]:
    """The frames of each clip, in order; one of the training may have the name of one of the test set."""
    clips: dict[tuple[str, str], list[Path]] = {}
    for sample in samples:
        clips.setdefault((sample.split, sample.group), []).append(sample.path)
    return [sorted(frames, key=natural_order) for frames in clips.values()]


def with_earlier_frames(samples: Sequence[Sample], step: int) -> list[Sample]:
    """Grey frames with the frames 2 and 1 times `step` earlier in their clip as red and green channel.

    What stands still stays grey, and what moves gets coloured fringes as wide as its way, so a frozen teacher
    sees speed. The first 2 `step` frames of a clip take the frames that are as much later: motion backwards.
    """
    warn_of_gaps(samples)
    earlier = {}
    for clip in _clips(samples):
        for place, path in enumerate(clip):
            towards = -step if place >= 2 * step else step
            places = (min(max(place + n * towards, 0), len(clip) - 1) for n in (2, 1))
            earlier[path] = tuple(clip[i] for i in places)
    return [replace(sample, earlier=earlier[sample.path]) for sample in samples]


class FrameSet(ImageSet):
    """Samples as frames (B, 2, 3, H, W): one `frame_offset` earlier in the clip, and the judged one.

    Near the start of a clip the earlier one is the clip's first. Unless `frame_offset` is 0 there are no
    masks: anomaly maps are of the earlier frame, masks of the later one.
    """

    def __init__(self, images: ImageSet, *, frame_offset: int) -> None:
        super().__init__(images.samples, images.decode, images.normalise, cache_gb=images.budget / 2**30)
        if frame_offset:
            warn_of_gaps(self.samples)
        first: dict[str, int] = {}
        for i, sample in enumerate(self.samples):
            first.setdefault(sample.group, i)
        self.has_masks = self.has_masks and frame_offset == 0
        self.earlier = [max(first[s.group], i - frame_offset) for i, s in enumerate(self.samples)]

    def __getitems__(self, draws: list[int]) -> Batch:
        """As an ImageSet's, with `frames` in place of `image`."""
        batch = super().__getitems__(draws)
        earlier = self.normalise(np.stack([self.pixels(self.earlier[i]) for i in batch["index"].tolist()]))
        batch["frames"] = torch.stack([earlier, batch.pop("image")], dim=1)
        return batch


def list_ped2_categories(root: Path) -> list[str]:
    """["ped2"] where the release's folders are, or those of the layout that video prediction uses."""
    release = (root / "Train/Train001", root / "Test/Test001")
    other = (root / "training/frames", root / "testing/frames")
    is_release = all(p.is_dir() for p in release) and (root / INTERVALS).is_file()
    return ["ped2"] if is_release or all(p.is_dir() for p in other) else []


def list_ped2(root: Path, category: str) -> list[Sample]:
    """Frames clip by clip, in order; the group is the clip. A DatasetError if labels are missing or wrong.

    The release gives the anomalous frames of each test clip as an interval, in UCSDped2.m. The other layout
    has intervals in a .mat file (cell array gt, frames from 1), or a label of 0 or 1 for each test frame in a
    .npy file, and no masks. A missing frame does not shift the labels of the others.
    """
    release = (root / INTERVALS).is_file()
    train, test = ("Train", "Test") if release else ("training/frames", "testing/frames")

    def group(clip: Path) -> str:
        return clip.name if release else clip.relative_to(root).as_posix()

    samples = []
    for clip in _clip_folders(root / train):
        samples += [Sample(p, NORMAL, None, category, "train", "normal", group(clip)) for p in _frames(clip)]
    clips = _clip_folders(root / test)
    places = _places([_frames(clip) for clip in clips])
    for clip, place_of, labels in zip(clips, places, _labels(root, places), strict=True):
        masks = _masks(clip, list(place_of)) if release else {}
        for path, place in place_of.items():
            mask = masks.get(path) if labels[place] else None
            label, defect = (ANOMALOUS, "abnormal") if labels[place] else (NORMAL, "normal")
            samples.append(Sample(path, label, mask, category, "test", defect, group(clip)))
    return samples


def _clip_folders(part: Path) -> list[Path]:
    return sorted((p for p in subfolders(part) if not p.name.endswith("_gt")), key=natural_order)


def _frames(folder: Path) -> list[Path]:
    return sorted(list_images(folder), key=natural_order)


def _number(path: Path) -> int:
    """The last number in a name, or -1."""
    return int((re.findall(r"[0-9]+", path.stem) or [-1])[-1])


def _places(clips: Sequence[Sequence[Path]]) -> list[dict[Path, int]]:
    """Each frame's place in its clip, from 0: by its number if every clip counts from 0 or from 1."""
    numbers = [_number(path) for frames in clips for path in frames]
    if -1 in numbers or numbers == list(range(numbers[0], numbers[0] + len(numbers))):  # counting runs on
        return [{path: place for place, path in enumerate(frames)} for frames in clips]
    first = min(1, *numbers)
    return [{path: _number(path) - first for path in frames} for frames in clips]


def _masks(clip: Path, frames: Sequence[Path]) -> dict[Path, Path]:
    """Each frame's mask: by order, as three clips name masks differently; by number if some are missing."""
    folder = clip.with_name(f"{clip.name}_gt")
    masks = _frames(folder)
    if len(masks) == len(frames):
        return dict(zip(frames, masks, strict=True))
    by_number = {_number(mask): mask for mask in masks}
    return {path: by_number.get(_number(path), folder / f"{path.stem}.bmp") for path in frames}


def _labels(root: Path, clips: Sequence[dict[Path, int]]) -> list[np.ndarray]:
    """For each test clip, whether the frame of a place is anomalous: (places,), not zero where it is."""
    file = next((p for pattern in LABELS for p in sorted(root.glob(pattern))), None)
    if file is None:
        expected = "expected ped2.mat (cell array gt), or a .npy file with 0 or 1 for each test frame, in it"
        raise DatasetError(f"{root} has no labels of the test frames; {expected}")
    if is_lfs_pointer(file):
        raise DatasetError(f"{file} holds no labels: {LFS_POINTER}")
    try:
        found = _read_labels(file)
    except Exception as error:  # numpy and SciPy raise many kinds for a damaged or foreign file
        expected = "expected intervals in a cell array gt (.mat) or a vector of 0 and 1 (.npy)"
        problem = f"cannot be read as labels of test frames ({type(error).__name__}: {error})"
        raise DatasetError(f"{file} {problem}; {expected}") from error
    frames = [max(places.values(), default=-1) + 1 for places in clips]
    if isinstance(found, np.ndarray):
        if len(found) != sum(frames) or not np.isin(found, (0, 1)).all():
            numbers = f"{len(found)} numbers for {sum(frames)} test frames"
            raise DatasetError(f"{file} has {numbers}; expected 0 or 1 for each")
        return np.split(found, np.cumsum(frames)[:-1])
    if len(found) != len(clips):
        numbers = f"{len(found)} intervals for {len(clips)} test clips"
        raise DatasetError(f"{file} has {numbers}; complete the copy")
    labels = [np.zeros(number, bool) for number in frames]
    for of_clip, intervals in zip(labels, found, strict=True):
        for first, last in intervals:
            if first < 1:
                raise DatasetError(f"{file} has an interval from frame {first}; frames are counted from 1")
            of_clip[first - 1 : last] = True
    return labels


def _read_labels(file: Path) -> list[list[tuple[int, int]]] | np.ndarray:
    """Intervals of each clip (frames from 1, both ends included), or a label for each frame."""
    if file.suffix == ".m":
        clips = re.findall(r"gt_frame\s*=\s*\[([^\]]*)\]", file.read_text(errors="replace"))
        return [[(int(a), int(b)) for a, b in re.findall(r"(\d+)\s*:\s*(\d+)", clip)] for clip in clips]
    if file.suffix == ".npy":
        return np.load(file, allow_pickle=False).ravel()
    cells = loadmat(file)["gt"]
    if cells.dtype == object:
        cells = [np.atleast_2d(cell) for cell in cells.ravel()]
    elif max(cells.shape) == cells.size > 2:
        return cells.ravel()
    else:  # a start and an end for each clip
        cells = [row[None] for row in (cells if cells.shape[-1] == 2 else cells.T)]
    # starts in the first row, ends in the second; of a single interval also side by side
    return [[(int(a), int(b)) for a, b in (cell.T if len(cell) == 2 else cell)] for cell in cells]


PED2 = DatasetSpec(
    "ped2",
    list_ped2_categories,
    list_ped2,
    {"ped2": (2550, 362, 1648)},
    layout="Train/Train001, Test/Test001 and Test/UCSDped2.m (the release's folder UCSDped2), or "
    "training/frames and testing/frames",
    video=True,
    read_for_labels=("Test/*_gt/*", "Test/*.m", *LABELS),
)
