"""One table of samples for every dataset, built and checked once, before training."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from datasets.files import IMAGE_SUFFIXES, LFS_POINTER, Unused, is_lfs_pointer, unused_files
from datasets.files import find_images as find_images
from datasets.files import list_images as list_images
from utils.errors import DatasetError
from utils.files import printable

NORMAL, ANOMALOUS, UNKNOWN = 0, 1, -1
Counts = tuple[int, ...]  # see `count`
MOST_LISTED = 10_000  # files below a wrong root, which may be a whole disk
_log = logging.getLogger("uninet")


@dataclass(frozen=True)
class Sample:
    """One image. label: 0 normal, 1 anomalous, -1 unknown.

    `group` ties what must stay on one side of a split. `earlier`: frames of the clip that become the first
    planes of the image, oldest first (`data.motion`). `more_masks`: of further instances of its defect.
    """

    path: Path
    label: int
    mask_path: Path | None
    category: str
    split: str  # train | validation | test
    defect: str
    group: str
    earlier: tuple[Path, ...] = ()
    more_masks: tuple[Path, ...] = ()

    @property
    def masks(self) -> tuple[Path, ...]:
        """All mask files."""
        return (self.mask_path, *self.more_masks) if self.mask_path is not None else ()


@dataclass(frozen=True)
class DatasetSpec:
    """What a dataset is: how to list a category's samples, and what is published about it.

    counts: category to what `count` should give; checked where the category is listed. Counts that differ
        stop a run where they are `verified`, and are logged as a warning where they are not.
    verified_total: of counts that are not verified, the sum is. Another sum stops a run.
    has_masks: an anomalous test image must have a mask.
    layout: what the root holds, for the message about a wrong one.
    needs_test: an empty test set is an error.
    drops_copies: training images may be byte-identical to test images; those are not trained on.
    segmentation: every image is anomalous and has a mask; there are no normal ones, and none are needed.
    video: samples are frames in order, their group is the clip.
    read_for_labels: patterns of files that labels come from and no sample holds (tables, empty masks).
    """

    name: str
    list_categories: Callable[[Path], list[str]]
    list_samples: Callable[[Path, str], list[Sample]]
    counts: Mapping[str, Counts]
    verified: bool = True
    verified_total: bool = False
    has_masks: bool = True
    layout: str = "<category>/train/good"
    needs_test: bool = True
    drops_copies: bool = False
    segmentation: bool = False
    video: bool = False
    read_for_labels: tuple[str, ...] = ()


def count(samples: Iterable[Sample]) -> Counts:
    """Return (train normal, test normal, test anomalous), then train anomalous and validation if any."""
    seen = Counter((s.split, s.label) for s in samples)
    found = seen["train", NORMAL], seen["test", NORMAL], seen["test", ANOMALOUS]
    extra = seen["train", ANOMALOUS]
    held_out = sum(number for (split, _), number in seen.items() if split == "validation")
    if held_out:
        return (*found, extra, held_out)
    return (*found, extra) if extra else found


def collect(
    spec: DatasetSpec,
    root: str | Path | None,
    category: str,
    *,
    warn: bool = True,
    incomplete: bool = False,
    others: Iterable[DatasetSpec] = (),
) -> list[Sample]:
    """List and check the samples of one category, or of all (`category` "all"), in a fixed order.

    What lies below the root and is not used is logged, with counts and the reason.

    incomplete: take what is there: files may be missing, and other counts are only logged.
    others: as in `find_root`.

    Raises:
        DatasetError: for a wrong root (a better one is suggested), an unknown category, an empty split, a
            missing mask, one file with two labels, or counts that differ from the published ones.
    """
    root = find_root(spec, root, others)
    known = spec.list_categories(root)
    renamed = category not in ("all", *known) and len(known) == 1 and not spec.counts
    if category not in ("all", *known) and not renamed:
        raise DatasetError(f"no category '{category}' in {root}; found: {', '.join(known)}")
    if renamed and warn:
        _log.info("%s has one category, %s: it is taken for %s", *map(printable, (root, known[0], category)))
    samples: list[Sample] = []
    for name in known if category == "all" or renamed else [category]:
        part = spec.list_samples(root, name)
        if not incomplete:
            check_files(spec, root, part)
        try:
            check_splits(spec, name, part)
        except DatasetError as error:
            raise DatasetError(with_unused(str(error), unused_samples(spec, root, name, part))) from error
        _check_counts(spec, root, name, count(part), warn=warn, incomplete=incomplete)
        check_labels(spec, name, part)
        if warn and count(part) != spec.counts.get(name):
            log_unused(folder_of(root, name), unused_samples(spec, root, name, part))
            _warn_of_missing_kinds(spec, name, count(part))
        if renamed:  # whatever the only one is called: groups, and so the split, stay those of the run
            part = [replace(s, category=category, group=category + s.group.removeprefix(name)) for s in part]
        samples += part
    beside = unused_beside(spec, root, known) if category == "all" else Unused()
    if beside.pictures or not spec.counts:  # a release has its readme and license
        log_unused(root, beside)
    return samples


def folder_of(root: Path, category: str) -> Path:
    """The folder of a category, or the root itself where a root is one category."""
    whole = (root / "train").is_dir() or not (root / category).is_dir()
    return root if whole else root / category


def unused_samples(spec: DatasetSpec, root: Path, category: str, samples: Iterable[Sample]) -> Unused:
    """What lies in the category's folder and in no sample."""
    used = [p for s in samples for p in (s.path, *s.masks, *s.earlier)]
    folder = folder_of(root, category)
    return unused_files(folder, [*used, *_read_for_labels(spec, folder)])


def unused_beside(spec: DatasetSpec, root: Path, categories: Sequence[str]) -> Unused:
    """What lies in the root and in none of the categories' folders."""
    folders = [folder_of(root, name) for name in categories]
    return unused_files(root, _read_for_labels(spec, root), apart=folders)


def _read_for_labels(spec: DatasetSpec, folder: Path) -> list[Path]:
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


def _warn_of_missing_kinds(spec: DatasetSpec, category: str, found: Counts) -> None:
    normal, anomalous = found[1:3]
    if (normal == 0) != (anomalous == 0) and not spec.segmentation:
        all_are, none_is = ("normal", "anomalous") if normal else ("anomalous", "normal")
        where = f"{spec.name}/{printable(category)}"
        _log.warning("%s: all test images are %s, none is %s: no AUROC", where, all_are, none_is)


def find_root(spec: DatasetSpec, root: str | Path | None, others: Iterable[DatasetSpec] = ()) -> Path:
    """The root as a path, if the dataset is there.

    others: datasets that a wrong root is compared with, so that its right name can be said.

    Raises:
        DatasetError: if it is not, naming a folder nearby where it is (up to two down; the one that has this
            train or test; of a published dataset one up and beside, too), or the dataset that is there.
    """
    if root is None:
        raise DatasetError(f"where is {spec.name}? Give its folder with --data-root DIR")
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DatasetError(f"--data-root {root} is no folder")
    here = set(spec.list_categories(root))
    # own categories are allowed, those that are published of another dataset are not
    if here and (not spec.counts or here & set(spec.counts) or not _published(others, root)):
        return root
    hints = []
    if other := _recognised(others, root):
        hints.append(f"it looks like {other}, so use --config configs/{other}.yaml (or --dataset {other})")
    # above and beside own folders there are others of their kind
    near = [d.parent for d in (root, root.parent) if d.name in ("train", "test")]
    near += [root.parent] if spec.counts else []
    for pattern in ("*/", "*/*/", *(["../*/"] if spec.counts else [])):
        near += sorted(root.glob(pattern))
    if better := next((d for d in near if _holds(spec, d)), None):
        hints.append(f"did you mean --data-root {shlex.quote(str(better.resolve()))}?")
    hint = " or ".join(hints) or "see docs/DATASETS.md"
    message = f"{root} does not look like {spec.name}: expected {spec.layout} in it; {hint}"
    raise DatasetError(message if hints else with_unused(message, unused_files(root, (), limit=MOST_LISTED)))


def _holds(spec: DatasetSpec, folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(spec.list_categories(folder))
    except OSError:  # not ours to read
        return False


def _published(specs: Iterable[DatasetSpec], root: Path) -> dict[str, int]:
    """Datasets that are in `root` by their published categories, and how many of those are there."""
    found = {spec.name: len(set(spec.list_categories(root)) & set(spec.counts)) for spec in specs}
    return {name: number for name, number in found.items() if number}


def _recognised(specs: Iterable[DatasetSpec], root: Path) -> str | None:
    """Name of the dataset that is in `root`; of several that with the most published categories."""
    specs = list(specs)
    if published := _published(specs, root):
        return max(published, key=lambda name: published[name])
    alike = [spec.name for spec in specs if spec.list_categories(root)]
    return ("folder" if "folder" in alike else alike[0]) if alike else None


def check_files(spec: DatasetSpec, root: Path, samples: Sequence[Sample]) -> None:
    """Stop if a file that was listed is missing, or is a Git LFS pointer in place of the file.

    Raises:
        DatasetError: naming the first one, how many there are, and the way out.
    """
    pointers = []
    for sample in samples:
        for path in (sample.path, *sample.masks):
            if path.is_symlink():  # a broken link is refused when it is read
                continue
            if not path.exists():
                problem = f"no mask for {sample.path}; expected {path} (or the same name)"
                if path == sample.path:
                    problem = f"{path} is missing"
                raise DatasetError(f"{problem}. {way_out(spec, root, sample.category)}")
            if is_lfs_pointer(path):
                pointers.append(path)
    if pointers:
        raise DatasetError(
            f"{len(pointers)} images and masks were not fetched, such as {pointers[0]}: {LFS_POINTER}"
        )


def way_out(spec: DatasetSpec, root: Path, category: str) -> str:
    """What to do about a copy of a dataset that is not complete."""
    frames = " --set data.time_step=0" if spec.video else ""
    ways = f"Complete the copy, or take what is there with --skip-unreadable{frames}"
    bases = (root / category, root)
    if spec.counts and any(list_images(base / "train" / "good") for base in bases):
        ways += ", or use --config configs/folder.yaml for a changed one"
    return ways


def check_splits(spec: DatasetSpec, category: str, samples: Sequence[Sample]) -> None:
    """Stop if there is nothing to train or to test on.

    Raises:
        DatasetError: naming what is empty.
    """
    train, *test = count(samples)[:3]
    where = f"{spec.name}/{category}"
    if spec.segmentation:
        for split in ("train", "test"):
            if not any(s.split == split for s in samples):
                raise DatasetError(f"{where}: no anomalous {split} image found; expected {spec.layout}")
        return
    if train == 0:
        raise DatasetError(f"{where}: no normal training image found; images end in {IMAGE_SUFFIXES}")
    if spec.needs_test and 0 in test:
        missing = "normal" if test[0] == 0 else "anomalous"
        raise DatasetError(f"{where}: no {missing} test image found; expected {spec.layout}, and a test set")


def _check_counts(
    spec: DatasetSpec, root: Path, category: str, found: Counts, *, warn: bool, incomplete: bool
) -> None:
    expected = spec.counts.get(category, found)
    if found == expected:
        return
    problem = f"{spec.name}/{category} has {in_words(found)}; published are {in_words(expected, short=True)}"
    if counts_are_wrong(spec, found, expected) and not incomplete:
        raise DatasetError(f"{problem}. {way_out(spec, root, category)}")
    if not warn:
        return
    if sum(found) == sum(expected):
        _log.warning("%s (another split of as many images, which may be in order)", problem)
    else:
        _log.warning("%s: this is not the official split, its numbers are not comparable", problem)


def counts_are_wrong(spec: DatasetSpec, found: Counts, expected: Counts) -> bool:
    """Whether counts differ in what is verified about them: all of them, their sum, or nothing."""
    return found != expected and (spec.verified or (spec.verified_total and sum(found) != sum(expected)))


def in_words(counts: Counts, *, short: bool = False) -> str:
    """`count`'s numbers as "5 training, 2 normal and 3 anomalous test images", or the numbers alone."""
    train, normal, anomalous, *more = counts
    extra, held_out = (*more, 0, 0)[:2]
    if held_out:  # segmentation
        numbers = f"{extra}, {held_out} and {anomalous}"
        return numbers if short else f"{extra} training, {held_out} validation and {anomalous} test images"
    first = f"{train} (and {extra} anomalous)" if extra else f"{train}"
    if short:
        return f"{first}, {normal} and {anomalous}"
    return f"{first} training, {normal} normal and {anomalous} anomalous test images"


def check_disjoint(train: Sequence[Sample], test: Sequence[Sample]) -> None:
    """Stop if a test image is byte-identical to a training image.

    Raises:
        DatasetError: naming the first such pair.
    """
    for ours, theirs in shared_images(train, test):
        raise DatasetError(
            f"{theirs.path} of the test set is the same file as {ours.path} of the training set; "
            "put both on one side"
        )


def check_labels(spec: DatasetSpec, category: str, samples: Sequence[Sample]) -> None:
    """Stop if one file (equal bytes) is both normal and anomalous; a warning where the dataset is published.

    Raises:
        DatasetError: naming the first such pair.
    """
    there = [s for s in samples if _has_bytes(s.path)]  # decoding tells of the others
    pairs = shared_images(*([s for s in there if s.label == label] for label in (NORMAL, ANOMALOUS)))
    if not pairs:
        return
    normal, anomalous = pairs[0]
    problem = (
        f"{printable(anomalous.path)} ({anomalous.defect}) is the same file as {printable(normal.path)} "
        f"({normal.defect}), so one image has two labels ({len(pairs)} such pairs)"
    )
    if category in spec.counts:
        _log.warning("%s", problem)
    else:
        raise DatasetError(f"{problem}; remove the wrong one of each pair")


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


def first_copies(paths: Iterable[Path]) -> dict[Path, Path]:
    """Each path to the first path whose file has the same bytes; to itself where there is none before it.

    Only files of equal size are opened, and only those are read whole that agree in the middle, too.

    Raises:
        OSError: if a file cannot be read.
    """
    first = {path: path for path in paths}
    groups = [list(first)]
    for key in (_size, _middle, _digest):
        groups = [same for group in groups for same in _by(key, group) if len(same) > 1]
    for group in groups:
        first |= dict.fromkeys(group, group[0])
    return first


def _by(key: Callable[[Path], object], paths: Sequence[Path]) -> Iterable[list[Path]]:
    found: dict[object, list[Path]] = {}
    for path in paths:
        found.setdefault(key(path), []).append(path)
    return found.values()


def _has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0 and os.access(path, os.R_OK)


def _size(path: Path) -> int:
    return path.stat().st_size


def _middle(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(_size(path) // 2)
        return file.read(4096)


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def tied_groups(samples: Sequence[Sample]) -> dict[str, str]:
    """Each group to the one that stands for all it is tied to: groups that hold a byte-identical image.

    A group without copies elsewhere stands for itself. The order of the samples does not matter.
    """
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
    """Split normals into kept and held-out parts, whole groups together, the same for a seed in any order.

    Groups that share a byte-identical image count as one. The held-out part is the smallest number of groups
    that reaches `fraction` of the samples, in each category; at least one sample of each category is kept.
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
