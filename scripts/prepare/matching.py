"""Which labels are of which image, and the names under which images are written."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from datasets.files import IMAGE_SUFFIXES
from scripts.prepare.labels import Labelled


def match(
    labels: Iterable[Labelled], images: Sequence[Path], root: Path
) -> tuple[dict[Path, Labelled], list[tuple[Labelled, str]]]:
    """Each image's labels, those of several files united, and those that have no image, with the reason.

    An image whose labels are in doubt has a problem: several images have its labels' name, or labels of two
    names fit it and neither is its whole path.
    """
    place = places(images, root)
    placed = sorted(((one, *place(one)) for one in labels), key=lambda found: not found[2])
    found: dict[Path, Labelled] = {}
    doubtful: dict[Path, Labelled] = {}
    without: list[tuple[Labelled, str]] = []
    whole: set[Path] = set()
    for one, hits, is_whole in placed:
        other = found.get(hits[0]) if len(hits) == 1 else None
        if not hits or (other and hits[0] in whole and not same(one, other)):
            without.append((one, "no such image below --images"))
        elif len(hits) > 1:
            without.append((one, f"{len(hits)} images end in this name"))
            problem = f"labels of {one.name} may be of it, as {len(hits)} images end in that name"
            if one.shapes or one.problems:
                doubtful |= {p: Labelled(one.name, one.source, problems=[problem]) for p in hits}
        elif other:
            unite(other, one)
        else:
            found[hits[0]] = one
            whole |= {hits[0]} if is_whole else set()
    return doubtful | found, without


def places(images: Sequence[Path], root: Path) -> Callable[[Labelled], tuple[Sequence[Path], bool]]:
    """A function that gives the images which labels may be of, and whether their name is the whole path.

    A name is looked for as a path from the label file's folder, from the images' folder, then by its end: the
    image whose path ends in it, or does so without its suffix; best in the same case.
    """
    by_end: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        for end in ends(path.relative_to(root).parts):
            by_end[end].append(path)
            by_end[without_suffix(end)].append(path)
    known = set(images)

    def place(one: Labelled) -> tuple[Sequence[Path], bool]:
        with suppress(ValueError, OSError):  # a null byte, or a name that no system takes
            for base in (one.source.parent, root):
                if (path := (base / one.name.replace("\\", "/")).resolve()) in known:
                    return [path], True
        named = ends(parts_of(one.name))
        for end in (*named, *map(without_suffix, named)):
            if hits := by_end.get(end, []):
                stem = without_suffix(named[0])
                whole = [p for p in hits if without_suffix(plain(p.relative_to(root))) == stem]
                spelled = [p for p in hits if one.name.endswith((p.name, p.stem))]
                return whole or spelled or hits, bool(whole)
        return [], False

    return place


def parts_of(name: str) -> list[str]:
    """A path of any system as its folders and its file."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def ends(parts: Sequence[str]) -> list[str]:
    """The ends of a path, the longest first (a/b/c, b/c, c), as other systems may write them."""
    return ["/".join(map(plain, parts[i:])) for i in range(len(parts))]


def plain(name: object) -> str:
    """A name in one case and one form of its accents, which differ between systems."""
    return unicodedata.normalize("NFC", str(name)).casefold()


def without_suffix(name: str) -> str:
    """The name without the suffix of an image, if it has one."""
    return next((name.removesuffix(s) for s in IMAGE_SUFFIXES if name.endswith(s)), name)


def same(one: Labelled, other: Labelled) -> bool:
    """Whether both names may be of one image: one is an end of the other."""
    first, second = (ends(parts_of(labels.name)) for labels in (one, other))
    return first[0] in second or second[0] in first


def unite(one: Labelled, other: Labelled) -> None:
    """Add labels of the same image; a problem if their names or sizes are of two images."""
    if not same(one, other):
        one.problems.append(f"labels of {one.name} and of {other.name} both fit it")
    if None not in (one.size, other.size) and one.size != other.size:
        one.problems.append("its labels are for two sizes")
    one.size = one.size or other.size
    one.shapes += other.shapes
    one.problems += other.problems


def output_names(images: Sequence[Path], root: Path) -> dict[Path, str]:
    """A name without suffix for each image: its own, or where several would share it its path with `_`."""
    inside = {p: p.relative_to(root) for p in images}
    stems = Counter(p.stem.casefold() for p in images)
    joined = {p: "_".join(i.with_suffix("").parts) for p, i in inside.items()}
    names = {p: p.stem if stems[p.stem.casefold()] == 1 else joined[p] for p in images}
    again = Counter(name.casefold() for name in names.values())
    return {p: n if again[n.casefold()] == 1 else f"{joined[p]}_{p.suffix[1:]}" for p, n in names.items()}
