"""One table of samples for every dataset, built and checked once, before training."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

NORMAL, ANOMALOUS, UNKNOWN = 0, 1, -1
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class DatasetError(ValueError):
    """The data on disk is not what the dataset needs; the message says what was expected and what to do."""


@dataclass(frozen=True)
class Sample:
    """One image. label: 0 normal, 1 anomalous, -1 unknown.

    `group` ties what must stay on one side of a split.
    """

    path: Path
    label: int
    mask_path: Path | None
    category: str
    split: str  # train | test
    defect: str
    group: str


@dataclass(frozen=True)
class DatasetSpec:
    """What a dataset is: how to list a category's samples, and what is published about it.

    counts: category to (train normal, test normal, test anomalous), checked where the category is listed.
    """

    name: str
    list_categories: Callable[[Path], list[str]]
    list_samples: Callable[[Path, str], list[Sample]]
    counts: Mapping[str, tuple[int, int, int]]
    verified: bool = True
    has_masks: bool = True


def count(samples: Iterable[Sample]) -> tuple[int, int, int]:
    """Return (train normal, test normal, test anomalous)."""
    seen = Counter((s.split, s.label) for s in samples)
    return seen["train", NORMAL], seen["test", NORMAL], seen["test", ANOMALOUS]


def collect(spec: DatasetSpec, root: str | Path | None, category: str) -> list[Sample]:
    """List and check the samples of one category, or of all (`category` "all"), in a fixed order.

    Raises:
        DatasetError: for a wrong root (a better one is suggested), an unknown category, an empty split, a
            missing mask, or counts that differ from the published ones.
    """
    root = _checked_root(spec, root)
    known = spec.list_categories(root)
    if category != "all" and category not in known:
        raise DatasetError(f"no category '{category}' in {root}; found: {', '.join(known)}")
    samples: list[Sample] = []
    for name in known if category == "all" else [category]:
        part = spec.list_samples(root, name)
        _check_part(spec, name, part)
        samples += part
    return samples


def _checked_root(spec: DatasetSpec, root: str | Path | None) -> Path:
    if root is None:
        raise DatasetError(f"where is {spec.name}? Give its folder with --data-root DIR")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DatasetError(f"--data-root {root} is no folder")
    if spec.list_categories(root):
        return root
    near = [
        d for d in (root.parent, *sorted(p for p in root.iterdir() if p.is_dir())) if spec.list_categories(d)
    ]
    hint = f"; did you mean --data-root {near[0]}?" if near else "; see docs/DATASETS.md for the layout"
    raise DatasetError(f"{root} does not look like {spec.name}: no <category>/train/good in it{hint}")


def _check_part(spec: DatasetSpec, category: str, samples: Sequence[Sample]) -> None:
    train, test_normal, test_anomalous = count(samples)
    if train == 0:
        raise DatasetError(
            f"{spec.name}/{category}: no normal training image found; images end in {IMAGE_SUFFIXES}"
        )
    expected = spec.counts.get(category)
    if expected and spec.verified and (train, test_normal, test_anomalous) != expected:
        raise DatasetError(
            f"{spec.name}/{category} has {train} training, {test_normal} normal and {test_anomalous} "
            f"anomalous test images; published are {expected[0]}, {expected[1]} and {expected[2]}. "
            "Complete the copy, or use --config configs/folder.yaml for a changed one"
        )


def list_images(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name; other files (Thumbs.db, readme.txt) are left out."""
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
    )


def check_disjoint(train: Sequence[Sample], test: Sequence[Sample]) -> None:
    """Stop if a test image is byte-identical to a training image.

    Raises:
        DatasetError: naming the first such pair.
    """
    sizes = {s.path.stat().st_size for s in train} & {s.path.stat().st_size for s in test}
    digests = {_digest(s.path): s.path for s in train if s.path.stat().st_size in sizes}
    for s in test:
        if s.path.stat().st_size in sizes and (twin := digests.get(_digest(s.path))):
            raise DatasetError(f"{s.path} of the test set is the same file as {twin} of the training set")


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def hold_out(samples: Sequence[Sample], fraction: float, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split normals into kept and held-out parts, whole groups together, the same for a seed in any order.

    The held-out part is the smallest number of groups that reaches `fraction` of the samples, in each
    category; at least one sample of each category is kept.
    """
    kept: list[Sample] = []
    held: list[Sample] = []
    for category in dict.fromkeys(s.category for s in samples):
        part = [s for s in samples if s.category == category]
        groups = sorted({s.group for s in part})
        random.Random(f"{seed}-{category}").shuffle(groups)  # noqa: S311 (a split, no secret)
        chosen: set[str] = set()
        for group in groups[:-1]:
            if sum(s.group in chosen for s in part) >= fraction * len(part):
                break
            chosen.add(group)
        held += [s for s in part if s.group in chosen]
        kept += [s for s in part if s.group not in chosen]
    return kept, held


def limit(samples: Sequence[Sample], number: int | None, *, seed: int) -> list[Sample]:
    """A random subset of `number` samples (None: all), in order; a larger number contains a smaller one."""
    if number is None or number >= len(samples):
        return list(samples)
    order = list(range(len(samples)))
    random.Random(f"{seed}-limit").shuffle(order)  # noqa: S311 (a subset, no secret)
    return [samples[i] for i in sorted(order[:number])]


def as_split(samples: Iterable[Sample], split: str) -> list[Sample]:
    """The same samples under another split's name."""
    return [replace(s, split=split) for s in samples]
