"""Turn COCO json, labelme json or YOLO segmentation text into mask PNGs in the layout of own folders.

python -m scripts.prepare.masks --labels FILE_OR_DIR --images DIR --output PART

Images with labelled defects are copied to PART/test/<kind>, their masks go to PART/ground_truth/<kind>.
A kind is the label; an image with several kinds goes to `a+b`. Images without a defect go to PART/test/good
(--good train|skip). PART/masks.csv says of each image what was written, or why it was skipped.

Rings of one annotation are united; a ring that lies inside another and turns the other way is a hole, and so
is a shape with a label that --hole names. RLE of COCO is read in both its forms.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from skimage.draw import polygon2mask

from datasets.files import MASK_FOLDERS, NORMAL_NAMES, find_images, letters
from datasets.images import read_image
from datasets.layouts import MASK_ENDING
from scripts.prepare.labels import DAMAGED, LabelError, Labelled, Ring, Shape, read_labels, rle_bitmap, why
from scripts.prepare.matching import match, output_names
from scripts.text import csv_text
from utils.cli import new_parser, print_result, run_command, user_path
from utils.errors import DatasetError
from utils.files import write_atomically, write_text

TABLE = "masks.csv"
COLUMNS = ("image", "labels", "kind", "shapes", "pixels", "written", "skipped")
SAFE = "-_.+ "  # beside letters and digits, in names that are written
LONGEST = 200  # bytes of a folder's name; systems allow 255


def main(argv: Sequence[str]) -> None:
    """Read all labels, then write the masks, the images and the table."""
    args = parse_arguments(argv)
    images = [p.resolve() for p in find_images(args.images)]
    if not images:
        raise DatasetError(f"no image below {args.images}")
    found = read_labels(args.labels, args.format, args.names, boxes=args.boxes)
    labels, unmatched = match(found, images, args.images.resolve())
    check_labels(found, labels.values(), args)
    clear(args.output, overwrite=args.overwrite, inputs=[args.images, args.labels])
    rows = [row(one.name, one, skipped=reason) for one, reason in unmatched]
    names = output_names(images, args.images.resolve())
    for path in images:
        rows.append(convert(path, names[path], labels.get(path), args))
    table = [list(COLUMNS), *([str(row[column]) for column in COLUMNS] for row in rows)]
    write_text(args.output / TABLE, csv_text(table))
    print_result(summary(rows, args.output))
    if not any(row["written"] for row in rows):
        raise DatasetError(f"no image was written; {args.output / TABLE} says why")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--labels",
        type=user_path,
        required=True,
        metavar="FILE_OR_DIR",
        help="a COCO json, or the folder of labelme json or YOLO text files",
    )
    add("--images", type=user_path, required=True, metavar="DIR", help="the images, searched below, too")
    add(
        "--output",
        type=user_path,
        required=True,
        metavar="PART",
        help="the folder of the part, as train.py reads it",
    )
    add(
        "--format",
        choices=("auto", "coco", "labelme", "yolo"),
        default="auto",
        help="of the labels; auto: by their content",
    )
    add(
        "--names",
        metavar="A,B,...",
        help="class names of YOLO (default: data.yaml or classes.txt near the labels)",
    )
    add(
        "--hole",
        action="append",
        default=[],
        metavar="LABEL",
        help="shapes of this label are cut out of the others; may be repeated",
    )
    add(
        "--boxes",
        action="store_true",
        help="fill boxes where no outline is given; without it they are skipped",
    )
    add("--good", choices=("test", "train", "skip"), default="test", help="where images without a defect go")
    add("--overwrite", action="store_true", help="replace what an earlier call wrote to --output")
    return parser.parse_args(argv)


def check_labels(found: Sequence[Labelled], used: Iterable[Labelled], args: argparse.Namespace) -> None:
    """Stop where labels are lost that make images count as good, or holes as defects.

    Raises:
        DatasetError: if no labelled image is there, or no shape has a label of --hole.
    """
    drawn = [one.name for one in found if one.shapes or one.problems]
    if drawn and not any(one.shapes or one.problems for one in used):
        labelled = f"{len(drawn)} labelled images, as {drawn[0][:100]!r}"
        raise DatasetError(f"none of the {labelled}, is below {args.images}")
    known = sorted({shape.label for one in found for shape in one.shapes})
    if wrong := [label for label in args.hole if label not in known]:
        raise DatasetError(
            f"no shape has the label {wrong[0]!r} of --hole; there are {', '.join(known)[:200]}"
        )


# --- drawing ------------------------------------------------------------------------------------------------


def draw(shapes: Iterable[Shape], width: int, height: int) -> np.ndarray:
    """The union of shapes as a mask (H, W) of 0 and 255. Raises LabelError if one of them covers no pixel."""
    mask = np.zeros((height, width), np.uint8)
    for shape in shapes:
        part = bitmap_of(shape, width, height)
        if not part.any():  # a part of the defects would count as normal
            raise LabelError(f"a shape of '{shape.label}' covers no pixel")
        mask |= part
    return mask


def bitmap_of(shape: Shape, width: int, height: int) -> np.ndarray:
    """One shape as a mask (H, W) of 0 and 255."""
    mask = np.zeros((height, width), np.uint8)
    if shape.runs is not None:
        counts, *size = shape.runs
        if size != [height, width]:
            raise LabelError(f"its RLE is for {size[1]}x{size[0]}, the image has {width}x{height}")
        return 255 * rle_bitmap(counts, height, width)
    if shape.bitmap is not None:
        x, y = shape.offset
        part = shape.bitmap[max(0, -y) : max(0, height - y), max(0, -x) : max(0, width - x)]
        mask[max(0, y) : max(0, y) + part.shape[0], max(0, x) : max(0, x) + part.shape[1]] = 255 * part
        return mask
    factor = (width, height) if shape.relative else (1, 1)
    rings = [r * factor for r in shape.rings]
    filled = [fill(r, width, height) for r in rings]
    holes = [i for i, r in enumerate(rings) if is_hole(i, rings, filled, turn(r))]
    for i, part in enumerate(filled):
        mask |= 0 if i in holes else part
    for i in holes:
        mask &= ~filled[i]
    return mask


def fill(corners: Ring, width: int, height: int) -> np.ndarray:
    """The pixels whose centres are in a ring, by the even-odd rule: a bridge to an inner ring leaves a hole.

    Labels have their origin at the corner of the first pixel, pixel centres lie half a pixel further.
    """
    inside = polygon2mask((height, width), np.clip(corners, -1e6, 1e6)[:, ::-1] - 0.5)
    return 255 * inside.astype(np.uint8)


def turn(corners: Ring) -> float:
    """Twice the signed area: its sign says which way the ring turns."""
    x, y = corners.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def is_hole(i: int, rings: Sequence[Ring], filled: Sequence[np.ndarray], area: float) -> bool:
    """Whether ring i lies inside a larger ring of the same annotation that turns the other way."""
    return any(
        j != i
        and area * turn(other) < 0
        and abs(area) < abs(turn(other))
        and not (filled[i] & ~filled[j]).any()
        for j, other in enumerate(rings)
    )


# --- images and files ---------------------------------------------------------------------------------------


def safe(name: str) -> str:
    """A label as the name of a folder that is a kind of defect."""
    text = "".join(c if c.isalnum() or c in SAFE else "_" for c in name).strip(" .")
    text = re.sub("^__+", "_", text) or "defect"  # hidden otherwise
    return f"{text}_defect" if letters(text) in MASK_FOLDERS or MASK_ENDING.search(text) else text


def kind_of(shapes: Iterable[Shape]) -> str:
    """The kind of defect of these shapes. Raises LabelError if a label names none, or for a long name."""
    labels = sorted({safe(s.label) for s in shapes})
    if good := [label for label in labels if letters(label) in NORMAL_NAMES]:
        raise LabelError(f"the label '{good[0]}' names no defect")
    kind = "+".join(labels)
    if len(kind.encode()) > LONGEST:
        raise LabelError(f"its labels make a name of {len(kind.encode())} bytes, above {LONGEST}")
    return kind


def convert(path: Path, name: str, labels: Labelled | None, args: argparse.Namespace) -> dict[str, object]:
    """Write one image and its mask; give back its row of the table."""
    shown = str(path.relative_to(args.images.resolve()))
    if labels is not None and labels.problems:  # a part of its defects would count as normal
        return row(shown, labels, skipped="; ".join(labels.problems[:3]))
    shapes = [s for s in labels.shapes if s.label not in args.hole] if labels else []
    if labels is not None and labels.shapes and not shapes:
        return row(shown, labels, skipped=f"it has holes ({', '.join(args.hole)}) alone")
    if not shapes:
        if args.good == "skip":
            return row(shown, labels, skipped="no defect is labelled (--good skip)")
        target = f"{args.good}/good/{name}{path.suffix}"
        copy(path, args.output / target)
        return row(shown, labels, kind="good", written=target)
    assert labels is not None
    try:
        width, height = read_image(path).size
    except DatasetError as error:
        return row(shown, labels, skipped=str(error))
    if labels.size not in (None, (width, height)):
        their_width, their_height = labels.size or (0, 0)
        reason = f"its labels are for {their_width}x{their_height}, it has {width}x{height}"
        return row(shown, labels, skipped=reason)
    holes = [s for s in labels.shapes if s.label in args.hole]
    try:
        kind = kind_of(shapes)
        mask = draw(shapes, width, height) & ~draw(holes, width, height)
    except DAMAGED as error:
        return row(shown, labels, skipped=why(error))
    if not mask.any():
        return row(shown, labels, skipped="its holes leave no pixel")
    target = f"test/{kind}/{name}{path.suffix}"
    encoded = cv2.imencode(".png", mask)[1].tobytes()
    write_atomically(args.output / f"ground_truth/{kind}/{name}_mask.png", lambda file: file.write(encoded))
    copy(path, args.output / target)
    pixels = int((mask > 0).sum())
    return row(shown, labels, kind=kind, shapes=len(shapes), pixels=pixels, written=target)


def copy(path: Path, target: Path) -> None:
    """The image's bytes, in one step."""
    content = path.read_bytes()
    write_atomically(target, lambda file: file.write(content))


def row(image: str, labels: Labelled | None, **values: object) -> dict[str, object]:
    """A line of the table."""
    source = labels.source.name if labels else ""
    return dict.fromkeys(COLUMNS, "") | {"image": image, "labels": source} | values


def clear(output: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Make room: with --overwrite the files that an earlier call's table lists go.

    Raises:
        DatasetError: if the folder holds something else, or lies among the inputs.
    """
    for path in inputs:
        if output.resolve() == path.resolve() or output.resolve().is_relative_to(path.resolve()):
            raise DatasetError(f"--output {output} is inside {path}; choose another folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (overwrite and (output / TABLE).is_file()):
        hint = (
            "--overwrite replaces what this command wrote" if (output / TABLE).is_file() else "choose another"
        )
        raise DatasetError(f"--output {output} is not empty; {hint}")
    with (output / TABLE).open(newline="", encoding="utf-8") as file:
        written = [r["written"] for r in csv.DictReader(file) if r.get("written")]
    for name in written:
        image = output / name
        if not image.resolve().is_relative_to(output.resolve()):
            raise DatasetError(f"{output / TABLE} names {name}, which is not inside of {output}")
        mask = output / "ground_truth" / image.parent.name / f"{image.stem}_mask.png"
        for path in (image, mask):
            path.unlink(missing_ok=True)
    (output / TABLE).unlink()


def summary(rows: Sequence[dict[str, object]], output: Path) -> str:
    """How many images of each kind were written, and why others were not."""
    kinds = Counter(str(r["kind"]) for r in rows if r["written"])
    reasons = Counter(re.sub(r"^\w+ \d+: ", "", str(r["skipped"])) for r in rows if r["skipped"])
    unlabelled = sum(r["kind"] == "good" and not r["labels"] for r in rows)
    note = {"good": f", {unlabelled} of them in no label file"} if unlabelled else {}
    lines = [f"{number:6} {kind}{note.get(kind, '')}" for kind, number in sorted(kinds.items())]
    lines += [f"{number:6} skipped: {reason}" for reason, number in reasons.most_common()]
    return "\n".join([*lines, f"{output / TABLE} has a line for each image"])


if __name__ == "__main__":
    sys.exit(run_command(main))
