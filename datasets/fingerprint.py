"""A fingerprint of the images that a run is made of: it tells whether another run has the same ones."""

import hashlib
from functools import cache
from pathlib import Path

from datasets.build import RunData, dataset_root
from utils.config import Config
from utils.files import relative_to
from utils.yaml_io import Tree

WHOLE = 1 << 16  # bytes: files up to this size are read in full
PIECES, PIECE = 16, 1 << 12  # of a larger file: so many pieces, evenly spread, of so many bytes


def data_identity(config: Config, data: RunData) -> Tree:
    """What a run is made of besides its settings, as plain types: roots, numbers of images, a fingerprint.

    The fingerprint covers each sample's set, label, category and kind of defect, and the path below the root,
    the size and the content of its image, its masks and its earlier frames. Of a file above WHOLE bytes,
    PIECES are read; a change of a few pixels in a large uncompressed file can fall between them.
    """
    root, weights = dataset_root(config), config.model.weights
    sets = {"train": data.train, "calibration": data.calibration, "validation": data.validation}
    samples = {name: part.samples if part else [] for name, part in (sets | {"test": data.test}).items()}
    digest, content = hashlib.sha256(), cache(content_digest)  # a frame is in several samples
    for name, s in ((name, s) for name, part in samples.items() for s in part):
        lines = [f"{s.label}|{s.category}|{s.defect}"]
        lines += [f"{relative_to(path, root)}|{content(path)}" for path in (s.path, *s.masks, *s.earlier)]
        for line in lines:
            digest.update(f"{name}|{line}\n".encode(errors="surrogateescape"))
    return {
        "root": str(root),
        "images": {name: len(part) for name, part in samples.items()},
        "fingerprint": digest.hexdigest()[:16],
        "weights": content_digest(Path(weights)) if weights not in (None, "random") else None,
    }


def content_digest(path: Path) -> str:
    """Size and hash of a file's content, of pieces of it if it is large, or "unreadable"."""
    try:
        with path.open("rb") as file:
            size, digest = file.seek(0, 2), hashlib.sha256()
            for i in range(PIECES if size > WHOLE else 1):
                file.seek(i * (size - PIECE) // (PIECES - 1) if i else 0)
                digest.update(file.read(PIECE if size > WHOLE else WHOLE))
            return f"{size}-{digest.hexdigest()[:16]}"
    except OSError:  # what reads it for good says why
        return "unreadable"
