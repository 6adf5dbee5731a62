"""Splits of samples: byte-identical copies, groups that stay together, held-out parts.

All are functions of the samples and a seed, whatever the order that a disk lists files in.
"""

import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from datasets.samples import ANOMALOUS, NORMAL, DatasetSpec, Sample
from utils.errors import DatasetError
from utils.files import printable, relative_to

WHOLE = 1 << 16  # bytes: of a digest files up to this size are read in full
PIECES, PIECE = 16, 1 << 12  # of a larger file: so many pieces, evenly spread, of so many bytes
_log = logging.getLogger("uninet")


def first_copies(paths: Iterable[Path]) -> dict[Path, Path]:
    """Each path to the first path whose file has the same bytes; to itself where there is none before it.

    Only files of equal size are opened, and only those are read whole whose pieces agree, too.
    """
    first = {path: path for path in paths}
    groups = [list(first)]
    for key in (_size, content_digest, lambda path: hashlib.sha256(path.read_bytes()).digest()):
        same: dict[object, list[Path]] = {}
        for i, path in ((i, path) for i, group in enumerate(groups) for path in group):
            same.setdefault((i, key(path)), []).append(path)
        groups = [group for group in same.values() if len(group) > 1]
    for group in groups:
        first |= dict.fromkeys(group, group[0])
    return first


def _size(path: Path) -> int:
    return path.stat().st_size


def shared_images(train: Sequence[Sample], test: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Pairs of a training and a test image with the same bytes; every such training image is in one."""
    first = first_copies(s.path for s in (*train, *test))
    tested = {first[s.path]: s for s in test}
    return [(s, tested[first[s.path]]) for s in train if first[s.path] in tested]


def without_copies(train: Sequence[Sample], test: Sequence[Sample]) -> list[Sample]:
    """The training images that are not byte-identical to a test image; a warning tells how many are."""
    copies = {ours.path for ours, _ in shared_images(train, test)}
    if copies:
        _log.warning("%d training images are also in the test set; they are not trained on", len(copies))
    return [s for s in train if s.path not in copies]


def check_disjoint(train: Sequence[Sample], test: Sequence[Sample]) -> None:
    """Stop at the first test image that is byte-identical to a training image."""
    for ours, theirs in shared_images(train, test):
        same = f"{theirs.path} of the test set is the same file as {ours.path} of the training set"
        raise DatasetError(f"{same}; put both on one side")


def check_labels(spec: DatasetSpec, category: str, samples: Sequence[Sample]) -> None:
    """Stop if one file (equal bytes) is normal and anomalous; a warning where the dataset is published."""
    # decoding tells of missing, empty and closed files
    there = [s for s in samples if s.path.is_file() and _size(s.path) and os.access(s.path, os.R_OK)]
    pairs = shared_images(*([s for s in there if s.label == label] for label in (NORMAL, ANOMALOUS)))
    for normal, anomalous in pairs[:1]:
        problem = (
            f"{printable(anomalous.path)} ({anomalous.defect}) is the same file as {printable(normal.path)} "
            f"({normal.defect}), so one image has two labels ({len(pairs)} such pairs)"
        )
        if category not in spec.counts:
            raise DatasetError(f"{problem}; remove the wrong one of each pair")
        _log.warning("%s", problem)


def tied_groups(samples: Sequence[Sample]) -> dict[str, str]:
    """Each group to the one that stands for it and for all groups that hold a byte-identical image."""
    first, group_of = first_copies(s.path for s in samples), {s.path: s.group for s in samples}
    parent = {s.group: s.group for s in samples}

    def standing(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    for s in samples:
        low, high = sorted((standing(s.group), standing(group_of[first[s.path]])))
        parent[high] = low
    return {group: standing(group) for group in parent}


def hold_out(samples: Sequence[Sample], fraction: float, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples into kept and held-out ones; groups, and groups that share a copy, stay together.

    In each category the held-out part is the smallest number of groups that reaches `fraction` of the
    samples, and at least one sample is kept.
    """
    if fraction == 0:
        return list(samples), []
    tied, categories = tied_groups(samples), dict.fromkeys(s.category for s in samples)
    by_category = {name: [s for s in samples if s.category == name] for name in categories}
    chosen: set[str] = set()
    for category, part in by_category.items():
        sizes = Counter(tied[s.group] for s in part)
        groups = sorted(sizes)
        text = os.fsencode(f"{seed}-{category}")  # of a folder, so of any bytes
        random.Random(text).shuffle(groups)  # noqa: S311 (a split, no secret)
        number = sum(sizes[group] for group in chosen & sizes.keys())
        for group in groups[:-1]:
            if number >= fraction * len(part):
                break
            number += 0 if group in chosen else sizes[group]
            chosen.add(group)
    ordered = [s for part in by_category.values() for s in part]
    kept = [s for s in ordered if tied[s.group] not in chosen]
    return kept, [s for s in ordered if tied[s.group] in chosen]


def limit(samples: Sequence[Sample], number: int | None, *, seed: int) -> list[Sample]:
    """A random subset of `number` samples (None: all), in order; a larger number contains a smaller one."""
    if number is None or number >= len(samples):
        return list(samples)
    order = list(range(len(samples)))
    random.Random(f"{seed}-limit").shuffle(order)  # noqa: S311 (a subset, no secret)
    return [samples[i] for i in sorted(order[:number])]


def move_anomalies(test: list[Sample], number: int) -> tuple[list[Sample], list[Sample]]:
    """The test samples without `number` of the anomalous ones, and those, now of the training set.

    Whole groups are moved until the number is reached, first those without a normal test image, so that an
    item is on one side where that is possible. No seed changes the choice, so the test set stays the same.
    Raises DatasetError if none would be left to test on.
    """
    if number == 0:
        return test, []
    tied = tied_groups(test)
    tested = {tied[s.group] for s in test if s.label == NORMAL}
    sizes = Counter(tied[s.group] for s in test if s.label == ANOMALOUS)
    groups = sorted(sizes)
    random.Random("moved").shuffle(groups)  # noqa: S311 (a split, no secret)
    chosen: set[str] = set()
    for group in sorted(groups, key=tested.__contains__):
        if sum(sizes[g] for g in chosen) < number:
            chosen.add(group)
    moved = {s: replace(s, split="train") for s in test if s.label == ANOMALOUS and tied[s.group] in chosen}
    rest = [s for s in test if s not in moved]
    if not any(s.label == ANOMALOUS for s in rest):
        raise DatasetError(f"data.num_train_anomalies {number} leaves no anomalous test image")
    return rest, list(moved.values())


def names_and_sizes(samples: Iterable[Sample], root: Path | None) -> str:
    """A digest that changes with the images' paths below `root` and with the sizes of their files."""
    files = sorted({f"{relative_to(s.path, root)}|{_size(s.path)}" for s in samples})
    return hashlib.sha256(os.fsencode("\n".join(files))).hexdigest()[:16]


def content_digest(path: Path) -> str:
    """Size and hash of a file's content, or "unreadable". Of a file above WHOLE bytes, PIECES are read; a
    change of a few pixels in a large uncompressed file can fall between them.
    """
    try:
        with path.open("rb") as file:
            size, digest = file.seek(0, 2), hashlib.sha256()
            for i in range(PIECES if size > WHOLE else 1):
                file.seek(i * (size - PIECE) // (PIECES - 1) if i else 0)
                digest.update(file.read(PIECE if size > WHOLE else WHOLE))
            return f"{size}-{digest.hexdigest()[:16]}"
    except OSError:  # what reads it for good says why
        return "unreadable"
