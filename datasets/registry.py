"""The datasets by name, and their samples below a root, listed and checked."""

import logging
import shlex
from dataclasses import replace
from pathlib import Path

from datasets.files import Unused, unused_files
from datasets.industrial import AD2, BTAD, DEMO, FOLDER, KOLEKTOR, LOCO, MVTEC, MVTEC3D, VAD, VISA
from datasets.medical import APTOS, CLINICDB, COLONDB, ISIC2018, KVASIR, OCT2017
from datasets.samples import (
    DatasetSpec,
    Sample,
    check_counts,
    check_files,
    check_splits,
    count,
    folder_of,
    log_unused,
    unused_beside,
    unused_samples,
    with_unused,
)
from datasets.splits import check_labels
from datasets.video import PED2
from utils.errors import DatasetError
from utils.files import printable

INDUSTRIAL = (MVTEC, BTAD, VISA, MVTEC3D, VAD, KOLEKTOR, AD2, LOCO)
MEDICAL = (APTOS, OCT2017, ISIC2018, KVASIR, CLINICDB, COLONDB)
SPECS = {spec.name: spec for spec in (*INDUSTRIAL, *MEDICAL, PED2, FOLDER, DEMO)}
MOST_LISTED = 10_000  # files below a wrong root, which may be a whole disk
_log = logging.getLogger("uninet")


def spec_of(name: str) -> DatasetSpec:
    """The dataset of that name. Raises DatasetError for an unknown one."""
    if name not in SPECS:
        raise DatasetError(f"unknown dataset '{name}'; choose one of {', '.join(SPECS)}")
    return SPECS[name]


def find_root(spec: DatasetSpec, root: str | Path | None) -> Path:
    """The root as a path, if the dataset is there.

    Raises DatasetError if it is not, naming the dataset that is there, or a folder nearby where this one is:
    up to two down, the one that has this train or test, or beside a published dataset.
    """
    if root is None:
        raise DatasetError(f"where is {spec.name}? Give its folder with --data-root DIR")
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DatasetError(f"--data-root {root} is no folder")
    here = set(spec.list_categories(root))
    if here and (not spec.counts or here & set(spec.counts)):
        return root
    found = {name: other.list_categories(root) for name, other in SPECS.items()}
    published = {name: len(set(names) & set(SPECS[name].counts)) for name, names in found.items()}
    if here and not any(published.values()):  # own categories are allowed, another dataset's are not
        return root
    hints = []
    if any(found.values()):
        alike = next(name for name in ("folder", *found) if found[name])
        alike = max(published, key=published.__getitem__) if any(published.values()) else alike
        hints = [f"it looks like {alike}, so use --dataset {alike}"]
    near = [d.parent for d in (root, root.parent) if d.name in ("train", "test")]
    published_here = bool(spec.counts)  # above and beside own folders there are others of their kind
    near += [root.parent] * published_here
    for pattern in ("*/", "*/*/", *["../*/"] * published_here):
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


def collect(
    spec: DatasetSpec, root: str | Path | None, category: str, *, warn: bool = True, incomplete: bool = False
) -> list[Sample]:
    """List and check the samples of one category, or of all (`category` "all"), in a fixed order.

    What lies below the root and is not used is logged, with counts and the reason.
    incomplete: take what is there. Files may be missing, and other counts are only logged.
    Raises DatasetError for a wrong root, an unknown category, an empty split, a missing mask, one file with
    two labels, or counts that differ from the published ones.
    """
    root = find_root(spec, root)
    known = spec.list_categories(root)
    if "all" in known and len(known) > 1:
        raise DatasetError(f"{root} has a category named all, which stands for all; give it another name")
    # the only category of own images has any name, and groups, and so the split, stay those of the run
    renamed = category not in ("all", *known) and len(known) == 1 and not spec.counts
    if category not in ("all", *known) and not renamed:
        raise DatasetError(f"no category '{category}' in {root}; found: {', '.join(known)}")
    if renamed and warn:
        names = printable(root), printable(known[0]), printable(category)
        _log.info("%s has one category, %s: it is taken for %s", *names)
    samples: list[Sample] = []
    for name in known if category == "all" or renamed else [category]:
        part = _collect_category(spec, root, name, warn=warn, incomplete=incomplete)
        if renamed:
            part = [replace(s, category=category, group=category + s.group.removeprefix(name)) for s in part]
        samples += part
    beside = unused_beside(spec, root, known) if category == "all" else Unused()
    if beside.pictures or not spec.counts:  # a release has its readme and license
        log_unused(root, beside)
    return samples


def _collect_category(
    spec: DatasetSpec, root: Path, name: str, *, warn: bool, incomplete: bool
) -> list[Sample]:
    samples = spec.list_samples(root, name)
    if not incomplete:
        check_files(spec, root, samples)
    try:
        check_splits(spec, name, samples)
    except DatasetError as error:
        raise DatasetError(with_unused(str(error), unused_samples(spec, root, name, samples))) from error
    counts = count(samples)
    problem = check_counts(spec, root, name, counts, incomplete=incomplete)
    check_labels(spec, name, samples)
    if not warn or counts == spec.counts.get(name):
        return samples
    if problem:
        _log.warning("%s", problem)
    log_unused(folder_of(root, name), unused_samples(spec, root, name, samples))
    normal, anomalous = counts[1:3]
    if (normal == 0) != (anomalous == 0) and not spec.segmentation:
        all_are, none_is = ("normal", "anomalous") if normal else ("anomalous", "normal")
        where = f"{spec.name}/{printable(name)}"
        _log.warning("%s: all test images are %s, none is %s: no AUROC", where, all_are, none_is)
    return samples
