"""COCO json, labelme json and YOLO segmentation text, read into one kind of labelled regions."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from datasets.files import is_hidden
from utils.errors import DatasetError
from utils.yaml_io import read_yaml

log = logging.getLogger("uninet")

Ring = np.ndarray  # (N, 2), x and y in pixels
T = TypeVar("T")


class LabelError(ValueError):
    """A label that cannot be drawn, with the reason."""


# what a label of the wrong form raises where it is read
DAMAGED = (LabelError, AttributeError, TypeError, ValueError, KeyError, IndexError, OverflowError, cv2.error)


@dataclass
class Shape:
    """One labelled region: rings in pixels, or a bitmap (H, W) with its offset (x, y)."""

    label: str
    rings: list[Ring] = field(default_factory=list)
    bitmap: np.ndarray | None = None
    runs: tuple[list[int], int, int] | None = None  # RLE of a whole image: run lengths, height, width
    offset: tuple[int, int] = (0, 0)
    relative: bool = False  # the rings are in shares of the image's sides (YOLO)


@dataclass
class Labelled:
    """What is known of one image: the name as its labels give it, its shapes, the size they are for."""

    name: str
    source: Path
    shapes: list[Shape] = field(default_factory=list)
    size: tuple[int, int] | None = None  # width, height
    problems: list[str] = field(default_factory=list)


def read_labels(
    where: Path, kind: str = "auto", names: str | None = None, *, boxes: bool = False
) -> list[Labelled]:
    """All labels of a file or a folder, in the order of their files.

    kind: auto | coco | labelme | yolo. names: class names of YOLO, with commas. boxes: fill boxes without an
    outline, which are problems of their image otherwise.

    Raises:
        DatasetError: for a folder or a file that holds no labels of the format.
    """
    if not where.exists():
        raise DatasetError(f"--labels {where} is missing")
    files = [where] if where.is_file() else label_files(where)
    trees = {p: read_json(p) for p in files if p.suffix.lower() == ".json"}
    if kind == "auto":
        found = {
            "coco" if "annotations" in t else "labelme"
            for t in trees.values()
            if {"annotations", "shapes"} & t.keys()
        }
        found |= {"yolo"} if not found and any(p.suffix.lower() == ".txt" for p in files) else set()
        if len(found) != 1:
            there = " and ".join(sorted(found)) or "none of COCO json, labelme json and YOLO text"
            raise DatasetError(f"--labels {where} holds {there}; name one kind with --format")
        (kind,) = found
    if kind == "yolo":
        known = class_names(where, names)
        texts = [p for p in files if p.suffix.lower() == ".txt" and p.name.lower() != "classes.txt"]
        return [yolo(p, where, known, boxes=boxes) for p in texts]
    chosen = {p: t for p, t in trees.items() if ("annotations" if kind == "coco" else "shapes") in t}
    if not chosen:
        raise DatasetError(f"--labels {where} holds no {kind} json")
    if kind == "labelme":
        return [labelme(p, t) for p, t in chosen.items()]
    return [one for p, t in chosen.items() for one in coco(p, t, boxes=boxes)]


def label_files(folder: Path) -> list[Path]:
    """All json and text files below a folder but hidden ones: macOS puts its own data into ._a.json."""
    inside = ((p, p.relative_to(folder).parts) for p in folder.rglob("*"))
    seen = (p for p, parts in inside if not any(map(is_hidden, parts)))
    return sorted(p for p in seen if p.suffix.lower() in (".json", ".txt") and p.is_file())


def why(error: Exception) -> str:
    """What is wrong with a label, for people."""
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def read_json(path: Path) -> dict:
    """The object in a json file.

    Raises:
        DatasetError: if it is damaged or holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is no json file: {error}") from error
    return tree if isinstance(tree, dict) else {}


def coco(path: Path, tree: dict, *, boxes: bool) -> list[Labelled]:
    """The images of a COCO file with their annotations."""
    try:
        kinds = by_id("categories", [(c["id"], str(c["name"])) for c in tree.get("categories") or []])
        listed = [(i["id"], Labelled(str(i["file_name"]), path, size=coco_size(i))) for i in tree["images"]]
        found = by_id("images", listed)
    except LabelError as error:
        raise DatasetError(f"{path} cannot be used: {error}") from error
    except DAMAGED as error:
        raise DatasetError(f"{path} is no COCO file, by its images or categories: {why(error)}") from error
    annotations = tree["annotations"]
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise DatasetError(f"{path} is no COCO file: its annotations are no list of objects")
    lost = []
    for number, annotation in enumerate(annotations):
        image = found.get(str(annotation.get("image_id")))
        if image is None:
            lost.append(number)
            continue
        try:
            image.shapes.append(coco_shape(annotation, coco_label(annotation, kinds), boxes=boxes))
        except DAMAGED as error:
            image.problems.append(f"annotation {number}: {why(error)}")
    if lost:
        first = annotations[lost[0]].get("image_id")
        many = f"{len(lost)} annotations are of images that are not listed"
        log.warning("%s: %s, as annotation %d of image_id %r", path, many, lost[0], first)
    return list(found.values())


def by_id(what: str, pairs: Sequence[tuple[object, T]]) -> dict[str, T]:
    """Entries by their id as text, as some tools write 1 and some "1"; a LabelError if two have one id."""
    found: dict[str, T] = {}
    for key, entry in pairs:
        if found.setdefault(str(key), entry) != entry:
            raise LabelError(f"two of its {what} have the id {key}; number them apart")
    return found


def coco_size(image: dict) -> tuple[int, int] | None:
    """Width and height, where both are given: some tools write null or 0."""
    size = int(image.get("width") or 0), int(image.get("height") or 0)
    return size if all(size) else None


def coco_label(annotation: dict, kinds: Mapping[str, str]) -> str:
    """The name of an annotation's category; its number in a file without categories."""
    key = annotation.get("category_id")
    if kinds and str(key) not in kinds:
        raise LabelError(f"its category_id {key} is not among the categories")
    return kinds.get(str(key), "defect" if key is None else str(key))


def coco_shape(annotation: dict, label: str, *, boxes: bool) -> Shape:
    """The region of one annotation: polygons, RLE, or its box with --boxes."""
    region = annotation.get("segmentation")
    if isinstance(region, dict):
        height, width = map(int, region["size"])
        counts = region["counts"]
        runs = [int(n) for n in counts] if isinstance(counts, list) else rle_counts(str(counts))
        return Shape(label, runs=(runs, height, width))
    if isinstance(region, list) and region:
        return Shape(label, [ring(flat) for flat in region])
    if boxes and len(annotation.get("bbox", ())) == 4:
        x, y, w, h = map(float, annotation["bbox"])
        return Shape(label, [box_ring(x, y, x + w, y + h)])
    raise LabelError("no outline, only a box (--boxes fills it)" if "bbox" in annotation else "no outline")


def rle_counts(text: str) -> list[int]:
    """The run lengths of COCO's compressed RLE: 5 bits per character, from the third on as differences."""
    counts: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            if position == len(text):
                raise LabelError("its RLE is cut off")
            character = ord(text[position]) - 48
            if not 0 <= character < 64:
                raise LabelError(f"its RLE has the character {text[position]!r}")
            value |= (character & 0x1F) << shift
            more, shift, position = bool(character & 0x20), shift + 5, position + 1
            if not more and character & 0x10:
                value |= -1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


def rle_bitmap(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """Runs of zeros and ones, down the columns, as a bitmap (H, W)."""
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise LabelError(f"its RLE covers {sum(counts)} pixels of {width}x{height}")
    return np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8).reshape(width, height).T


def labelme(path: Path, tree: dict) -> Labelled:
    """The image of a labelme file with its shapes."""
    name = str(tree.get("imagePath") or path.with_suffix("").name).replace("\\", "/")
    width, height = tree.get("imageWidth"), tree.get("imageHeight")
    size = (width, height) if isinstance(width, int) and isinstance(height, int) else None
    image = Labelled(name, path, size=size)
    if not isinstance(tree["shapes"], list):
        raise DatasetError(f"{path} is no labelme file: its shapes are no list")
    for number, shape in enumerate(tree["shapes"]):
        try:
            image.shapes.append(labelme_shape(shape))
        except DAMAGED as error:
            image.problems.append(f"shape {number}: {why(error)}")
    return image


def labelme_shape(shape: dict) -> Shape:
    """The region of one shape: polygon, rectangle, circle or mask."""
    label, kind, points = str(shape["label"] or ""), shape.get("shape_type") or "polygon", shape["points"]
    if kind == "mask":
        data = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
        bitmap = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        if bitmap is None:
            raise LabelError("its mask is no picture")
        x, y = (round(float(v)) for v in points[0])
        return Shape(label, bitmap=(bitmap > 0).astype(np.uint8), offset=(x, y))
    corners = ring([float(v) for point in points for v in point], least=2)
    if kind == "rectangle" and len(corners) == 2:
        (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
        return Shape(label, [box_ring(x0, y0, x1, y1)])
    if kind == "circle":
        radius = float(np.linalg.norm(corners[1] - corners[0]))
        angles = np.linspace(0, 2 * np.pi, 128, endpoint=False)
        return Shape(label, [corners[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)])
    if kind in ("polygon", "rectangle", "rotation") and len(corners) > 2:  # two are X-AnyLabeling's
        return Shape(label, [corners])
    raise LabelError(f"a {kind} with {len(corners)} points has no area")


def yolo(path: Path, root: Path, names: Sequence[str], *, boxes: bool) -> Labelled:
    """The image of a YOLO text file: per line a class and the corners x, y in shares of the sides."""
    image = Labelled(str(path.relative_to(root).with_suffix("")) if root.is_dir() else path.stem, path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            first, *rest = line.split()
            if not first.lstrip("-").isdecimal():
                raise LabelError(f"its class {first[:20]!r} is no whole number")
            index, values = int(first), [float(v) for v in rest]
            if names and not 0 <= index < len(names):
                raise LabelError(f"class {index} has no name; there are {len(names)} (--names)")
            label = names[index] if names else str(index)
            if len(values) == 4:
                if not boxes:
                    raise LabelError("a box, no outline (--boxes fills it)")
                x, y, w, h = values
                shape = Shape(label, [box_ring(x - w / 2, y - h / 2, x + w / 2, y + h / 2)], relative=True)
            else:
                shape = Shape(label, [ring(values)], relative=True)
            if not all(-0.01 <= v <= 1.01 for v in values):
                raise LabelError("values outside of 0 to 1")
            image.shapes.append(shape)
        except DAMAGED as error:
            image.problems.append(f"line {number}: {error}")
    return image


def class_names(where: Path, names: str | None) -> list[str]:
    """The class names of YOLO's numbers: given ones, or of data.yaml or classes.txt near the labels."""
    if names:
        return [name.strip() for name in names.split(",")]
    folder = (where if where.is_dir() else where.parent).resolve()
    for near in (folder, *folder.parents[:3]):
        if (near / "data.yaml").is_file():
            found = read_yaml(near / "data.yaml").get("names")
            if isinstance(found, dict) and all(isinstance(key, int) for key in found):
                return [str(found.get(i, i)) for i in range(1 + max(found, default=-1))]
            if isinstance(found, list):
                return [str(name) for name in found]
            if found is not None:
                where_found = f"names in {near / 'data.yaml'}"
                raise DatasetError(f"{where_found} are neither a list nor names by their numbers")
        if (near / "classes.txt").is_file():
            text = (near / "classes.txt").read_text(encoding="utf-8-sig")
            return [line.strip() for line in text.rstrip().splitlines()]
    log.warning("no class names (--names, data.yaml, classes.txt): kinds are named by their numbers")
    return []


def ring(flat: Sequence[float], least: int = 3) -> Ring:
    """Corners (N, 2) from x, y, x, y, ..."""
    values = np.asarray(flat, dtype=np.float64)
    if values.ndim != 1 or len(values) % 2 or len(values) < 2 * least or not (abs(values) < 1e9).all():
        raise LabelError(f"an outline needs {least} or more pairs of finite numbers")
    return values.reshape(-1, 2)


def box_ring(x0: float, y0: float, x1: float, y1: float) -> Ring:
    """The corners of a box."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)
