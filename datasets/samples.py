"""The samples of a dataset, and what must be true of them before training."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from datasets.files import IMAGE_SUFFIXES, LFS_POINTER, Unused, is_lfs_pointer, list_images, unused_files
from utils.errors import DatasetError
from utils.files import printable

NORMAL, ANOMALOUS, UNKNOWN = 0, 1, -1
Counts = tuple[int, ...]  # as `count` returns them
_log = logging.getLogger("uninet")


@dataclass(frozen=True)
class Sample:
    """One image. label: 0 normal, 1 anomalous, -1 unknown. split: train, validation or test.

    group: what must stay on one side of a split. earlier: frames of the clip that become the first channels
    of the image, oldest first (`data.stack_frames`). more_masks: of further instances of its defect.
    """

    path: Path
    label: int
    mask_path: Path | None
    category: str
    split: str
    defect: str
    group: str
    earlier: tuple[Path, ...] = ()
    more_masks: tuple[Path, ...] = ()

    @property
    def masks(self) -> tuple[Path, ...]:
        """All mask files."""
        return () if self.mask_path is None else (self.mask_path, *self.more_masks)


@dataclass(frozen=True)
class DatasetSpec:
    """How a dataset is listed, and what is published about it.

    counts: each category's, as `count` returns them. Other counts stop a run if they are `verified`, or if
    `verified_total` and their sums differ; else they are a warning.
    needs_test: an empty test set is an error.
    layout: what the root holds, for the message about a wrong one.
    drops_copies: training images that are byte-identical to a test image are dropped; elsewhere refused.
    segmentation: every image is anomalous and has a mask. video: samples are frames, the group a clip.
    read_for_labels: patterns of files that labels come from and that no sample holds.
    """

    name: str
    list_categories: Callable[[Path], list[str]]
    list_samples: Callable[[Path, str], list[Sample]]
    counts: Mapping[str, Counts]
    verified: bool = True
    verified_total: bool = False
    layout: str = "<category>/train/good"
    needs_test: bool = True
    drops_copies: bool = False
    segmentation: bool = False
    video: bool = False
    read_for_labels: tuple[str, ...] = ()


def count(samples: Iterable[Sample]) -> Counts:
    """(train normal, test normal, test anomalous), with train anomalous and validation behind, if any."""
    seen = Counter((s.split, s.label) for s in samples)
    found = [seen["train", NORMAL], seen["test", NORMAL], seen["test", ANOMALOUS], seen["train", ANOMALOUS]]
    found.append(sum(number for (split, _), number in seen.items() if split == "validation"))
    while len(found) > 3 and not found[-1]:
        found.pop()
    return tuple(found)


def in_words(counts: Counts) -> str:
    """`count`'s numbers as "5 training, 2 normal and 3 anomalous test images"."""
    train, normal, anomalous, extra, held_out = (*counts, 0, 0)[:5]
    if held_out:  # segmentation
        return f"{extra} training, {held_out} validation and {anomalous} test images"
    more = f" (and {extra} anomalous)" if extra else ""
    return f"{train}{more} training, {normal} normal and {anomalous} anomalous test images"


def counts_are_wrong(spec: DatasetSpec, found: Counts, expected: Counts) -> bool:
    """Whether counts differ in what is verified about them: all of them, their sum, or nothing."""
    return found != expected and (spec.verified or (spec.verified_total and sum(found) != sum(expected)))


def check_counts(spec: DatasetSpec, root: Path, category: str, found: Counts, *, incomplete: bool) -> str:
    """What differs from the published counts without being wrong, to be warned of; else an empty text.

    Raises DatasetError if verified counts differ and the copy may not be `incomplete`.
    """
    expected = spec.counts.get(category, found)
    if found == expected:
        return ""
    problem = f"{spec.name}/{category} has {in_words(found)}; published are {in_words(expected)}"
    if counts_are_wrong(spec, found, expected) and not incomplete:
        raise DatasetError(f"{problem}. {_way_out(spec, root, category)}")
    if sum(found) == sum(expected):
        return f"{problem} (another split of as many images, which may be in order)"
    return f"{problem}: this is not the official split, its numbers are not comparable"


def _way_out(spec: DatasetSpec, root: Path, category: str) -> str:
    """What to do about a copy of a dataset that is not complete."""
    frames = " --set data.frame_offset=0" if spec.video else ""
    ways = f"Complete the copy, or take what is there with --skip-unreadable{frames}"
    folders = [base for base in (root / category, root) if (base / "test").is_dir()]
    if spec.counts and any(list_images(base / "train/good") for base in folders):
        ways += ", or use --dataset folder for a changed one"
    return ways


def check_files(spec: DatasetSpec, root: Path, samples: Sequence[Sample]) -> None:
    """Stop at the first listed file that is missing, or if Git LFS pointers stand in place of files."""
    # a broken link is refused when it is read
    files = [(path, s) for s in samples for path in (s.path, *s.masks) if not path.is_symlink()]
    for path, sample in files:
        if not path.exists():
            problem = f"no mask for {sample.path}; expected {path} (or the same name)"
            problem = f"{path} is missing" if path == sample.path else problem
            raise DatasetError(f"{problem}. {_way_out(spec, root, sample.category)}")
    if pointers := [path for path, _ in files if is_lfs_pointer(path)]:
        found = f"{len(pointers)} images and masks were not fetched"
        raise DatasetError(f"{found}, as {pointers[0]}: {LFS_POINTER}")


def check_splits(spec: DatasetSpec, category: str, samples: Sequence[Sample]) -> None:
    """Stop if there is nothing to train or to test on. Raises DatasetError naming what is empty."""
    where, (train, *test) = f"{spec.name}/{category}", count(samples)[:3]
    if spec.segmentation:
        for split in ("train", "test"):
            if all(s.split != split for s in samples):
                raise DatasetError(f"{where}: no anomalous {split} image found; expected {spec.layout}")
    elif train == 0:
        raise DatasetError(f"{where}: no normal training image found; images end in {IMAGE_SUFFIXES}")
    elif spec.needs_test and 0 in test:
        missing = "normal" if test[0] == 0 else "anomalous"
        raise DatasetError(f"{where}: no {missing} test image found; expected {spec.layout}, and a test set")


def unused_samples(spec: DatasetSpec, root: Path, category: str, samples: Iterable[Sample]) -> Unused:
    """What lies in the category's folder and in no sample."""
    used = [p for s in samples for p in (s.path, *s.masks, *s.earlier)]
    folder = folder_of(root, category)
    return unused_files(folder, [*used, *_label_files(spec, folder)])


def unused_beside(spec: DatasetSpec, root: Path, categories: Sequence[str]) -> Unused:
    """What lies in the root and in none of the categories' folders."""
    return unused_files(root, _label_files(spec, root), apart=[folder_of(root, name) for name in categories])


def folder_of(root: Path, category: str) -> Path:
    """The folder of a category, or the root itself where a root is one category."""
    whole = (root / "train").is_dir() or not (root / category).is_dir()
    return root if whole else root / category


def _label_files(spec: DatasetSpec, folder: Path) -> list[Path]:
    return [p for pattern in spec.read_for_labels for p in folder.glob(pattern)]


def with_unused(message: str, unused: Unused) -> str:
    """An error's message, and what is there instead."""
    return f"{message}. Found, but not where it is looked for: {unused}" if str(unused) else message


@cache  # a set is listed more than once; what is left out is said once
def log_unused(folder: Path, unused: Unused) -> None:
    """Say what is left out of a folder: a warning, if pictures may be missed."""
    if unused.pictures:
        _log.warning("not used in %s: %s (docs/OWN_IMAGES.md has the layout)", printable(folder), unused)
    elif unused.others:
        _log.info("not used in %s: %s", printable(folder), unused)
