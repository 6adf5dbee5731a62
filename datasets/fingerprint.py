"""A fingerprint of the images that a run is made of: it tells whether another run has the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from datasets.build import RunData, dataset_root
from datasets.samples import Sample
from utils.config import Config, Tree

WHOLE = 1 << 16  # bytes: files up to this size are read in full
PIECES, PIECE = 16, 1 << 12  # of a larger file: so many pieces, evenly spread, of so many bytes


def data_identity(config: Config, data: RunData) -> Tree:
    """What a run is made of besides its settings, as plain types: roots, numbers of images, a fingerprint.

    The fingerprint covers each sample's set, label, category and kind of defect, and the path below the root,
    the size and the content of its image, its masks and its earlier frames. Of a file above WHOLE bytes,
    PIECES are read; a change of a few pixels in a large uncompressed file can fall between them.
    """
    root = dataset_root(config.data)
    sets = {"train": data.train, "calibration": data.calibration, "validation": data.validation}
    samples = {name: part.samples if part else [] for name, part in (sets | {"test": data.test}).items()}
    digest, known = hashlib.sha256(), {}
    for name, part in samples.items():
        for sample in part:
            for line in _lines(sample, root, known):
                digest.update(f"{name}|{line}\n".encode(errors="surrogateescape"))
    weights = config.model.weights
    return {
        "root": str(root),
        "images": {name: len(part) for name, part in samples.items()},
        "fingerprint": digest.hexdigest()[:16],
        "weights": content_digest(Path(weights)) if weights else None,
    }


def _lines(sample: Sample, root: Path | None, known: dict[Path, str]) -> Iterator[str]:
    yield f"{sample.label}|{sample.category}|{sample.defect}"
    for path in (sample.path, *sample.masks, *sample.earlier):
        inside = root is not None and path.is_relative_to(root)
        if path not in known:  # a sample may be drawn several times, a frame is in several samples
            known[path] = content_digest(path)
        yield f"{path.relative_to(root) if inside else path}|{known[path]}"


def content_digest(path: Path) -> str:
    """Size and hash of a file's content, of pieces of it if it is large, or "unreadable"."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            return f"{size}-{hashlib.sha256(b''.join(_pieces(file, size))).hexdigest()[:16]}"
    except OSError:  # what reads it for good says why
        return "unreadable"


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    starts = [0] if size <= WHOLE else [i * (size - PIECE) // (PIECES - 1) for i in range(PIECES)]
    for start in starts:
        file.seek(start)
        yield file.read(WHOLE if size <= WHOLE else PIECE)
