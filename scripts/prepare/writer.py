"""What the commands of this folder share: a plan of files, written once, never into the originals."""

from __future__ import annotations

import argparse
import csv
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from datasets.files import LFS_POINTER, is_lfs_pointer
from datasets.images import read_image, read_mask
from datasets.registry import SPECS, collect
from datasets.samples import count, in_words
from utils.cli import log, new_parser, print_result, user_path
from utils.errors import DatasetError
from utils.files import write_atomically


@dataclass(frozen=True)
class Item:
    """One file to write: `convert` makes its bytes from the source; `target` is relative to the output."""

    source: Path
    target: str
    convert: Callable[[Path], bytes] = Path.read_bytes


@dataclass(frozen=True)
class Source:
    """The folder of the originals, and where they are to be had."""

    folder: Path
    where: str

    def require(self, name: str) -> Path:
        """A file or folder of the originals.

        Raises:
            DatasetError: if it is missing, saying where to download it, or in which folder of --source it is.
        """
        path = self.folder / name
        if not path.exists():
            deeper = next(iter(sorted(self.folder.glob(f"*/{name}"))), None)
            hint = f"download from {self.where} and unpack into --source"
            if deeper is not None:
                folder = self.folder / deeper.relative_to(self.folder).parts[0]
                hint = f"did you mean --source {shlex.quote(str(folder))}?"
            raise DatasetError(f"{path} is missing; {hint}")
        return path

    def table(self, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
        """Rows of a csv file of the originals, in its order.

        Raises:
            DatasetError: if the file or one of `columns` is missing.
        """
        path = self.require(name)
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows or not set(columns) <= rows[0].keys():
            raise DatasetError(f"{path} must have the columns {', '.join(columns)}")
        return rows


def arguments_parser(description: str) -> argparse.ArgumentParser:
    """A parser of --source, --output and --quiet."""
    parser = new_parser(description)
    parser.add_argument(
        "--source", type=user_path, required=True, metavar="DIR", help="the originals, unpacked"
    )
    parser.add_argument("--output", type=user_path, required=True, metavar="DIR", help="the prepared dataset")
    return parser


def parse_arguments(description: str, argv: Sequence[str]) -> argparse.Namespace:
    """Read --source, --output and --quiet."""
    return arguments_parser(description).parse_args(argv)


def prepare(name: str, items: Sequence[Item], args: argparse.Namespace) -> None:
    """Write what is missing of `items`, then check the counts of the dataset `name`.

    Files appear in one step, so one that is there is complete, and a stopped command goes on where it was.

    Raises:
        DatasetError: if an original is missing or unreadable, a file would land among the originals, or the
            counts of the result are wrong.
    """
    check_plan(items, args.source, args.output)
    todo = [item for item in items if not (args.output / item.target).is_file()]
    log.info("%d files, %d of them are there already", len(items), len(items) - len(todo))
    with ThreadPoolExecutor() as pool:
        written = pool.map(lambda item: _write(item, args.output), todo)
        for _ in tqdm(written, total=len(todo), unit="file", disable=True if args.quiet else None):
            pass
    samples = collect(SPECS[name], args.output, "all")
    for category in dict.fromkeys(s.category for s in samples):
        numbers = count(s for s in samples if s.category == category)
        print_result(f"{args.output}: {category}: {in_words(numbers)}")


def check_plan(items: Sequence[Item], source: Path, output: Path) -> None:
    """Stop before anything is written, if something is missing or would land among the originals."""
    inside, root = source.resolve(), output.resolve()
    for item in items:
        if ".." in Path(item.target).parts:
            raise DatasetError(f"{item.source.name} would be written to {item.target}, outside of --output")
        if (root / item.target).is_relative_to(inside):
            raise DatasetError(
                f"--output {output} is inside the originals at {source}; choose another folder"
            )
    files = list(dict.fromkeys(item.source for item in items))
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(files)} originals are missing, such as {missing[0]}; complete the copy"
        )
    pointers = [path for path in files if is_lfs_pointer(path)]
    if pointers:
        reason = f"{len(pointers)} of {len(files)} originals were not fetched, such as {pointers[0]}"
        raise DatasetError(f"{reason}: {LFS_POINTER}")
    one = {Path(item.target).parent: item.source for item in reversed(items)}
    for folder, path in one.items():  # one of each kind tells whether the release can be read
        read = read_mask if {"masks", "ground_truth"} & set(folder.parts) else read_image
        read(path)


def _write(item: Item, output: Path) -> None:
    content = item.convert(item.source)
    write_atomically(output / item.target, lambda file: file.write(content))
