"""Image files in and below a folder: which are listed, and what is not used, with counts and the reason."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from utils.files import printable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff")
# .ipynb_checkpoints, @eaDir, $RECYCLE.BIN, __MACOSX: not the user's images
HIDDEN = (".", "@", "$", "__")
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jxl", ".dng", ".raw", ".dcm")  # beside Pillow's
LFS_POINTER = "a Git LFS pointer stands in place of the file; fetch the files with git lfs pull"
MASK_FOLDERS = {"groundtruth", "gt", "mask", "masks", "label", "labels", "annotation", "annotations"}
NORMAL_NAMES = {
    "good", "ok", "normal", "pass", "passed", "io", "gut", "nodefect", "nodefects", "nondefective",
    "defectfree", "faultfree", "anomalyfree", "healthy", "negative",
}  # fmt: skip
RESULTS = ("heatmaps.png", "clips.png", "heatmaps", "maps", "masks")  # beside a scores.csv
SHOWN = 4  # folders or endings that are named; the others are counted


def is_hidden(name: str) -> bool:
    """Files and folders of such a name are left alone everywhere."""
    return name.startswith(HIDDEN)


def letters(name: str) -> str:
    """The name's letters, in one case: Ground_Truth as groundtruth."""
    return "".join(c for c in name.casefold() if c.isalpha())


def is_image(path: Path) -> bool:
    """By its name; a broken link is one, too: it must not be left out in silence."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.name) and not path.is_dir()


def subfolders(folder: Path) -> list[Path]:
    """Folders directly in `folder`, sorted by name; none if it is no folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if not is_hidden(p.name) and p.is_dir())


def list_images(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name; other files (Thumbs.db, readme.txt) are left out."""
    return sorted(p for p in folder.iterdir() if is_image(p)) if folder.is_dir() else []


def find_images(where: Path) -> list[Path]:
    """The file `where`, or the image files in and below that folder, sorted; none if nothing is there."""
    if not where.is_dir():
        return [where] if where.exists() or where.is_symlink() else []  # a broken link is told of, later
    return sorted(p for p in walk(where) if is_image(p))


def walk(where: Path, apart: Iterable[Path] = ()) -> Iterator[Path]:
    """Files in and below a folder, and what is hidden there (which is not entered).

    Links to folders are followed, each folder is read once. Those of `apart` and results are left out.
    """
    seen, todo = {p.resolve() for p in apart}, [where]
    while todo:
        here = todo.pop()
        if here.resolve() in seen:  # a link that leads back
            continue
        seen.add(here.resolve())
        entries = sorted(here.iterdir())
        if here / "scores.csv" in entries:  # of a run, of test.py or predict.py: no images of the user
            entries = [p for p in entries if p.name not in RESULTS]
        folders = {p for p in entries if p.is_dir() and not is_hidden(p.name)}
        yield from (p for p in entries if p not in folders)
        todo += sorted(folders, key=lambda p: (p.is_symlink(), p), reverse=True)


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """A key that sorts names by the numbers in them: frame2 before frame10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


@dataclass(frozen=True)
class Unused:
    """Phrases about files that are not used. pictures: about those that a user may miss."""

    pictures: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join((*self.pictures, *self.others))


def unused_files(
    root: Path, used: Iterable[Path], *, apart: Iterable[Path] = (), limit: int | None = None
) -> Unused:
    """What is below `root` and not in `used`, counted by reason; at most `limit` files are looked at."""
    known = set(used)
    left = [p for p in islice(walk(root, apart), limit) if p not in known]
    hidden = [p for p in left if is_hidden(p.name) and (p.is_dir() or p.suffix.lower() in IMAGE_SUFFIXES)]
    left = [p for p in left if not is_hidden(p.name)]
    places = Counter(p.parent.relative_to(root).as_posix() for p in left if is_image(p))
    masks = Counter({place: n for place, n in places.items() if letters(place.split("/")[0]) in MASK_FOLDERS})
    normal = {place: n for place, n in masks.items() if letters(place.split("/")[-1]) in NORMAL_NAMES}
    endings = Counter(p.suffix.lower() for p in left if not is_image(p))
    Image.init()  # fills Pillow's table of endings
    pictures = Counter({e: n for e, n in endings.items() if e in Image.EXTENSION or e in OTHER_PICTURES})
    others = [f"{n} masks of normal images in {printable(place)}" for place, n in normal.items()]
    others += _phrase("other files", "ending in", endings - pictures)
    if hidden:
        names = ", ".join(p.relative_to(root).as_posix() for p in hidden[:SHOWN])
        others.append(f"{len(hidden)} names that begin with {' '.join(HIDDEN)} ({printable(names)})")
    unmatched = masks - Counter(normal)
    parts = [f"{n} files in {printable(place)}" for place, n in [*unmatched.items()][:SHOWN]]
    if rest := [*unmatched.values()][SHOWN:]:
        parts.append(f"{sum(rest)} files in {len(rest)} more folders of masks")
    rule = " (the mask of 000.png is 000.png or 000_mask.png)"
    found = [f"{part} match no image{rule * (part == parts[-1])}" for part in parts]
    found += _phrase("images where none are looked for", "in", places - masks)
    read = f" (read are {' '.join(IMAGE_SUFFIXES)})"
    found += [text + read for text in _phrase("files of other kinds", "ending in", pictures)]
    return Unused(tuple(found), tuple(others))


def _phrase(what: str, where: str, counts: Counter[str]) -> list[str]:
    """One phrase such as "12 images: 8 in test, 4 in train", the most frequent first; none without counts."""
    common = counts.most_common()
    parts = [f"{number} {where} {printable(name) or 'nothing'}" for name, number in common[:SHOWN]]
    if rest := sum(number for _, number in common[SHOWN:]):
        parts.append(f"{rest} {where} others")
    return [f"{sum(counts.values())} {what}: {', '.join(parts)}"] if parts else []


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is the short text that Git LFS leaves in place of a file that was not fetched."""
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")
