"""Write the archive that MVTec AD 2's evaluation server takes, from one trained run for each category.

python -m scripts.submit_mvtec_ad2 --data-root DIR --output mvtec_ad2.tar.gz RUN [RUN ...]

The labels of the two private test sets are not public. Only the server (https://benchmark.mvtec.com) measures
on them, so nobody can select a model or a threshold there. For each private image the archive NAME.tar.gz has

    NAME/anomaly_images/CATEGORY/TEST_SET/IMAGE.tiff              the anomaly map, 16-bit floats
    NAME/anomaly_images_thresholded/CATEGORY/TEST_SET/IMAGE.png   255 where the map is above 3, else 0

both of the image's own size. A map's unit is the standard deviation of all pixels of the maps of
validation/good, above their mean: normal images that training does not read. So the threshold, 3, is the one
that the dataset's authors suggest, and no test image has a part in it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tifffile
from PIL import Image

from datasets.build import images_below
from datasets.files import find_images
from datasets.images import upright_size
from datasets.registry import find_root, spec_of
from model import load_detector
from model.detector import Detector
from scripts.text import markdown
from utils.checkpoint import load_trained
from utils.cli import (
    add_device_flags,
    add_overwrite_flag,
    log,
    new_parser,
    print_result,
    run_command,
    user_path,
)
from utils.errors import ConfigError, DatasetError, RunError
from utils.files import write_atomically

DATASET = "mvtec_ad2"
PRIVATE = {  # images of each of the two private test sets
    "can": 321, "fabric": 314, "fruit_jelly": 255, "rice": 277, "sheet_metal": 142, "vial": 276,
    "wallplugs": 232, "walnuts": 228,
}  # fmt: skip
TEST_SETS = {"test_private": "regular", "test_private_mixed": "mixed"}  # with the ending of the names
HELD_OUT = "validation/good"
MAPS, MASKS = "anomaly_images", "anomaly_images_thresholded"
THRESHOLD = 3.0
LARGEST = float(np.finfo(np.float16).max)
ENDING = ".tar.gz"
COMPRESSION = 3  # of 9: the maps are large and smooth


class Scale(NamedTuple):
    """Of all pixels of the held-out normals' maps."""

    mean: float
    deviation: float

    def __call__(self, anomaly_map: np.ndarray) -> np.ndarray:
        """A map in standard deviations above the mean, as float16; what that cannot hold is its largest."""
        scaled = (anomaly_map.astype(np.float64) - self.mean) / self.deviation
        return np.clip(scaled, -LARGEST, LARGEST).astype(np.float16)


def main(argv: Sequence[str]) -> None:
    """Check the runs and the images, write the archive, and print the scale of each category.

    Raises:
        ConfigError: if a category has no run or two, or a run is of another dataset or not finished.
        DatasetError: if the private images are not those that the server expects.
        RunError: if the archive is there already.
    """
    args = parse_arguments(argv)
    if not args.output.name.endswith(ENDING):
        raise ConfigError(f"--output is {args.output}; the server takes a file that ends in {ENDING}")
    if args.output.exists() and not args.overwrite:
        raise RunError(f"{args.output} is there already; choose another --output, or --overwrite")
    root = find_root(spec_of(DATASET), args.data_root)
    check_images(root)
    runs = categories_of_runs(args.runs)
    rows = [["category", "held-out normals", "mean", "standard deviation", "maps"]]
    write_atomically(args.output, lambda file: rows.extend(write_archive(file, root, runs, args)))
    print_result(markdown(rows))
    log.info("written to %s; no label of these images is public, so there is no result here", args.output)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders that cover all categories")
    parser.add_argument("--data-root", required=True, type=user_path, metavar="DIR", help="of the dataset")
    where = f"the archive, a file that ends in {ENDING}"
    parser.add_argument(
        "--output", type=user_path, default=Path(f"{DATASET}{ENDING}"), metavar="FILE", help=where
    )
    add_overwrite_flag(parser)
    add_device_flags(parser)
    return parser.parse_args(argv)


def check_images(root: Path) -> None:
    """Stop unless the private images have the names that the server expects, and normals are held out."""
    if lacking := [category for category in PRIVATE if not (root / category).is_dir()]:
        raise DatasetError(
            f"{root} lacks {', '.join(lacking)}; the server takes all {len(PRIVATE)} categories"
        )
    for category, number in PRIVATE.items():
        if not find_images(root / category / HELD_OUT):
            raise DatasetError(f"no image in {root / category / HELD_OUT}, which the threshold is made from")
        for test_set, ending in TEST_SETS.items():
            expected = {f"{i:03d}_{ending}.png" for i in range(number)}
            folder = root / category / test_set
            wrong = expected ^ {path.relative_to(folder).as_posix() for path in find_images(folder)}
            if wrong:
                name = min(wrong)
                which = "lacks" if name in expected else "has also"
                whole = f"expected {min(expected)} to {max(expected)}, as released"
                raise DatasetError(f"{folder} {which} {name}; {whole}")


def categories_of_runs(runs: Sequence[str]) -> dict[str, list[str]]:
    """The categories that each run stands for; together they are all, each once, else a ConfigError."""
    found: dict[str, str] = {}
    for run in runs:
        _, state = load_trained(run)
        data = state.config.data
        if data.name != DATASET:
            raise ConfigError(f"{run} was trained on {data.name}; give runs of {DATASET}")
        if not state.finished:
            raise ConfigError(f"{run} is not finished; go on with train.py --resume")
        for category in PRIVATE if data.category == "all" else [data.category]:
            if category in found:
                raise ConfigError(f"{found[category]} and {run} are both of {category}; leave one out")
            found[category] = run
    if lacking := [category for category in PRIVATE if category not in found]:
        raise ConfigError(f"no run of {', '.join(lacking)}; the server takes all {len(PRIVATE)} categories")
    if unknown := found.keys() - PRIVATE.keys():
        raise ConfigError(f"{found[min(unknown)]} is of {min(unknown)}, which {DATASET} does not have")
    return {run: [category for category in PRIVATE if found[category] == run] for run in runs}


def write_archive(
    file: BinaryIO, root: Path, runs: Mapping[str, Sequence[str]], args: argparse.Namespace
) -> list[list[str]]:
    """Fill the archive; gives back a row of the printed table for each category."""
    name = args.output.name.removesuffix(ENDING)
    rows: list[list[str]] = []
    written: set[str] = set()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=COMPRESSION) as archive:
        for run, categories in runs.items():
            detector = load_detector(
                run, device=args.device, precision=args.precision, batch_size=args.eval_batch_size
            )
            for category in categories:
                folder = root / category
                scale = scale_of(a_map for _, a_map in maps_of(detector, folder / HELD_OUT, args.quiet))
                for test_set in TEST_SETS:
                    for path, a_map in maps_of(detector, folder / test_set, args.quiet):
                        for member, content in files_of(path.relative_to(root), scale(a_map)).items():
                            add(archive, f"{name}/{member}", content)
                            written.add(member)
                numbers = len(find_images(folder / HELD_OUT)), *scale, 2 * PRIVATE[category]
                rows.append([category, *(f"{number:.6g}" for number in numbers)])
    check_names(written)
    return rows


def maps_of(detector: Detector, folder: Path, quiet: bool) -> Iterator[tuple[Path, np.ndarray]]:
    """The images of a folder, in order, with their maps (height, width) float32 of the image's own size."""
    data = images_below(folder, detector.config, detector.normalise)
    for part in detector.predictions(data, quiet=quiet):
        for i, a_map in zip(part.indices, part.maps, strict=True):
            path = data.samples[i].path
            yield path, data.decode.to_image(a_map, *upright_size(path))


def scale_of(maps: Iterable[np.ndarray]) -> Scale:
    """Mean and standard deviation over all pixels of the maps, of which one is held at a time.

    Raises:
        ConfigError: if all pixels are equal, so that there is no threshold.
    """
    count, mean, squares = 0, 0.0, 0.0  # the parts are joined as in Chan, Golub and LeVeque, 1983
    for a_map in maps:
        own, size = float(a_map.mean(dtype=np.float64)), a_map.size
        squares += a_map.var(dtype=np.float64) * size + (own - mean) ** 2 * count * size / (count + size)
        mean += (own - mean) * size / (count + size)
        count += size
    deviation = math.sqrt(squares / max(count, 1))
    if not 0 < deviation < math.inf:
        raise ConfigError(
            f"the maps of the held-out normals have the standard deviation {deviation}: no scale"
        )
    return Scale(mean, deviation)


def files_of(image: Path, scaled: np.ndarray) -> dict[str, bytes]:
    """The two files of an image by their names in the archive; image: relative to the dataset's root."""
    tiff, png = BytesIO(), BytesIO()
    tifffile.imwrite(tiff, scaled, photometric="minisblack", metadata=None)
    Image.fromarray(255 * (scaled > THRESHOLD).astype(np.uint8)).save(png, format="PNG")
    check_form(image, tiff.getvalue(), png.getvalue(), scaled.shape)
    place = image.with_suffix("").as_posix()
    return {f"{MAPS}/{place}.tiff": tiff.getvalue(), f"{MASKS}/{place}.png": png.getvalue()}


def check_form(image: Path, tiff: bytes, png: bytes, size: tuple[int, ...]) -> None:
    """Stop unless the files read back as the server reads them: one channel, float16; 0 and 255; the size.

    Raises:
        ValueError: naming the image and what is wrong.
    """
    a_map, mask = tifffile.imread(BytesIO(tiff)), np.asarray(Image.open(BytesIO(png)))
    if a_map.shape != size or a_map.dtype != np.float16 or not np.isfinite(a_map).all():
        found = f"{a_map.dtype} {a_map.shape}, {np.count_nonzero(~np.isfinite(a_map))} values not finite"
        raise ValueError(f"the map of {image} is {found}; expected finite float16 {size}")
    if mask.shape != size or not np.isin(mask, (0, 255)).all():
        found = f"{mask.shape} with values {np.unique(mask)[:4].tolist()}"
        raise ValueError(f"the thresholded map of {image} is {found}; expected {size} of 0 and 255")


def check_names(written: Iterable[str]) -> None:
    """Stop unless the archive has all files, and no others; a ValueError names one that is amiss."""
    expected = {
        f"{top}/{category}/{test_set}/{i:03d}_{ending}{suffix}"
        for top, suffix in ((MAPS, ".tiff"), (MASKS, ".png"))
        for category, number in PRIVATE.items()
        for test_set, ending in TEST_SETS.items()
        for i in range(number)
    }
    if wrong := expected ^ set(written):
        raise ValueError(f"{len(wrong)} files are missing or too many in the archive, as {min(wrong)}")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file of that content."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, BytesIO(content))


if __name__ == "__main__":
    sys.exit(run_command(main))
